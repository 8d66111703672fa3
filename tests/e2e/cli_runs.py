"""How the tests run the command, in this process or as an installed command."""

from __future__ import annotations

import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from stratakv.cli.app import build_app

FIELDS = {
    "text", "prompt_tokens", "generated_tokens", "seconds", "tokens_per_second", "kv_bytes", "seen_tokens",
    "stored_tokens", "waste", "format", "layout", "model", "stop_reason",
}  # fmt: skip


def run(*args: str, stdin: str | None = None) -> Any:
    """Run in this process."""
    return CliRunner().invoke(build_app(), args, input=stdin)


def start(*args: str, stdin: int | None = subprocess.DEVNULL) -> subprocess.Popen[str]:
    """Start the installed command, as from a terminal: what runs in the background of a script ignores Ctrl-C."""
    command = str(Path(sys.executable).with_name("stratakv"))
    return subprocess.Popen(
        [command, *args],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509  # takes no lock
    )


def is_one_sentence(stderr: str) -> bool:
    return stderr.startswith("stratakv: ") and stderr.endswith("\n") and stderr.count("\n") == 1 and len(stderr) > 15
