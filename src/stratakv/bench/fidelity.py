"""What each format costs in fidelity, and gives back in bytes: one model, texts from what is installed anyway."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stratakv.bench.machine import Machine
from stratakv.bench.texts import topics_token_ids
from stratakv.errors import ConfigurationError
from stratakv.integrations.transformers.compat import PreTrainedModel
from stratakv.models import Progress, SilentProgress
from stratakv.units import whole
from stratakv.verification import FidelityReport, fidelity

SCHEMA = "stratakv.bench.fidelity/1"


@dataclass(frozen=True)
class FidelityTable:
    """All of one run. As JSON (`to_dict`):

    schema    "stratakv.bench.fidelity/1"
    machine   cpu, cores, threads, load, system, python, torch, transformers, stratakv
    model     its name
    settings  tokens of a window, windows, prefilled tokens, whether the model was attached
    formats   a list of `stratakv.FidelityReport` as JSON
    """

    machine: Machine
    model: str
    n_tokens: int
    n_windows: int
    prefilled: int
    is_attached: bool
    reports: tuple[FidelityReport, ...]

    def to_dict(self) -> dict[str, Any]:
        """The JSON that the class describes."""
        return {
            "schema": SCHEMA,
            "machine": self.machine.to_dict(),
            "model": self.model,
            "settings": {
                "tokens": self.n_tokens,
                "windows": self.n_windows,
                "prefilled": self.prefilled,
                "attached": self.is_attached,
            },
            "formats": [report.to_dict() for report in self.reports],
        }


def run_fidelity(
    model: PreTrainedModel,
    tokenizer: Any,
    formats: Sequence[str],
    *,
    name: str,
    n_tokens: int,
    n_windows: int,
    prefilled: int,
    is_attached: bool,
    progress: Progress | None = None,
) -> FidelityTable:
    """Measure each of `formats` on the same windows of English prose.

    Raises:
        ConfigurationError: not more tokens than `prefilled`, or more than there is text.
    """
    n_tokens, n_windows = whole("tokens", n_tokens), whole("windows", n_windows)
    if n_windows < 1 or n_tokens <= prefilled:
        raise ConfigurationError(f"a window has more than the {prefilled} tokens that are prefilled, got {n_tokens}")
    machine = Machine.here()
    ids = torch.tensor(topics_token_ids(tokenizer, n_windows * n_tokens), device="cpu").view(n_windows, n_tokens)
    reporter = progress or SilentProgress()
    reports = []
    for format_name in formats:
        reporter.stage(f"{format_name}, {n_windows} windows of {n_tokens:,} tokens")
        reports.append(fidelity(model, ids, prefilled=prefilled, format=format_name, on_step=reporter.advance))
    return FidelityTable(machine, name, n_tokens, n_windows, prefilled, is_attached, tuple(reports))
