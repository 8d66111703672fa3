"""Reports as tables for a terminal."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from stratakv.bench.fit import PowerFit
from stratakv.bench.samples import Timing
from stratakv.bench.scaling import ScalingReport
from stratakv.units import format_bytes


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


def _exponent(fit: PowerFit) -> str:
    if fit.is_flat:
        return "0 (no growth beyond noise)"
    return f"{fit.exponent:.2f} ({fit.low:.2f} to {fit.high:.2f})"
