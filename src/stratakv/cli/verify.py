"""`stratakv verify`: hold the cache against runs without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stratakv.cli import options
from stratakv.cli.failures import FAILED
from stratakv.cli.tables import print_tables
from stratakv.errors import ConfigurationError

if TYPE_CHECKING:
    from rich.table import Table

    from stratakv.verification import VerifyReport
    from stratakv.verification.architectures import ArchitectureReport


def verify(
    context: typer.Context,
    *,
    model: options.Model = "smollm2",
    layout: options.Layout = "paged",
    format: options.Format = None,
    block_tokens: options.BlockTokens = 64,
    tokens: Annotated[int, typer.Option(help="Tokens to feed, in several cuts.")] = 96,
    attach: Annotated[bool, typer.Option("--attach", help="Compute attention with our function.")] = False,
    dtype: options.Dtype = "fp32",
    architectures: Annotated[
        str | None,
        typer.Option(help="Instead of one model, tiny ones of these transformers architectures: all, or NAME,NAME."),
    ] = None,
    write_docs: Annotated[
        Path | None, typer.Option(help="With --architectures: a Markdown file to write the table to.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Prove that what comes out of the cache is right.

    Exits with 0 where it is and with 1 where it is not.
    """
    options.check_choice("--format", format, options.FORMATS)
    options.check_choice("--layout", layout, options.LAYOUTS)
    options.check_choice("--dtype", dtype, options.DTYPES)
    if architectures is not None:
        options.refuse_given(
            context,
            "--architectures runs models of its own, attached and not, in every way",
            ("model", "layout", "format", "block_tokens", "tokens", "attach", "dtype"),
        )
        passed = _verify_architectures(architectures, write_docs, as_json=as_json)
    else:
        if write_docs is not None:
            raise ConfigurationError("--write-docs needs --architectures")
        options.check_positive("--tokens", tokens)
        options.check_block_tokens(context, block_tokens, layout)
        passed = _verify_model(model, layout, format, block_tokens, tokens, dtype, attach=attach, as_json=as_json)
    if not passed:
        raise typer.Exit(FAILED)


def _verify_model(
    name: str,
    layout: str,
    format: str | None,
    block_tokens: int,
    n_tokens: int,
    dtype: str,
    *,
    attach: bool,
    as_json: bool,
) -> bool:
    from stratakv.bench.texts import topics_token_ids
    from stratakv.integrations.transformers import attach as attach_to
    from stratakv.models import load, terminal_progress
    from stratakv.verification import verify as verify_cache
    from stratakv.verification.cuts import SPARE_TOKENS

    with terminal_progress() as progress:
        loaded = load(name, dtype=options.torch_dtype(dtype), progress=progress)
        token_ids = topics_token_ids(loaded.tokenizer, n_tokens)
        if attach:
            attach_to(loaded.model)
        report = verify_cache(
            loaded.model,
            token_ids,
            on_cut=progress.stage,
            format=format,
            layout=layout,
            block_tokens=block_tokens,
            capacity=n_tokens + SPARE_TOKENS if layout == "contiguous" else None,
        )
    if as_json:
        typer.echo(json.dumps(report.to_dict(), allow_nan=False))
    else:
        print_tables(_cuts(report, loaded.name))
        typer.echo("passed" if report.passed else "failed")
    return report.passed


def _verify_architectures(chosen: str, write_docs: Path | None, *, as_json: bool) -> bool:
    if write_docs is not None and (write_docs.is_dir() or not write_docs.parent.is_dir()):
        raise ConfigurationError(f"--write-docs: {write_docs} is not a file in a folder that exists")

    from stratakv.models import terminal_progress
    from stratakv.verification.architectures import chosen_names, headline, markdown, survey_architectures

    names = chosen_names(chosen)
    with terminal_progress() as progress:
        progress.stage("architectures")
        report = survey_architectures(names, progress.advance)
    if write_docs is not None:
        write_docs.write_text(markdown(report, chosen), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(report.to_dict(), allow_nan=False))
    else:
        print_tables(_rows(report), _counts(report))
        typer.echo(headline(report.rows))
    return report.passed


def _cuts(report: VerifyReport, name: str) -> Table:
    from rich.table import Table

    stored = report.k_format if report.k_format == report.v_format else f"{report.k_format}/{report.v_format}"
    attention = "our attention" if report.attached else "the model's attention"
    table = Table(title=f"{name}: {report.n_tokens} tokens, {report.layout}, {stored}, {attention}")
    table.add_column("cut", no_wrap=True)
    table.add_column("result", no_wrap=True)
    for heading in ("max abs", "KL", "top-1"):
        table.add_column(heading, justify="right")
    table.add_column("first divergence")
    for cut in report.cuts:
        if cut.max_abs is None or cut.kl is None or cut.top1 is None:
            table.add_row(cut.name, "refused" if cut.refused else "fail", "", "", "", cut.refused or cut.raised)
            continue
        where = ""
        if (found := cut.first_divergence) is not None:
            layer = "the logits" if found.layer is None else f"layer {found.layer}"
            where = f"token {found.token}, {layer}, {found.error:.3g} times the tolerance"
        result = "pass" if cut.passed else "fail"
        table.add_row(cut.name, result, f"{cut.max_abs:.2e}", f"{cut.kl:.2e}", f"{cut.top1:.2%}", where)
    return table


def _rows(report: ArchitectureReport) -> Table:
    from rich.table import Table

    from stratakv.verification.architectures import COLUMNS

    table = Table(title=f"Architectures of transformers {report.transformers_version}")
    for heading in ("class", "model type", *COLUMNS, "reason"):
        table.add_column(heading.replace("_", " "))
    for row in report.rows:
        table.add_row(row.name, row.model_type, *(getattr(row, column) or "-" for column in COLUMNS), row.reason)
    return table


def _counts(report: ArchitectureReport) -> Table:
    from rich.table import Table

    table = Table(title="Counts")
    table.add_column("cache")
    for column, counted in report.counts.items():
        if len(table.columns) == 1:
            for status in counted:
                table.add_column(status, justify="right")
        table.add_row(column.replace("_", " "), *map(str, counted.values()))
    return table
