"""The driver's side of a worker: it is started, asked with a time limit, and ended, whatever it does meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

EXIT_SECONDS = 10


class WorkerError(Exception):
    """A request was not served; the text says why. The worker may go on."""


class WorkerLostError(WorkerError):
    """The worker is gone."""


class WorkerTimeoutError(WorkerLostError):
    """The worker gave no answer in time, and was ended."""


class Worker:
    """A process that answers JSON lines, in a session of its own so that all it started can be ended with it."""

    def __init__(self, command: Sequence[str], log: Path, *, variables: Mapping[str, str], cwd: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        with log.open("w", encoding="utf-8") as stderr:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=cwd,
                env=dict(variables),
                start_new_session=True,
            )
        self._read = b""
        self._is_open = True

    @property
    def is_open(self) -> bool:
        """Whether requests can be made, as far as is known: a worker that crashed is found out when it is asked."""
        return self._is_open

    def ask(self, verb: str, timeout: float, **arguments: Any) -> dict[str, Any]:
        """One request and its answer, within `timeout` seconds.

        Raises:
            WorkerError: the worker says that it cannot, and why.
            WorkerLostError: it ended.
            WorkerTimeoutError: it did not answer, and was ended.
        """
        assert self._process.stdin is not None
        request = json.dumps({"do": verb, **arguments}) + "\n"
        try:
            self._process.stdin.write(request.encode())
            self._process.stdin.flush()
        except OSError:
            raise WorkerLostError(self._last_words(verb)) from None
        answer: dict[str, Any] = json.loads(self._line(verb, timeout))
        for trouble in ("error", "unsupported"):
            if trouble in answer:
                raise WorkerError(answer[trouble])
        return answer

    @property
    def session(self) -> int:
        """The session of the worker and of all that it started, as in `cpu_seconds`."""
        return self._process.pid

    def close(self) -> None:
        """Ask it to end, and end it where it does not."""
        if not self._is_open:
            return
        with contextlib.suppress(WorkerError):
            self.ask("exit", EXIT_SECONDS)
        self._end()

    def _line(self, verb: str, timeout: float) -> bytes:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + timeout
        while b"\n" not in self._read:
            ready, _, _ = select.select([descriptor], [], [], max(deadline - time.monotonic(), 0))
            if not ready:
                self._end(grace=0)
                raise WorkerTimeoutError(f"no answer to {verb} in {timeout:.0f} s")
            piece = os.read(descriptor, 1 << 16)
            if not piece:
                raise WorkerLostError(self._last_words(verb))
            self._read += piece
        line, _, self._read = self._read.partition(b"\n")
        return line

    def _last_words(self, verb: str) -> str:
        status = self._end()
        how = f"ended with status {status}" if status >= 0 else f"was ended by {signal.Signals(-status).name}"
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"it {how} in {verb}" + (f": {lines[-1].strip()[:300]}" if lines else "")

    def _end(self, grace: float = EXIT_SECONDS) -> int:
        """Wait a while for the worker to end, then end all of its session; returns the exit status."""
        if self._is_open:
            self._is_open = False
            waiting = os.WEXITED | os.WNOWAIT | os.WNOHANG  # until it is reaped, its id is nobody else's
            deadline = time.monotonic() + grace
            while os.waitid(os.P_PID, self._process.pid, waiting) is None and time.monotonic() < deadline:
                time.sleep(0.01)
            _kill_session(self._process.pid)
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):  # what was not sent yet
                    assert stream is not None
                    stream.close()
        return self._process.returncode


def cpu_seconds() -> dict[int, float]:
    """Processor time that each session of this machine has used so far, as far as its processes still run."""
    seconds: dict[int, float] = {}
    for _, session, ticks in _processes():
        seconds[session] = seconds.get(session, 0) + ticks / os.sysconf("SC_CLK_TCK")
    return seconds


def _kill_session(session: int) -> None:
    """End the processes of a session, whatever groups they are in: build tools make groups of their own."""
    while found := [process for process, of, _ in _processes() if of == session]:
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.01)


def _processes() -> Iterator[tuple[int, int, int]]:
    """Process, session, and ticks of processor time, those of its ended children included; of all that run."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:  # ended meanwhile
            continue
        if fields[0] != "Z":  # ended, and nobody has asked how
            yield int(stat.parent.name), int(fields[3]), sum(map(int, fields[11:15]))
