"""The JSON of a run as a page of markdown."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BUSY = 0.02  # processors that an idle worker may keep busy before the page says so
NUMBERS = (  # what is said above a table, where its numbers stand in the JSON, how they are printed
    ("Prefill, tokens a second, by tokens of the prompt:", "lengths", "prefill_tokens_per_second", "{:,.0f}"),
    ("Decode, ms a token, by tokens of the prompt:", "lengths", "decode_ms_per_token", "{:.1f}"),
    (
        "Batches, output tokens a second, by requests at once:",
        "batches",
        "output_tokens_per_second",
        "{:,.0f}",
    ),
)


def markdown(document: dict[str, Any]) -> str:
    """Tables of medians with their spread, then what is missing and why."""
    settings, peers = document["settings"], document["peers"]
    parts = [_head(document)]
    if not document["complete"]:
        parts.append("**The run had not ended when this was written.**")
    for title, kind, name, form in NUMBERS:
        if keys := settings[kind]:
            rows = {peer: _numbers(cells[kind], keys, name, form) for peer, cells in peers.items()}
            parts += [title, _table([f"{key:,}" for key in keys], peers, rows)]
    parts += [_versions(peers), *_notes(peers)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(document: dict[str, Any]) -> str:
    machine, settings = document["machine"], document["settings"]
    read = [entry["bytes_per_second"] / 1e9 for entry in document["bandwidth"]]
    sentences = [
        f"{machine['cpu']}, {machine['cores']} cores, {settings['threads']} threads, load {machine['load']} at the "
        f"start; {machine['system']}; commit {document['commit']}.",
        f"Median (smallest to largest) of {settings['rounds']} rounds of {settings['decode_steps']} steps; batches of "
        f"{settings['batch_prompt_tokens']}-token prompts continued by {settings['batch_new_tokens']}.",
    ]
    if read:
        ends = f"{min(read):.1f} to {max(read):.1f}"
        sentences.append(f"Read bandwidth, before each round: {statistics.median(read):.1f} GB/s ({ends}).")
    return " ".join(sentences)


def _table(headings: Sequence[str], peers: dict[str, Any], rows: dict[str, list[str]]) -> str:
    lines = [
        "| " + " | ".join(["peer", "weights / KV", *headings]) + " |",
        "| --- | --- |" + " ---: |" * len(headings),
    ]
    for name, peer in peers.items():
        if peer["missing"] is None:
            lines.append("| " + " | ".join([name, f"{peer['weights']} / {peer['kv']}", *rows[name]]) + " |")
    return "\n".join(lines)


def _numbers(cells: dict[str, Any], keys: Sequence[int], name: str, form: str) -> list[str]:
    found = []
    for key in keys:
        number = cells.get(str(key), {}).get(name)
        if number is None:
            found.append("-")
            continue
        median, smallest, largest = (form.format(number[end]) for end in ("median", "smallest", "largest"))
        found.append(median if len(number["samples"]) == 1 else f"{median} ({smallest} to {largest})")
    return found


def _versions(peers: dict[str, Any]) -> str:
    lines = []
    for name, peer in peers.items():
        if peer["versions"]:
            memory = f"; at most {peer['peak_bytes'] / 1e9:.2f} GB of memory" if peer["peak_bytes"] else ""
            lines.append(f"- {name}: " + ", ".join(f"{k} {v}" for k, v in peer["versions"].items()) + memory)
    return "\n".join(lines)


def _notes(peers: dict[str, Any]) -> list[str]:
    gaps: dict[tuple[str, str], list[str]] = {}
    for name, peer in peers.items():
        for kind, noun in (("lengths", "tokens"), ("batches", "requests")):
            for key, cell in peer[kind].items():
                if cell["reason"] is not None and peer["missing"] is None:
                    gaps.setdefault((name, cell["reason"]), []).append(f"{key} {noun}")
    notes = {
        "Missing:": [f"{name}: {peer['missing']}" for name, peer in peers.items() if peer["missing"] is not None],
        "Not measured, or not in every round:": [
            f"{name}, {', '.join(where)}: {reason}" for (name, reason), where in gaps.items()
        ],
        "First token unlike most others', which rounding can do and a mistake too:": _other_tokens(peers),
        "Processors that it kept busy while others were measured:": [
            f"{name}: {peer['idle_cpu']:.2f}" for name, peer in peers.items() if (peer["idle_cpu"] or 0) > BUSY
        ],
    }
    return ["\n".join([title, "", *(f"- {line}" for line in lines)]) for title, lines in notes.items() if lines]


def _other_tokens(peers: dict[str, Any]) -> list[str]:
    """Peers whose first tokens at some length or batch are not what most peers say."""
    found: dict[str, list[str]] = {}
    for kind, noun in (("lengths", "tokens"), ("batches", "requests")):
        keys = dict.fromkeys(key for peer in peers.values() for key in peer[kind])
        for key in keys:
            said = {
                name: tuple(cell["first_tokens"]) if kind == "batches" else cell["first_tokens"][0]
                for name, peer in peers.items()
                if (cell := peer[kind].get(key)) is not None and cell["first_tokens"]
            }
            if said:
                usual = statistics.mode(said.values())
                for name, tokens in said.items():
                    if tokens != usual:
                        found.setdefault(name, []).append(f"{key} {noun}{_share(tokens, usual)}")
    return [f"{name}: {', '.join(where)}" for name, where in found.items()]


def _share(tokens: Any, usual: Any) -> str:
    if not isinstance(tokens, tuple):
        return ""
    return f" ({sum(a != b for a, b in zip(tokens, usual, strict=True))} of {len(usual)})"


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
