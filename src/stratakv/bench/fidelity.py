"""What each format costs in fidelity, and gives back in bytes: one model, texts from what is installed anyway."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stratakv.bench.machine import Machine
from stratakv.bench.texts import Text, get_text
from stratakv.errors import ConfigurationError
from stratakv.integrations.transformers.compat import PreTrainedModel
from stratakv.models import Progress, SilentProgress
from stratakv.units import whole
from stratakv.verification import FidelityReport, fidelity

SCHEMA = "stratakv.bench.fidelity/2"


@dataclass(frozen=True)
class TextReports:
    """What was measured on one text.

    Attributes:
        name: of the text.
        source: what the text is part of, with its version.
        reports: one for each format.
    """

    name: str
    source: str
    reports: tuple[FidelityReport, ...]


@dataclass(frozen=True)
class FidelityTable:
    """All of one run. As JSON (`to_dict`):

    schema    "stratakv.bench.fidelity/2"
    machine   cpu, cores, threads, load, system, python, torch, transformers, stratakv
    model     its name
    settings  tokens of a window, windows, prefilled tokens, whether the model was attached
    texts     a list of {name, source, formats}: the text's name ("prose", "code", "french"), what it is part of, and
              a list of `stratakv.FidelityReport` as JSON. Version 1 had the latter at the top, of "prose"
    """

    machine: Machine
    model: str
    n_tokens: int
    n_windows: int
    prefilled: int
    is_attached: bool
    texts: tuple[TextReports, ...]

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
            "texts": [
                {"name": text.name, "source": text.source, "formats": [report.to_dict() for report in text.reports]}
                for text in self.texts
            ],
        }


def run_fidelity(
    model: PreTrainedModel,
    tokenizer: Any,
    formats: Sequence[str],
    *,
    name: str,
    texts: Sequence[str],
    n_tokens: int,
    n_windows: int,
    prefilled: int,
    is_attached: bool,
    progress: Progress | None = None,
) -> FidelityTable:
    """Measure each of `formats` on the same windows of each of `texts`.

    Raises:
        ConfigurationError: not more tokens than `prefilled`, more than there is text, or a text that is not there.
    """
    n_tokens, n_windows = whole("tokens", n_tokens), whole("windows", n_windows)
    if n_windows < 1 or n_tokens <= prefilled:
        raise ConfigurationError(f"a window has more than the {prefilled} tokens that are prefilled, got {n_tokens}")
    machine = Machine.here()
    found = [get_text(text) for text in texts]
    windows = [text_windows(text, tokenizer, n_windows, n_tokens) for text in found]
    reporter = progress or SilentProgress()
    measured = []
    for text, ids in zip(found, windows, strict=True):
        reports = []
        for format_name in formats:
            reporter.stage(f"{text.name}, {format_name}, {n_windows} windows of {n_tokens:,} tokens")
            reports.append(fidelity(model, ids, prefilled=prefilled, format=format_name, on_step=reporter.advance))
        measured.append(TextReports(text.name, text.source, tuple(reports)))
    return FidelityTable(machine, name, n_tokens, n_windows, prefilled, is_attached, tuple(measured))


def text_windows(text: Text, tokenizer: Any, n_windows: int, n_tokens: int) -> Tensor:
    """The first windows of a text, one after the other: token ids, int64 `[n_windows, n_tokens]`.

    Raises:
        ConfigurationError: there are more tokens in them than in the text.
    """
    ids = text.token_ids(tokenizer, n_windows * n_tokens)
    return torch.tensor(ids, device="cpu").view(n_windows, n_tokens)
