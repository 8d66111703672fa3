"""What becomes of an error: one line on stderr and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from stratakv.errors import ConfigurationError, FormatError, ModelNotFoundError, StrataKVError

FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells count
READER_GONE = 141  # 128 + SIGPIPE

UsageError: type[Any] = typer.BadParameter.__mro__[1]
"""What typer raises for arguments it cannot parse. Newer typers bring a click of their own, so it has no fixed home."""


def report(message: str) -> None:
    """Write `message` to stderr, as one line."""
    typer.echo(f"stratakv: {' '.join(message.split())}", err=True)


def exit_code(error: BaseException) -> int:
    """Report `error` and say which exit code it deserves.

    Bad input is the caller's to mend. What else we raise on purpose is one line too. Anything else is a bug, and shows
    its traceback.
    """
    match error:
        case KeyboardInterrupt():
            return INTERRUPTED
        case BrokenPipeError():
            _discard_output()
            return READER_GONE
        case ConfigurationError() | FormatError() | ModelNotFoundError():
            report(str(error))
            return BAD_INPUT
        case StrataKVError():
            report(str(error))
        case OSError():  # a full disk behind stdout, say
            _discard_output()
            report(f"{type(error).__name__}: {error}")
        case MemoryError():
            report("the system has no memory left for this")
        case _:
            traceback.print_exception(error)
            report(f"internal error: {type(error).__name__}: {error}")
    return FAILED


class OneLineFailures(TyperGroup):
    """A group of commands that exits by the rules above, whatever a command raises."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; typer's own exceptions pass."""
        if sys.stdout is None:
            report("standard output is closed, so there is nowhere to write to")
            raise typer.Exit(FAILED)
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # here, where a reader that went away can still be met quietly
        except (typer.Exit, typer.Abort, UsageError):
            raise
        except (Exception, KeyboardInterrupt) as error:
            raise typer.Exit(exit_code(error)) from None
        return result

    def main(  # type: ignore[override]  # always standalone: it exits
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> NoReturn:
        """Parse, run, exit."""
        extra["standalone_mode"] = False
        try:
            code = super().main(args, prog_name, **extra)
        except UsageError as error:
            report(error.format_message())
            code = BAD_INPUT
        except (typer.Abort, KeyboardInterrupt):
            code = INTERRUPTED
        sys.exit(code if isinstance(code, int) else 0)


def _discard_output() -> None:
    """Send what is still buffered for stdout nowhere, or the interpreter complains when it flushes at exit."""
    with suppress(OSError, ValueError, AttributeError):  # stdout is no file, as under a test runner, or closed
        descriptor = sys.stdout.fileno()
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
