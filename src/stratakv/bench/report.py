"""Reports as tables for a terminal."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from stratakv.bench.attention import AttentionReport
from stratakv.bench.fidelity import FidelityTable
from stratakv.bench.fit import PowerFit
from stratakv.bench.samples import Timing
from stratakv.bench.scaling import ScalingReport
from stratakv.bench.speed import SpeedReport
from stratakv.units import format_bytes
from stratakv.verification import FidelityReport


def scaling_tables(report: ScalingReport) -> list[Table | Text]:
    """What `bench scaling` prints, part by part."""
    machine = report.machine
    head = (
        f"{report.model['name']}, computing in {report.model['dtype']}, storing {report.model['format']}; "
        f"{machine.cpu}, {machine.cores} cores, {machine.threads} threads, load {machine.load}; "
        f"torch {machine.torch}, transformers {machine.transformers}, stratakv {machine.stratakv}"
    )
    verdicts = [f"{verdict}: {name.replace('_', ' ')}" for name, verdict in report.targets.items()]
    return [Text(head), _costs(report), _copies(report), Text("\n".join(verdicts))]


def attention_table(report: AttentionReport) -> Table:
    """What `bench attention` prints."""
    machine = report.machine
    table = Table(
        title=f"Decode attention, {report.isa}; {machine.cpu}, {machine.threads} threads, load {machine.load}"
    )
    for heading in (
        "shape",
        "format",
        "tokens",
        "paged, ms",
        "torch, ms",
        "speedup",
        "GB/s",
        "read, GB/s",
        "share",
        "of first",
    ):
        table.add_column(heading, justify="left" if heading in ("shape", "format") else "right")
    for p in report.points:
        paged, sdpa = (
            f"{c.median * 1e3:.3f} ({c.smallest * 1e3:.3f} to {c.largest * 1e3:.3f})" for c in (p.paged, p.sdpa)
        )
        bandwidth = p.bytes_read / p.paged.median / 1e9
        read = f"{p.read_bandwidth / 1e9:.1f}"
        numbers = f"{p.speedup:.1f}", f"{bandwidth:.1f}", read, f"{p.share:.0%}", f"{p.of_first:.2f}"
        table.add_row(p.shape.name, p.format, f"{p.n_tokens:,}", paged, sdpa, *numbers)
    table.caption = _growth(report.growth)
    return table


def fidelity_table(report: FidelityTable) -> Table:
    """What `bench fidelity` prints."""
    way = "attached" if report.is_attached else "gathered"
    table = Table(
        title=f"Fidelity: {report.model}, {way}; {report.n_windows} windows of {report.n_tokens:,} tokens, "
        f"{report.prefilled} of them prefilled"
    )
    for heading in ("text", "format"):
        table.add_column(heading)
    for heading in ("KL", "99 %", "top-1", "perplexity", "heads off by", "bytes a token", "one more", "ms a step"):
        table.add_column(heading, justify="right")
    for text in report.texts:
        for r in text.reports:
            table.add_row(text.name, *_fidelity_cells(r))
        table.add_section()
    return table


def speed_table(report: SpeedReport) -> Table:
    """What `bench decode`, `prefill` and `batch` print."""
    machine, settings = report.machine, report.settings
    about = ", ".join(report.model.values())
    table = Table(title=f"{settings.kind}: {about}; {machine.cpu}, {machine.threads} threads, load {machine.load}")
    rate = "ms a token" if settings.kind == "decode" else "tokens/s"
    for heading in ("requests" if settings.kind == "batch" else "tokens", "subject", rate, "spread", "floor"):
        table.add_column(heading, justify="left" if heading == "subject" else "right")
    for p in report.points:
        seconds = [p.median, min(p.seconds), max(p.seconds), p.floor_seconds]
        if settings.kind == "decode":
            shown = [None if s is None else s * 1e3 for s in seconds]
        else:
            n = p.size * settings.steps if settings.kind == "batch" else p.size
            shown = [None if s is None else n / s for s in seconds]
        middle, low, high, floor = ("" if value is None else f"{value:,.1f}" for value in shown)
        table.add_row(f"{p.size:,}", p.subject, middle, f"{low} to {high}", floor)
    table.caption = _growth(report.growth)
    return table


def _fidelity_cells(r: FidelityReport) -> tuple[str, ...]:
    heads = [error for layer in r.output_errors for error in layer]
    return (
        r.k_format if r.k_format == r.v_format else f"{r.k_format}/{r.v_format}",
        f"{r.kl:.2e}",
        f"{r.kl_p99:.2e}",
        f"{r.top1:.4f}",
        f"{r.perplexity:.3f} ({r.perplexity_change:+.2%})",
        f"{sum(heads) / len(heads):.2%}" if heads else "-",
        f"{r.bytes_per_token:,.0f}",
        f"{r.marginal_bytes_per_token:,}",
        f"{r.seconds_per_token * 1e3:.1f}",
    )


def _costs(report: ScalingReport) -> Table:
    table = Table(title="Cost of one token: median (smallest to largest), in ms")
    table.add_column("tokens", justify="right")
    curves = {**{f"cached, {layout}": curve for layout, curve in report.cached.items()}, "uncached": report.uncached}
    for name in curves:
        table.add_column(name, justify="right")
    for row, length in enumerate(report.settings.lengths):
        table.add_row(f"{length:,}", *(_milliseconds(curve.timings[row]) for curve in curves.values()))
    table.add_section()
    table.add_row("exponent", *(_exponent(curve.fit) for curve in curves.values()))
    table.add_row("intercept", *(f"{curve.fit.intercept * 1e3:.1f}" for curve in curves.values()))
    return table


def _copies(report: ScalingReport) -> Table:
    table = Table(title="Bytes copied by growth (share of the rows), and waste")
    table.add_column("tokens", justify="right")
    for layout in report.growth:
        table.add_column(layout, justify="right")
    for row, length in enumerate(report.settings.lengths):
        points = [points[row] for points in report.growth.values()]
        table.add_row(
            f"{length:,}",
            *(f"{format_bytes(g.bytes_copied)} ({g.bytes_copied / g.row_bytes:.2f}), {g.waste:.0%}" for g in points),
        )
    return table


def _milliseconds(timing: Timing) -> str:
    return f"{timing.median * 1e3:.1f} ({timing.smallest * 1e3:.1f} to {timing.largest * 1e3:.1f})"


def _growth(fits: dict[str, PowerFit]) -> str | None:
    """A line for each: the exponent of the growth with length."""
    return "\n".join(f"{name}: grows with the power {_exponent(fit)} of length" for name, fit in fits.items()) or None


def _exponent(fit: PowerFit) -> str:
    if fit.is_flat:
        return "0 (no growth beyond noise)"
    return f"{fit.exponent:.2f} ({fit.low:.2f} to {fit.high:.2f})"
