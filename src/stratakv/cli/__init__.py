"""The `stratakv` command. One file a command; `app.COMMANDS` is the list of them.

Exit codes: 0 done; 2 a wrong argument, file or model; 1 anything else that failed; 130 interrupted; 141 the reader of
our output went away. A failure is one line on stderr. Nothing here imports torch until a command really runs.
"""

from stratakv.cli.app import main

__all__ = ["main"]
