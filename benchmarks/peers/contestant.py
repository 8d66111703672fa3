"""One peer through a run: its worker, its results, and why it lacks some."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.peers.catalog import ENVIRONMENTS, OWN, Entry
from benchmarks.peers.client import Worker, WorkerError, WorkerLostError, WorkerTimeoutError
from benchmarks.peers.install import why_missing
from benchmarks.peers.stages import Settings, Stage

ROOT = Path(__file__).resolve().parents[2]
Key = tuple[str, int]


def start_worker(entry: Entry, peers_dir: Path, threads: int) -> Worker:
    """The process of an entry's worker, in the venv that it wants."""
    python = sys.executable if entry.environment == OWN else str(ENVIRONMENTS[entry.environment].python(peers_dir))
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    folder = str(Path(python).parent)  # tools that a peer installed for itself, as ninja
    variables = {
        **inherited,
        "PATH": f"{folder}{os.pathsep}{inherited.get('PATH', '')}",
        "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": str(peers_dir / "cache"),  # for what peers compile at first use
        "OMP_NUM_THREADS": str(threads),
        **entry.variables,
    }
    command = [python, "-m", f"benchmarks.peers.{entry.worker}"]
    return Worker(command, peers_dir / "logs" / f"{entry.name}.log", variables=variables, cwd=ROOT)


def enlist(entry: Entry, peers_dir: Path, settings: Settings) -> Contestant:
    """A peer of the catalog, as it was installed."""
    return Contestant(
        entry,
        lambda: start_worker(entry, peers_dir, settings.threads),
        peers_dir / "models" / entry.model,
        settings,
        missing=why_not_there(entry, peers_dir),
    )


def why_not_there(entry: Entry, peers_dir: Path) -> str | None:
    """Why the venv of a peer cannot be used, or None where it can."""
    reason = None if entry.environment == OWN else why_missing(ENVIRONMENTS[entry.environment], peers_dir)
    return None if reason is None else public(reason)


class Contestant:
    """A peer, its worker while there is one, and a cell of results for each stage.

    A worker that ended in a stage is started again for the next. Where a request ran out of time, longer ones of that
    kind are not tried.
    """

    def __init__(
        self, entry: Entry, start: Callable[[], Worker], model: Path, settings: Settings, missing: str | None = None
    ) -> None:
        self.entry = entry
        self.versions: dict[str, str] = {}
        self.missing = missing
        self.cells: dict[Key, Any] = {}
        self.load_seconds: float | None = None
        self.peak_bytes = 0
        self.idle_cpu_seconds = self.idle_seconds = 0.0
        self._start, self._model, self._settings = start, str(model), settings
        self._worker: Worker | None = None
        self._gave_up: dict[str, str] = {}

    @property
    def session(self) -> int | None:
        """Of its worker, for its processor time."""
        return self._worker.session if self._worker is not None else None

    def start(self) -> None:
        """Start the worker and load the model; where that fails, the peer is missing."""
        if self.missing is not None or self._worker is not None:
            return
        try:
            self._worker = self._start()
            answer = self._ask("load", model=self._model, threads=self._settings.threads, **self.entry.options)
        except (WorkerError, OSError) as error:
            self.missing = public(f"{type(error).__name__}: {error}" if isinstance(error, OSError) else str(error))
            self.close()
        else:
            self.versions, self.load_seconds = answer["versions"], answer["seconds"]

    def begin(self, key: Key, stage: Stage) -> None:
        """An empty cell, a worker, and what comes before the first round."""
        self.cells[key] = cell = stage.new_cell()
        if (reason := self._gave_up.get(key[0])) is not None:
            cell.reason = f"not tried: {reason}"
            return
        self.start()
        cell.reason = self.missing
        self._try(key, lambda: stage.warm_up(self._ask))

    def round(self, key: Key, stage: Stage) -> None:
        """One sample, unless the stage failed before."""
        self._try(key, lambda: stage.measure(self._ask, self.cells[key]))

    def is_in(self, key: Key) -> bool:
        """Whether there is anything to measure in the stage."""
        return self.cells[key].reason is None

    def finish(self) -> None:
        """What can be asked after a stage."""
        if self._worker is not None:
            try:
                self.peak_bytes = max(self.peak_bytes, self._ask("rss")["peak"])
            except WorkerError:
                self.close()

    def close(self) -> None:
        """End the worker."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def to_dict(self) -> dict[str, Any]:
        """As in the JSON report."""
        by_kind: dict[str, dict[str, Any]] = {"lengths": {}, "batches": {}}
        for (kind, number), cell in self.cells.items():
            by_kind[kind][str(number)] = cell.to_dict()
        return {
            "weights": self.entry.weights,
            "kv": self.entry.kv,
            "versions": self.versions,
            "missing": self.missing,
            "load_seconds": self.load_seconds,
            "peak_bytes": self.peak_bytes or None,
            "idle_cpu": self.idle_cpu_seconds / self.idle_seconds if self.idle_seconds else None,
            **by_kind,
        }

    def _ask(self, verb: str, **arguments: Any) -> dict[str, Any]:
        assert self._worker is not None
        return self._worker.ask(verb, self._settings.timeout, **arguments)

    def _try(self, key: Key, work: Callable[[], None]) -> None:
        cell = self.cells[key]
        if cell.reason is not None:
            return
        try:
            work()
        except (WorkerError, ValueError) as error:
            cell.reason = public(str(error))
            if isinstance(error, WorkerTimeoutError):
                self._gave_up[key[0]] = f"{cell.reason} at {key[1]}"
            if isinstance(error, WorkerLostError):
                self._worker = None


def public(text: str) -> str:
    """Reports are shown to others: no folders and no addresses of this machine."""
    text = re.sub(r"\w+://\S+", "(an address)", text.replace(str(ROOT), "."))
    return re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+", ".../", text)
