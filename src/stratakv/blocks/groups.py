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
    keys: Tensor,
    values: Tensor,
) -> None:
    """Code the rows of one member that a step completes groups of, or none.

    Args:
        memory: which has room for the step's rows.
        plans: of the step.
        sequences: that take it.
        step: under way.
        place: the group and the member in it. The group's rows are in 16 bits elsewhere, with the new ones.
        keys: the new ones, `[n_sequences, n_heads, n_tokens, k_dim]`, of the member's heads.
        values: `[n_sequences, n_heads, n_tokens, v_dim]`.
    """
    g, m = place
    plan = plans.write_groups(sequences, step, g)
    if plan is None:
        return
    table, recent = sequences[0].tables[g], memory.spec.recents.get(g)
    if recent is not None:  # what is coded is what is held until then, however many rows come at once
        held_by = memory.arenas[recent]
        keys, values = held_by.k_codec.rounded(keys), held_by.v_codec.rounded(values)
    if plan.row < table.n_rows - step.n_tokens:
        # Read in 16 bits; those that were let go there before later ones were taken back, where they are coded.
        start, seen = without_first(table.runs, plan.row)[0][0], sequences[0].seen_tokens
        spans = {g: (start, seen)}
        if recent is not None:
            held = clip_runs(sequences[0].tables[recent].runs, start, seen)
            first = held[-1][0] if held and sum(held[-1]) == seen else seen  # before it rows may be missing
            spans = {g: (start, first), recent: (first, seen)}
        read = [
            memory.arenas[held].read(m, plans.read_span(sequences, held, *span), keys.dtype)
            for held, span in spans.items()
        ]
        keys, values = (torch.cat(tensors, dim=2) for tensors in zip(*read, (keys, values), strict=True))
    rows = (each[:, :, : plan.n_tokens] for each in (keys, values))
    memory.arenas[g].write(m, plan, *rows, in_groups=True)
