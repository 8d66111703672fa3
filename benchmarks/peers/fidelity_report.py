"""The JSON of `fidelity` as tables in markdown."""

from __future__ import annotations

from typing import Any

TITLES = ("", "KV", "KL", "99 %", "top-1", "perplexity", "bytes a token", "ms a step")


def markdown(document: dict[str, Any]) -> str:
    """A table for each text, the versions, and why a row is missing."""
    machine, settings = document["machine"], document["settings"]
    lines = [
        f"Fidelity on {machine['cpu']}, {machine['cores']} cores, {settings['threads']} threads, "
        f"commit {document['commit']}" + ("" if document["complete"] else ", not complete"),
        "",
        "SmolLM2-135M-Instruct with weights and compute in fp32. Windows of "
        f"{settings['tokens']:,} tokens, {settings['windows']} of each text: {settings['prefilled']} at once, then one "
        "at a time, and scored from there on against the same program with a cache in fp32.",
    ]
    versions: dict[str, None] = {}  # in order, each once
    for text in document["texts"]:
        lines += ["", f"{text['name'].capitalize()} ({text['source']}):", ""]
        lines += [_line(TITLES), "| --- | --- |" + " ---: |" * (len(TITLES) - 2)]
        lines += [_line(_cells(row)) for row in text["rows"] if row["missing"] is None]
        gone = [f"- {row['name']}: {row['missing']}" for row in text["rows"] if row["missing"] is not None]
        lines += ["", "Not measured:", "", *gone] if gone else []
        for row in text["rows"]:
            versions.setdefault(", ".join(f"{name} {value}" for name, value in row["versions"].items()))
    lines += ["", *(f"- {version}" for version in versions if version)]
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    scores = row["scores"]
    change = scores["perplexity"] / scores["exact_perplexity"] - 1
    return (
        row["name"],
        row["kv"],
        f"{scores['kl']:.2e}",
        f"{scores['kl_p99']:.2e}",
        f"{scores['top1']:.4f}",
        f"{scores['perplexity']:.3f} ({change:+.2%})",
        f"{row['bytes_per_token']:,.0f}",
        f"{row['seconds_per_token'] * 1e3:.1f}",
    )


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"
