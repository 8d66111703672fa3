"""`stratakv bench fidelity`: what each format costs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import typer

from stratakv.cli import options
from stratakv.cli.tables import print_tables

DEFAULT_FORMATS = "bf16,int8,int4,int2"


def fidelity(
    *,
    model: options.Model = "smollm2",
    formats: Annotated[str, typer.Option(help=f"{', '.join(options.FORMATS)}, with commas between.")] = DEFAULT_FORMATS,
    texts: Annotated[str, typer.Option(help=f"{', '.join(options.TEXTS)}, with commas between.")] = "prose",
    tokens: Annotated[int, typer.Option(min=2, max=1 << 20, help="Tokens in a window of text.")] = 2048,
    windows: Annotated[int, typer.Option(min=1, max=64, help="Windows, side by side.")] = 2,
    prefilled: Annotated[int, typer.Option(min=1, help="Tokens of a window that are fed at once, unscored.")] = 256,
    gathered: Annotated[bool, typer.Option("--gathered", help="Leave attention to the model's own function.")] = False,
    report: options.JsonFile = None,
) -> None:
    """Measure what each format costs, token by token, against no cache: KL divergence, top-1, perplexity, bytes."""
    names = _choices("--formats", formats, options.FORMATS)
    text_names = _choices("--texts", texts, options.TEXTS)
    options.check_report(report)

    import torch

    from stratakv.bench.fidelity import run_fidelity
    from stratakv.bench.report import fidelity_table
    from stratakv.integrations.transformers import attach
    from stratakv.models import load, terminal_progress

    with terminal_progress() as progress:
        loaded = load(model, dtype=torch.float32, progress=progress)
        if not gathered:
            attach(loaded.model)
        found = run_fidelity(
            loaded.model,
            loaded.tokenizer,
            names,
            name=loaded.name,
            texts=text_names,
            n_tokens=tokens,
            n_windows=windows,
            prefilled=prefilled,
            is_attached=not gathered,
            progress=progress,
        )
    if report is not None:
        options.write_report(report, found.to_dict())
        if str(report) == "-":
            return
    print_tables(fidelity_table(found))


def _choices(option: str, value: str, accepted: Iterable[str]) -> list[str]:
    names = list(dict.fromkeys(part.strip() for part in value.split(",")))
    for name in names:
        options.check_choice(option, name, accepted)
    return names
