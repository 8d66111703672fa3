"""`stratakv bench decode|prefill|batch`: whole models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stratakv.cli import options
from stratakv.cli.bench import parse_lengths
from stratakv.cli.tables import print_tables

SUBJECTS = ("native", "attached", "dynamic")  # named here, so that an error does not wait for torch
ALL = ",".join(SUBJECTS)

Lengths = Annotated[str, typer.Option(help="Prompt tokens, with commas between.")]
Who = Annotated[str, typer.Option("--subjects", help=f"Who takes turns: {ALL}, with commas between.")]
Dtype = Annotated[str, typer.Option(help=f"What the weights are in: {', '.join(options.DTYPES)}.")]
Format = Annotated[str, typer.Option(help=f"How our caches store keys and values: {', '.join(options.FORMATS)}.")]
Rounds = Annotated[int, typer.Option(min=1, max=1000, help="Rounds, of which the median counts.")]


def decode(
    *,
    model: options.Model = "smollm2",
    lengths: Lengths = "128,1024,4096",
    subjects: Who = "native",
    dtype: Dtype = "bf16",
    format: Format = "bf16",
    rounds: Rounds = 5,
    steps: Annotated[int, typer.Option(min=1, max=10000, help="Decode steps in each round.")] = 20,
    report: options.JsonFile = None,
) -> None:
    """Measure a decode step by length, against the time that memory needs for weights and cache."""
    _run("decode", model, parse_lengths(lengths, at_least=1), subjects, dtype, format, rounds, steps, report)


def prefill(
    *,
    model: options.Model = "smollm2",
    lengths: Lengths = "128,1024,4096",
    subjects: Who = "native",
    dtype: Dtype = "bf16",
    format: Format = "bf16",
    rounds: Rounds = 5,
    report: options.JsonFile = None,
) -> None:
    """Measure the reading of a prompt by length, against the processor's own rate of operations."""
    _run("prefill", model, parse_lengths(lengths, at_least=1), subjects, dtype, format, rounds, 1, report)


def batch(
    *,
    model: options.Model = "smollm2",
    requests: Annotated[str, typer.Option(help="Numbers of requests, with commas between.")] = "8,32",
    new_tokens: Annotated[int, typer.Option(min=1, max=10000, help="New tokens of each request.")] = 64,
    subjects: Who = "native",
    dtype: Dtype = "bf16",
    format: Format = "bf16",
    rounds: Rounds = 3,
    report: options.JsonFile = None,
) -> None:
    """Measure several requests of 128 tokens together, prompts included."""
    sizes = parse_lengths(requests, at_least=1, option="--requests")
    _run("batch", model, sizes, subjects, dtype, format, rounds, new_tokens, report)


def _run(
    kind: str,
    model: str,
    sizes: tuple[int, ...],
    subjects: str,
    dtype: str,
    format: str,
    rounds: int,
    steps: int,
    target: Path | None,
) -> None:
    names = list(dict.fromkeys(part.strip() for part in subjects.split(",")))
    for name in names:
        options.check_choice("--subjects", name, SUBJECTS)
    options.check_choice("--dtype", dtype, options.DTYPES)
    options.check_choice("--format", format, options.FORMATS)
    options.check_report(target)

    from stratakv.bench.report import speed_table
    from stratakv.bench.speed import SpeedOptions, run_speed
    from stratakv.bench.subjects import make_subject
    from stratakv.bench.texts import topics_token_ids
    from stratakv.models import load, terminal_progress

    settings = SpeedOptions(kind, sizes, rounds, steps)
    with terminal_progress() as progress:
        tokenizer = load(model, progress=progress).tokenizer
        needed = sizes[-1] * (settings.prompt_tokens if kind == "batch" else 1)
        token_ids = topics_token_ids(tokenizer, needed)
        made = [
            make_subject(
                name,
                lambda dtype: load(model, dtype=dtype, progress=progress).model,
                options.torch_dtype(dtype),
                format,
            )
            for name in names
        ]
        about = {"name": model, "dtype": dtype, "format": format}
        found = run_speed(made, token_ids, settings, about, progress)
    if target is not None:
        options.write_report(target, found.to_dict())
        if str(target) == "-":
            return
    print_tables(speed_table(found))
