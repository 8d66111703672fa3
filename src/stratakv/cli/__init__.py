"""The `stratakv` command. One file a command; `app.COMMANDS` is the list of them.

Exit codes: 0 done; 2 a wrong argument, file or model; 1 anything else that failed; 130 interrupted; 141 the reader of
our output went away. A failure is one line on stderr. Nothing here imports torch until a command really runs.
"""

__all__ = ["main"]


def main() -> None:
    """Run the command line and exit."""
    try:  # imports take long enough for a Ctrl-C
        from stratakv.cli.app import main as run
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    run()
