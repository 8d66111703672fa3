"""What StrataKV's formats and its peers' cost in fidelity: the same tokens through each, and one table of it.

    python -m benchmarks.peers.fidelity [--texts prose,code] [--rows a,b] [--tokens 2048] [--out FILE]

Run with StrataKV's own Python, after `benchmarks.peers.install`. Weights and compute are fp32 everywhere, the cache is
all that rounds. A window of text is fed 256 tokens at once and then one at a time; the logits of each step are held
against those of the same program with a cache in fp32: StrataKV's against the model without a cache, transformers'
against its dynamic cache, llama.cpp's against its own. A peer that is missing or fails is reported as such.

The JSON, in seconds, bytes and tokens where a name says nothing else:

schema    "stratakv.bench.fidelity-peers/1"
machine   cpu, cores, threads, load, system, python, torch, transformers, stratakv: the driver's
commit    of StrataKV, with "-dirty" where files had changed
settings  tokens of a window, windows, prefilled, threads, timeout
complete  false while the run goes on: the file is written after each row
texts     a list of {name, source, rows}

    rows  a list of {name, kv, versions, missing, scores, bytes_per_token, seconds_per_token}

    missing            why the row could not be measured, or null; then all that follows is null
    scores             n_scored, kl, kl_p99, top1, perplexity, exact_perplexity: `stratakv.verification.Scores`
    kv                 what the program calls the format of keys and values
    bytes_per_token    that the cache had allocated at the end of a window, over the tokens of the window
    seconds_per_token  the median step; of StrataKV's, all windows are fed side by side
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

import stratakv
from benchmarks.peers.catalog import FOLLOWED, OWN_FORMATS, REFERENCES, Entry
from benchmarks.peers.client import WorkerError
from benchmarks.peers.contestant import ROOT, public, start_worker, why_not_there
from benchmarks.peers.fidelity_report import markdown
from benchmarks.peers.models import make_models
from benchmarks.peers.run import commit, say
from stratakv.bench.fidelity import text_windows
from stratakv.bench.machine import Machine
from stratakv.bench.texts import TEXTS, get_text
from stratakv.integrations.transformers import attach
from stratakv.integrations.transformers.compat import PreTrainedModel
from stratakv.models import load
from stratakv.verification import Scorer, Scores, fidelity

SCHEMA = "stratakv.bench.fidelity-peers/1"
ROWS = [*OWN_FORMATS, *FOLLOWED]
ROWS_AT_ONCE = 64  # of logits, in fp64 and twice


@dataclass(frozen=True)
class Settings:
    """What each row is measured with."""

    tokens: int = 2048
    windows: int = 2
    prefilled: int = 256
    threads: int = 1
    timeout: float = 3600  # seconds for one window


@dataclass(frozen=True)
class Row:
    """One peer, or one format of ours, on one text. As in the JSON."""

    name: str
    kv: str
    versions: dict[str, str]
    missing: str | None = None
    scores: Scores | None = None
    bytes_per_token: float | None = None
    seconds_per_token: float | None = None


def own_row(name: str, model: PreTrainedModel, windows: Tensor, settings: Settings) -> Row:
    """One of StrataKV's formats; the windows go side by side."""
    report = fidelity(model, windows, prefilled=settings.prefilled, **OWN_FORMATS[name])
    scores = Scores(**{field.name: getattr(report, field.name) for field in fields(Scores)})
    kv = report.k_format if report.k_format == report.v_format else f"{report.k_format} / {report.v_format}"
    versions = {"stratakv": stratakv.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return Row(name, kv, versions, None, scores, report.bytes_per_token, report.seconds_per_token)


class Followers:
    """Peers on one text. The logits of their references are kept in files, of which there is one a venv and window."""

    def __init__(
        self,
        windows: Tensor,
        settings: Settings,
        peers_dir: Path,
        scratch: Path,
        references: Mapping[str, str] = REFERENCES,
    ) -> None:
        self._windows, self._settings, self._peers_dir, self._scratch = windows, settings, peers_dir, scratch
        self._references = references
        self._ready: set[str] = set()  # references that were followed

    def row(self, entry: Entry) -> Row:
        """Follow all windows with a peer, and score what it says. A reference is scored against itself."""
        reference = self._references[entry.environment]
        missing = why_not_there(entry, self._peers_dir)
        if missing is None and entry.name != reference and reference not in self._ready:
            missing = f"{reference}, by which it is judged, was not measured"
        if missing is not None:
            return Row(entry.name, entry.kv, {}, missing)
        try:
            row = self._follow(entry)
        except (WorkerError, OSError, ValueError) as error:
            return Row(entry.name, entry.kv, {}, public(f"{type(error).__name__}: {error}"))
        self._ready.add(entry.name)
        return row

    def _follow(self, entry: Entry) -> Row:
        settings, scorer = self._settings, Scorer()
        steps: list[float] = []
        n_bytes: list[int] = []
        worker = start_worker(entry, self._peers_dir, settings.threads)
        try:
            model = str(self._peers_dir / "models" / entry.model)
            loaded = worker.ask("load", settings.timeout, model=model, threads=settings.threads, **entry.options)
            for i, ids in enumerate(self._windows):
                exact = self._scratch / f"{entry.environment}-{i}.f32"
                found = exact if entry.name in self._references.values() else self._scratch / "found.f32"
                answer = worker.ask(
                    "follow",
                    settings.timeout,
                    tokens=ids.tolist(),
                    prefilled=settings.prefilled,
                    logits=str(found.absolute()),
                )
                steps += answer["seconds"]
                n_bytes.append(answer["bytes"])
                score(scorer, found, exact, ids[settings.prefilled :])
        finally:
            worker.close()
        held = statistics.mean(n_bytes) / settings.tokens
        seconds = statistics.median(steps) if steps else None
        return Row(entry.name, entry.kv, loaded["versions"], None, scorer.scores(), held, seconds)


def score(scorer: Scorer, found: Path, exact: Path, next_ids: Tensor) -> None:
    """Compare two files of logits, fp32 `[n, vocabulary]`; `next_ids`, int64 `[n]`, are the tokens that followed."""
    n = len(next_ids)
    pair = [np.fromfile(path, dtype=np.float32).reshape(n, -1) for path in (found, exact)]
    for start in range(0, n, ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        logits, right = (torch.from_numpy(each[part]) for each in pair)
        scorer.add(logits, right, next_ids[part])


def measure(
    texts: Sequence[str], names: Sequence[str], settings: Settings, peers_dir: Path, out: Path
) -> dict[str, Any]:
    """Measure all rows of that name. Returns the JSON, which is written to the file as it grows."""
    torch.set_num_threads(settings.threads)
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "machine": Machine.here().to_dict(),
        "commit": commit(),
        "settings": asdict(settings),
        "complete": False,
        "texts": [],
    }
    loaded = load("smollm2", dtype=torch.float32)
    attach(loaded.model)
    for text in [get_text(name) for name in texts]:
        rows: list[dict[str, Any]] = []
        document["texts"].append({"name": text.name, "source": text.source, "rows": rows})
        windows = text_windows(text, loaded.tokenizer, settings.windows, settings.tokens)
        with tempfile.TemporaryDirectory(dir=peers_dir) as scratch:
            followers = Followers(windows, settings, peers_dir, Path(scratch))
            for name in names:
                say(f"{text.name}, {name}")
                own = name in OWN_FORMATS
                row = own_row(name, loaded.model, windows, settings) if own else followers.row(FOLLOWED[name])
                say(f"  missing: {row.missing}" if row.scores is None else f"  KL {row.scores.kl:.2e}")
                rows.append(asdict(row))
                _write(document, out)
    document["complete"] = True
    _write(document, out)
    return document


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path(".peers"), help="the folder with venvs and models")
    parser.add_argument("--texts", type=_names(TEXTS), default=["prose"], help=f"{', '.join(TEXTS)}, with commas")
    parser.add_argument("--rows", type=_names(ROWS), default=ROWS, help="names, with commas between")
    parser.add_argument("--out", type=Path, help="the JSON; the table goes beside it")
    for field in fields(Settings):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that workers are ended too
    settings = Settings(**{field.name: getattr(given, field.name) for field in fields(Settings)})
    names, peers_dir = with_references(given.rows), given.dir.absolute()
    make_models(peers_dir / "models", sorted({FOLLOWED[name].model for name in names if name in FOLLOWED}))
    out = given.out or ROOT / "benchmarks" / "results" / f"fidelity-{datetime.now():%Y-%m-%d-%H%M}.json"
    table = markdown(measure(given.texts, names, settings, peers_dir, out))
    out.with_suffix(".md").write_text(table, encoding="utf-8")
    print(table)
    say(f"written: {out}, {out.with_suffix('.md').name}")


def with_references(names: Sequence[str]) -> list[str]:
    """All that is named, and the peers by which others are judged, in the order of `ROWS`."""
    needed = {*names, *(REFERENCES[FOLLOWED[name].environment] for name in names if name in FOLLOWED)}
    return [name for name in ROWS if name in needed]


def _names(known: Iterable[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        found = [part.strip() for part in text.split(",") if part.strip()]
        if unknown := sorted(set(found) - set(known)):
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is not among {', '.join(known)}")
        return found

    return parse


def _write(document: dict[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
