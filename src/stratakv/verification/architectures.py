"""Which architectures the cache serves: transformers' own cache, ours gathered and ours attached, side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers

from stratakv.errors import ConfigurationError
from stratakv.integrations.transformers import KVCache, attach
from stratakv.verification.zoo import Outcome, Row, TinyModel, architectures, dynamic_cache_factory, survey

OURS = ("gathered", "attached")
COLUMNS = (*OURS, "dynamic_cache")
PROBE_TOKENS = 12
BLOCK_TOKENS = 4


@dataclass(frozen=True, slots=True)
class ArchitectureRow:
    """What became of one architecture. The columns are None where no cache ran; `reason` says why.

    Attributes:
        name: the model class.
        model_type: of its config.
        gathered: a `KVCache` under the model's own attention: pass, refused or fail.
        attached: a `KVCache` after `stratakv.attach`: pass, refused or fail.
        dynamic_cache: transformers' own cache: pass, refused or fail.
        reason: of every column that did not pass, joined.
        is_wrong: whether ours failed in a way of feeding in which transformers' own cache did not.
    """

    name: str
    model_type: str
    gathered: str | None
    attached: str | None
    dynamic_cache: str | None
    reason: str
    is_wrong: bool = False


@dataclass(frozen=True, slots=True)
class ArchitectureReport:
    """All rows, and the versions that they hold for."""

    rows: tuple[ArchitectureRow, ...]
    transformers_version: str
    torch_version: str

    @property
    def passed(self) -> bool:
        """Whether a cache ran at all, and ours fails nowhere that transformers' own does not."""
        return any(row.gathered is not None for row in self.rows) and not self.wrong

    @property
    def wrong(self) -> tuple[ArchitectureRow, ...]:
        """The rows in which ours fails and transformers' own does not in the same way."""
        return tuple(row for row in self.rows if row.is_wrong)

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Rows with each result, by column; "not run" counts those without a model, or without keys and values."""
        counted = {column: Counter(getattr(row, column) or "not run" for row in self.rows) for column in COLUMNS}
        return {
            column: {status: found[status] for status in ("pass", "refused", "fail", "not run")}
            for column, found in counted.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "passed": self.passed,
            "transformers": self.transformers_version,
            "torch": self.torch_version,
            "counts": self.counts,
            "rows": [asdict(row) for row in self.rows],
        }


def chosen_names(text: str) -> tuple[str, ...] | None:
    """Class names or model types out of `text` with commas between; None for "all".

    Raises:
        ConfigurationError: the installed transformers has no architecture of such a name.
    """
    if text == "all":
        return None
    names = tuple(part.strip() for part in text.split(","))
    known = {name for architecture in architectures() for name in (architecture.name, architecture.model_type)}
    for name in names:
        if name not in known:
            raise ConfigurationError(
                f"--architectures: transformers {transformers.__version__} has no architecture {name!r}"
            )
    return names


def survey_architectures(
    names: Collection[str] | None = None, on_row: Callable[[int, int], None] | None = None
) -> ArchitectureReport:
    """Decode a tiny random model of each architecture through three caches, and compare with no cache.

    Args:
        names: class names or model types; None: every architecture of the installed transformers.
        on_row: called with the rows done and the rows there are.
    """
    wanted = set(names) if names is not None else None
    n_rows = sum(wanted is None or bool({a.name, a.model_type} & wanted) for a in architectures())
    done = 0

    def count(row: Row) -> None:
        nonlocal done
        done += 1
        if on_row is not None:
            on_row(done, n_rows)

    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are so small that threads only wait for one another
    try:
        columns = {"dynamic_cache": dynamic_cache_factory, "gathered": _our_cache, "attached": _our_cache}
        rows = survey(columns, wanted, count, {"attached": _attach})
    finally:
        torch.set_num_threads(n_threads)
    return ArchitectureReport(tuple(map(architecture_row, rows)), transformers.__version__, torch.__version__)


def markdown(report: ArchitectureReport, chosen: str = "all") -> str:
    """The report as a page of the documentation; `chosen` is what `--architectures` was."""
    lines = [
        "# Architectures",
        "",
        f"Made by `stratakv verify --architectures {chosen} --write-docs PATH` with transformers "
        f"{report.transformers_version} and torch {report.torch_version}.",
        "Every row is a tiny model of that class with random weights, in float32 on the CPU. 24 tokens go through it",
        "whole and without a cache, then through each cache cut in three ways and, where the model can pad, in a",
        "padded batch; every logit has to agree. `gathered` is a `KVCache` under the model's own attention,",
        "`attached` the same after `stratakv.attach(model)`, `dynamic cache` is transformers' own. `refused` is an",
        "`UnsupportedError` or a `StateError` that says why, before anything wrong comes out; `-` means that there was",
        "nothing to compare.",
        "",
        "| | pass | refused | fail | - |",
        "|---|---:|---:|---:|---:|",
        *(f"| {_title(column)} | {' | '.join(map(str, n.values()))} |" for column, n in report.counts.items()),
        "",
        "| Class | Model type | gathered | attached | dynamic cache | Reason |",
        "|---|---|---|---|---|---|",
    ]
    for row in report.rows:
        statuses = " | ".join(getattr(row, column) or "-" for column in COLUMNS)
        reason = row.reason.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| {row.name} | {row.model_type} | {statuses} | {reason} |")
    return "\n".join(lines) + "\n"


def _our_cache(model: Any) -> Any:
    return KVCache.for_model(model, block_tokens=BLOCK_TOKENS, poison=True)


def _attach(tiny: TinyModel, model: Any) -> object:
    return attach(model, probe_inputs=tiny.inputs(PROBE_TOKENS) if tiny.is_encoder_decoder else None)


def architecture_row(row: Row) -> ArchitectureRow:
    """What became of one architecture of a survey over `COLUMNS`."""
    found = {column: row.results.get(column) for column in COLUMNS}
    reason = _joined(found) if row.results else row.note
    gathered, attached, dynamic = (None if outcome is None else outcome.status for outcome in found.values())
    excused = found["dynamic_cache"].failed_feeds if found["dynamic_cache"] else frozenset()
    is_wrong = any(outcome.failed_feeds - excused for outcome in map(found.get, OURS) if outcome is not None)
    return ArchitectureRow(row.name, row.model_type, gathered, attached, dynamic, reason, is_wrong)


def _joined(found: dict[str, Outcome | None]) -> str:
    """The reasons of the columns; one that several share is said once."""
    columns: dict[str, list[str]] = {}
    for column, outcome in found.items():
        if outcome is not None and outcome.reason:
            columns.setdefault(outcome.reason, []).append(_title(column))
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in columns.items())


def _title(column: str) -> str:
    return column.replace("_", " ")


def headline(rows: Sequence[ArchitectureRow]) -> str:
    """How many rows there are and how many are wrong, as a sentence."""
    if all(row.gathered is None for row in rows):
        return f"{len(rows)} architectures; none of them could be compared"
    n_wrong = sum(row.is_wrong for row in rows)
    return f"{len(rows)} architectures; ours fails where transformers' own cache does not in {n_wrong}"
