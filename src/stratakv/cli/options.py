"""Options that several commands share, and their checks. No torch here: a wrong argument is answered at once."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stratakv.errors import ConfigurationError

if TYPE_CHECKING:
    import torch

# Named here so that an error does not wait for torch to be imported; a test compares them with the library's own.
FORMATS = ("fp32", "bf16", "fp16", "fp8", "int8", "int4", "int2")
LAYOUTS = ("paged", "contiguous", "growing")
TEXTS = ("prose", "code", "french")
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

Model = Annotated[str, typer.Option(help="A known model (smollm2, gemma3-270m), a folder, or a .gguf file.")]
Format = Annotated[
    str | None,
    typer.Option(help=f"How keys and values are stored: {', '.join(FORMATS)}.", show_default="as the model computes"),
]
Residual = Annotated[
    int | None,
    typer.Option(
        min=0, help="How many of the last tokens stay in 16 bits beside fewer.", show_default="as the format needs"
    ),
]
Layout = Annotated[str, typer.Option(help=f"How the cache grows: {', '.join(LAYOUTS)}.")]
BlockTokens = Annotated[int, typer.Option(help="Tokens in a block, for the paged layout.")]
Dtype = Annotated[str, typer.Option(help=f"What the model computes in: {', '.join(DTYPES)}.")]
MaxNewTokens = Annotated[int, typer.Option(help="The most tokens to generate.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy.", show_default="greedy")]
TopP = Annotated[float | None, typer.Option(help="Sample from the likeliest tokens of this total probability.")]
Seed = Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Makes sampling repeatable.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write a report here as JSON; '-' prints it.")]


def check_choice(option: str, value: str | None, accepted: Iterable[str]) -> None:
    """Raise ConfigurationError where `value` is given and not among `accepted`."""
    if value is not None and value not in accepted:
        raise ConfigurationError(f"{option} {value!r} is not one of {', '.join(accepted)}")


def refuse_given(context: typer.Context, reason: str, names: Iterable[str]) -> None:
    """Raise ConfigurationError where one of the parameters `names` was given on the command line."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise ConfigurationError(f"{reason}; leave --{name.replace('_', '-')} out")


def check_positive(option: str, value: int) -> None:
    """Raise ConfigurationError where `value` is below 1."""
    if value < 1:
        raise ConfigurationError(f"{option} must be at least 1, got {value}")


def check_report(target: Path | None) -> None:
    """Raise ConfigurationError where a report could not be written to `target` after all the work for it."""
    if target is None or str(target) == "-":
        return
    try:
        if target.is_symlink() and not target.exists():
            return check_report(target.resolve())
        is_new = not target.exists()
        if is_new or target.is_file():
            target.open("a", encoding="utf-8").close()
        elif target.is_dir() or not os.access(target, os.W_OK):  # opening pipes and devices does something to them
            raise PermissionError("a folder" if target.is_dir() else "no permission")
        if is_new:
            target.unlink()
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigurationError(f"--json {target} cannot be written: {error}") from error


def write_report(target: Path, report: dict[str, Any]) -> None:
    """Write `report` as JSON into a file; '-' prints it."""
    text = json.dumps(report, indent=2)
    if str(target) == "-":
        typer.echo(text)
    else:
        target.write_text(text + "\n", encoding="utf-8")


def check_block_tokens(context: typer.Context, value: int, layout: str) -> None:
    """Raise ConfigurationError where --block-tokens is below 1, or given for a layout that has one block a sequence."""
    check_positive("--block-tokens", value)
    if layout != "paged":
        refuse_given(context, f"the {layout} layout has one block a sequence", ["block_tokens"])


def check_sampling(temperature: float | None, top_p: float | None) -> tuple[float, float]:
    """The temperature (0 for greedy) and the top-p (1 for all tokens) that the two options mean together.

    Raises:
        ConfigurationError: one is out of range, or they contradict each other.
    """
    if temperature is not None and not (math.isfinite(temperature) and temperature >= 0):
        raise ConfigurationError(f"--temperature must be a number of at least 0, got {temperature}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigurationError(f"--top-p must be above 0 and at most 1, got {top_p}")
    if top_p is not None and temperature == 0:
        raise ConfigurationError("--top-p samples and --temperature 0 is greedy; give one of the two")
    if temperature is None:
        temperature = 0.0 if top_p is None else 1.0
    return temperature, 1.0 if top_p is None else top_p


def torch_dtype(name: str) -> torch.dtype:
    """The dtype called `name`, which `check_choice` has seen."""
    import torch

    dtype = getattr(torch, DTYPES[name])
    assert isinstance(dtype, torch.dtype)
    return dtype
