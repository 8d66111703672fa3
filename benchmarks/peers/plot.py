"""The JSON of a run as a picture: medians as lines, the spread of the rounds as bars.

    python -m benchmarks.peers.plot FILE.json FILE.svg

Run in the venv `plots`, the only one with matplotlib.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
mpl.rcParams["svg.hashsalt"] = "stratakv"  # the same picture for the same numbers
from matplotlib import pyplot as plt  # noqa: E402  after the choice of a backend

MARKERS = "osD^v<>pPX*h"
OURS = "stratakv"


def draw(document: dict[str, Any], target: Path) -> None:
    """Prefill and decode over the length, and batches."""
    peers = {name: peer for name, peer in document["peers"].items() if peer["missing"] is None}
    styles = {name: _style(name, i) for i, name in enumerate(peers)}
    figure, (prefill, decode, batch) = plt.subplots(1, 3, figsize=(16, 5.5), layout="constrained")
    _lines(prefill, peers, styles, "lengths", "prefill_tokens_per_second")
    prefill.set(title="Prefill", xlabel="tokens of the prompt", ylabel="tokens a second (more is better)")
    _lines(decode, peers, styles, "lengths", "decode_ms_per_token")
    decode.set(title="Decode", xlabel="tokens of the prompt", ylabel="ms a token (less is better)")
    _lines(batch, peers, styles, "batches", "output_tokens_per_second")
    batch.set(title="Batches", xlabel="requests at once", ylabel="output tokens a second (more is better)")
    handles, labels = decode.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    machine = document["machine"]
    figure.suptitle(f"{machine['cpu']}, {document['settings']['threads']} threads: medians, smallest to largest")
    figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)


def _lines(axes: Any, peers: dict[str, Any], styles: dict[str, Any], kind: str, number: str) -> None:
    ticks: set[int] = set()
    for name, peer in peers.items():
        points = [(int(key), cell[number]) for key, cell in peer[kind].items() if cell[number] is not None]
        if not points:
            continue
        x, cells = zip(*points, strict=True)
        y = [cell["median"] for cell in cells]
        below = [cell["median"] - cell["smallest"] for cell in cells]
        above = [cell["largest"] - cell["median"] for cell in cells]
        axes.errorbar(x, y, yerr=[below, above], label=f"{name} ({peer['weights']} / {peer['kv']})", **styles[name])
        ticks.update(x)
    if not ticks:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
        return
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted(ticks), [f"{tick:,}" for tick in sorted(ticks)])
    axes.yaxis.set_major_formatter("{x:.4g}")
    axes.yaxis.set_minor_formatter("{x:.4g}")
    axes.tick_params(axis="y", which="minor", labelsize=7)
    axes.grid(visible=True, which="both", linewidth=0.4, alpha=0.5)


def _style(name: str, i: int) -> dict[str, Any]:
    ours = name.startswith(OURS)
    return {
        "color": plt.get_cmap("tab20")(i % 20),
        "marker": MARKERS[i % len(MARKERS)],
        "linewidth": 2.5 if ours else 1.2,
        "markersize": 7 if ours else 5,
        "capsize": 2,
    }


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
