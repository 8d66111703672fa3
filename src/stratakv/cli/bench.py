"""`stratakv bench ...`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from stratakv.cli import options
from stratakv.cli.failures import FAILED
from stratakv.cli.tables import print_tables
from stratakv.errors import ConfigurationError

DEFAULT_LENGTHS = "128,256,512,1024,2048,4096"
MIN_LENGTHS = 4  # the fit has three parameters
SHAPES = ("smollm2", "llama-8b")  # named here, so that an error does not wait for torch; a test compares them


def scaling(
    *,
    model: options.Model = "smollm2",
    lengths: Annotated[str, typer.Option(help="Tokens in the cache, with commas between.")] = DEFAULT_LENGTHS,
    layout: Annotated[str, typer.Option(help=f"Time this layout: {', '.join(options.LAYOUTS)}, or all.")] = "paged",
    format: options.Format = None,
    block_tokens: options.BlockTokens = 64,
    repeats: Annotated[int, typer.Option(min=1, max=1000, help="Most rounds on each of two visits to a length.")] = 3,
    dtype: options.Dtype = "fp32",
    as_json: options.Json = False,
) -> None:
    """Measure how the cost of one token grows with length, with the cache and without.

    Also counts the bytes that each layout copies while it grows. Exits with 1 where a target was missed beyond noise.
    """
    chosen = parse_lengths(lengths)
    options.check_choice("--format", format, options.FORMATS)
    options.check_choice("--layout", layout, (*options.LAYOUTS, "all"))
    options.check_positive("--block-tokens", block_tokens)
    options.check_choice("--dtype", dtype, options.DTYPES)

    from stratakv.bench.report import scaling_tables
    from stratakv.bench.scaling import ScalingOptions, check_lengths, run_scaling
    from stratakv.bench.texts import topics_token_ids
    from stratakv.models import load, terminal_progress

    with terminal_progress() as progress:
        loaded = load(model, dtype=options.torch_dtype(dtype), progress=progress)
        check_lengths(loaded.model, chosen)
        token_ids = topics_token_ids(loaded.tokenizer, chosen[-1] + 1)
        settings = ScalingOptions(
            chosen, options.LAYOUTS if layout == "all" else (layout,), format, block_tokens, repeats
        )
        report = run_scaling(loaded.model, token_ids, settings, name=loaded.name, progress=progress)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        print_tables(*scaling_tables(report))
    if "missed" in report.targets.values():
        raise typer.Exit(FAILED)


def attention(
    *,
    shapes: Annotated[
        str, typer.Option(help=f"Heads of a layer: {', '.join(SHAPES)}, with commas between.")
    ] = "smollm2",
    formats: Annotated[str, typer.Option(help=f"{', '.join(options.FORMATS)}, with commas between.")] = "fp16,bf16",
    lengths: Annotated[str, typer.Option(help="Tokens in the cache, with commas between.")] = "4096,16384,65536",
    block_tokens: options.BlockTokens = 64,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds, of which the median counts.")] = 7,
    report: options.JsonFile = None,
) -> None:
    """Measure decode attention over pages against the read bandwidth, and against torch over plain tensors."""
    chosen = parse_lengths(lengths, at_least=1)
    names, stored = (list(dict.fromkeys(part.strip() for part in text.split(","))) for text in (shapes, formats))
    for name in names:
        options.check_choice("--shapes", name, SHAPES)
    for name in stored:
        options.check_choice("--formats", name, options.FORMATS)
    options.check_positive("--block-tokens", block_tokens)
    options.check_report(report)

    from stratakv.bench import attention as measured
    from stratakv.bench.report import attention_table
    from stratakv.models import terminal_progress

    with terminal_progress() as progress:
        found = measured.run_attention(
            [measured.SHAPES[name] for name in names],
            stored,
            chosen,
            rounds=rounds,
            block_tokens=block_tokens,
            progress=progress,
        )
    if report is not None:
        options.write_report(report, found.to_dict())
        if str(report) == "-":
            return
    print_tables(attention_table(found))


def parse_lengths(text: str, at_least: int = MIN_LENGTHS, option: str = "--lengths") -> tuple[int, ...]:
    """The numbers in `text`, sorted, each once.

    Raises:
        ConfigurationError: it holds something else than numbers of tokens, or fewer than `at_least` of them.
    """
    try:
        lengths = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise ConfigurationError(f"{option} takes numbers with commas between, got {text!r}") from None
    if lengths[0] < 1:
        raise ConfigurationError(f"{option} must be at least 1, got {lengths[0]}")
    if len(lengths) < at_least:
        raise ConfigurationError(f"{option} needs at least {at_least} different lengths for the fit, got {text!r}")
    return lengths
