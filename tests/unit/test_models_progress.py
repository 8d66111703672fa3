"""Progress is shown on a terminal and nowhere else."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr

import pytest

from stratakv.models import RichProgress, SilentProgress, terminal_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_nothing_is_shown_where_stderr_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with terminal_progress() as progress:
        progress.stage("Reading")
        progress.advance(1, 2)
        assert isinstance(progress, SilentProgress)
    assert stream.getvalue() == ""


def test_stages_reach_the_terminal_even_while_stderr_is_redirected(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", stream)
    with terminal_progress() as progress:
        assert isinstance(progress, RichProgress)
        with redirect_stderr(io.StringIO()) as hidden:
            progress.stage("Dequantising")
            progress.advance(1, 2)
    assert "Dequantising" in stream.getvalue()
    assert hidden.getvalue() == ""
