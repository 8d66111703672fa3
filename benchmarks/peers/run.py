"""Measure StrataKV and its peers in turn, and write the report.

    python -m benchmarks.peers.run [--peers a,b] [--lengths 128,1024] [--rounds 5] [--quick] [--out FILE.json]

Run with StrataKV's own Python, after `benchmarks.peers.install`. Each peer is a process that has loaded the model once.
In every round all of them measure the same, one after the other, each round in another order, so that what disturbs
the machine for a while disturbs all alike. A peer that is missing, crashes or runs out of time is reported as such.

The JSON, in seconds, bytes and tokens where a name says nothing else:

schema    "stratakv.bench.peers/1"
machine   cpu, cores, threads, load, system, python, torch, transformers, stratakv: the driver's
commit    of StrataKV, with "-dirty" where files had changed
settings  lengths, rounds, decode_steps, batches, batch_prompt_tokens, batch_new_tokens, threads, timeout
bandwidth a list of {stage, round, bytes_per_second}: plain reading, before the round
complete  false while the run goes on: the file is written after each stage
peers     by name: {weights, kv, versions, missing, load_seconds, peak_bytes, idle_cpu, lengths, batches}

    missing   why the peer could not be measured at all, or null
    idle_cpu  processors that its worker kept busy while others were measured: 0 where all is well
    lengths   by number of prompt tokens: {prefill_tokens_per_second, decode_ms_per_token, first_tokens, reason}
    batches   by number of requests: {output_tokens_per_second, first_tokens, reason}; the prompts' time is part of it

A number is {median, smallest, largest, samples} with one sample a round, or null where there is none; `reason` then
says why. A sample of decode_ms_per_token is the median step of its round.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.peers.catalog import ENVIRONMENTS, OWN, PEERS, Entry
from benchmarks.peers.client import Worker, cpu_seconds
from benchmarks.peers.contestant import ROOT, Contestant, Key, enlist, start_worker
from benchmarks.peers.models import FOLDER
from benchmarks.peers.report import markdown
from benchmarks.peers.stages import Settings, Stage, stages

SCHEMA = "stratakv.bench.peers/1"
SETTLE_SECONDS = 0.5  # thread pools wait busily for up to 0.2 s after their work
QUICK: dict[str, Any] = {"lengths": (128,), "rounds": 1, "decode_steps": 8, "batches": (8,), "batch_new_tokens": 8}
_HERE = Entry("here", "", "", "here", OWN, FOLDER, {})


class Run:
    """All of a run: contestants, the stages, and the document that grows with them."""

    def __init__(self, contestants: Sequence[Contestant], settings: Settings, peers_dir: Path, out: Path) -> None:
        self._settings, self._peers_dir, self._out = settings, peers_dir, out
        self._contestants = list(contestants)
        self._document: dict[str, Any] = {"schema": SCHEMA}

    def measure(self) -> dict[str, Any]:
        """Measure everything. Returns the JSON, which is written to the file as it grows."""
        here = start_worker(_HERE, self._peers_dir, self._settings.threads)
        try:
            return self._measure(here)
        finally:
            here.close()
            for contestant in self._contestants:
                contestant.close()

    def _measure(self, here: Worker) -> dict[str, Any]:
        settings = self._settings
        bandwidth: list[dict[str, Any]] = []
        self._document |= {
            "machine": here.ask("machine", settings.timeout, threads=settings.threads),
            "commit": commit(),
            "settings": asdict(settings),
            "bandwidth": bandwidth,
            "complete": False,
        }
        folder = str((self._peers_dir / "models" / FOLDER).absolute())
        tokens = here.ask("tokens", settings.timeout, folder=folder, n=settings.n_tokens)["tokens"]
        for contestant in self._contestants:
            say(f"loading {contestant.entry.name}")
            contestant.start()
            if contestant.missing is not None:
                say(f"  missing: {contestant.missing}")
        for key, stage in stages(settings, tokens).items():
            for contestant in self._contestants:
                say(f"{stage.title}, warming up {contestant.entry.name}")
                contestant.begin(key, stage)
                if contestant.cells[key].reason != contestant.missing:
                    say(f"  {contestant.cells[key].reason}")
            for number in range(settings.rounds):
                time.sleep(SETTLE_SECONDS)
                read = here.ask("bandwidth", settings.timeout, threads=settings.threads)
                bandwidth.append({"stage": stage.title, "round": number, **read})
                gigabytes = read["bytes_per_second"] / 1e9
                say(f"{stage.title}, round {number + 1} of {settings.rounds}: memory at {gigabytes:.1f} GB/s")
                self._round(key, stage, number)
            for contestant in self._contestants:
                contestant.finish()
            self._write()
        self._document["complete"] = True
        self._write()
        return self._document

    def _round(self, key: Key, stage: Stage, number: int) -> None:
        """Every peer once, from another one on in each round."""
        first = number % len(self._contestants)
        for contestant in self._contestants[first:] + self._contestants[:first]:
            if not contestant.is_in(key):
                continue
            time.sleep(SETTLE_SECONDS)
            before, start = cpu_seconds(), time.monotonic()
            contestant.round(key, stage)
            after, seconds = cpu_seconds(), time.monotonic() - start
            for other in self._contestants:
                session = other.session
                if other is not contestant and session is not None:
                    other.idle_seconds += seconds
                    other.idle_cpu_seconds += max(after.get(session, 0) - before.get(session, 0), 0)

    def _write(self) -> None:
        self._document["peers"] = {each.entry.name: each.to_dict() for each in self._contestants}
        self._out.parent.mkdir(parents=True, exist_ok=True)
        self._out.write_text(json.dumps(self._document, indent=1) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path(".peers"), help="the folder with venvs and models")
    parser.add_argument("--peers", type=_names, default=list(PEERS), help="names, or beginnings of names, with commas")
    parser.add_argument("--lengths", type=_numbers, help="tokens of the prompts, with commas between")
    parser.add_argument("--batches", type=_numbers, help="requests at once, with commas between")
    parser.add_argument("--rounds", type=int, help="samples of each number")
    parser.add_argument("--threads", type=int, help="threads of every peer")
    parser.add_argument("--timeout", type=float, help="seconds that one request may take")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see whether all works")
    parser.add_argument("--out", type=Path, help="the JSON; the table and the plot go beside it")
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that workers are ended too
    settings = replace(Settings(), **(QUICK if given.quick else {}))
    named = ("lengths", "batches", "rounds", "threads", "timeout")
    settings = replace(settings, **{name: value for name in named if (value := getattr(given, name)) is not None})
    if settings.rounds < 1 or settings.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    out = given.out or ROOT / "benchmarks" / "results" / f"peers-{datetime.now():%Y-%m-%d-%H%M}.json"
    peers_dir = given.dir.absolute()
    contestants = [enlist(PEERS[name], peers_dir, settings) for name in given.peers]
    document = Run(contestants, settings, peers_dir, out).measure()
    table = markdown(document)
    out.with_suffix(".md").write_text(table, encoding="utf-8")
    print(table)
    say(f"written: {out}, {out.with_suffix('.md').name}{_plot(peers_dir, out)}")


def _plot(peers_dir: Path, out: Path) -> str:
    """Draw in a venv of its own. Returns what to say about it."""
    python = ENVIRONMENTS["plots"].python(peers_dir)
    target = out.with_suffix(".svg")
    command = [str(python), "-m", "benchmarks.peers.plot", str(out.absolute()), str(target.absolute())]
    if not python.exists():
        return "; no plot, since the venv 'plots' was not made"
    drawn = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    return f", {target.name}" if drawn.returncode == 0 else f"; no plot: {drawn.stderr.strip().splitlines()[-1:]}"


def _names(text: str) -> list[str]:
    found = []
    for part in text.split(","):
        matching = [name for name in PEERS if name.startswith(part.strip())]
        if not matching:
            raise argparse.ArgumentTypeError(f"no peer is called {part!r}; there are {', '.join(PEERS)}")
        found += [name for name in matching if name not in found]
    return found


def _numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(sorted({int(part) for part in text.split(",") if part.strip()}))
    if numbers and numbers[0] < 1:
        raise argparse.ArgumentTypeError("numbers must be at least 1")
    return numbers


def commit() -> str | None:
    """Of StrataKV, with "-dirty" where files had changed."""
    command = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    return found.stdout.strip() or None


def say(text: str) -> None:
    """A line for whoever watches."""
    print(f"{datetime.now():%H:%M:%S} {text}", flush=True)


if __name__ == "__main__":
    main()
