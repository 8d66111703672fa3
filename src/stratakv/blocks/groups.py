"""Rows that are coded together: written as soon as there are enough of them."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from stratakv.blocks.memory import Memory
from stratakv.blocks.plans import Plans, Step
from stratakv.blocks.sequence import Sequence
from stratakv.plan import clip_runs, without_first


def write_groups(
    memory: Memory,
    plans: Plans,
    sequences: Seq[Sequence],
    step: Step,
    place: tuple[int, int],
    new: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Code the rows of one member that a step completes groups of, or none.

    Args:
        memory: which has room for the step's rows.
        plans: of the step.
        sequences: that take it.
        step: under way.
        place: the group and the member in it. Where the group's rows are in 16 bits elsewhere, the new ones are, too,
            and what is coded is what is held there, however many rows come at once.
        new: the new keys `[n_sequences, n_heads, n_tokens, k_dim]` and values `[..., v_dim]`, where they are not.
    """
    g, m = place
    plan = plans.write_groups(sequences, step, g)
    if plan is None:
        return
    table, recent = sequences[0].tables[g], memory.spec.recents.get(g)
    seen = sequences[0].seen_tokens
    start = without_first(table.runs, plan.row)[0][0]
    if recent is None:
        spans = {g: (start, seen)}
    else:  # those that were let go there before later ones were taken back are read where they are coded
        held = clip_runs(sequences[0].tables[recent].runs, start, seen + step.n_tokens)
        spans = {g: (start, held[-1][0]), recent: (held[-1][0], seen + step.n_tokens)}
    rows = [
        memory.arenas[held_by].read(m, plans.read_span(sequences, held_by, *span), torch.float32)
        for held_by, span in spans.items()
        if span[0] < span[1]
    ]
    if recent is None:
        assert new is not None
        rows.append(new)
    keys, values = rows[0] if len(rows) == 1 else (torch.cat(each, dim=2) for each in zip(*rows, strict=True))
    memory.arenas[g].write(m, plan, keys[:, :, : plan.n_tokens], values[:, :, : plan.n_tokens], in_groups=True)
