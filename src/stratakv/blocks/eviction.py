"""Which rows go between two steps, in each group of each sequence. Nothing is changed here."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace

from stratakv.blocks.sequence import Sequence
from stratakv.plan import KeepPlan, Run, clip_runs, join_runs
from stratakv.policies import RetentionPolicy, Window
from stratakv.spec import CacheSpec

Changes = list[tuple[Sequence, int, KeepPlan]]
"""What stays: sequence, group, plan."""

_OWN_WINDOW = Window(1)  # `keep` reads the window from the group's retention, not from the policy


def evictions(spec: CacheSpec, policy: RetentionPolicy | None, sequences: Seq[Sequence], seen_tokens: int) -> Changes:
    """What no coming query sees, by `policy` or by windows of the model's own."""
    changes = []
    kept: dict[tuple[int, int], tuple[Run, ...]] = {}  # by group and sequence, where something goes
    for g, group in enumerate(spec.groups):
        deciding = policy if group.imposed else _OWN_WINDOW
        if deciding is None or group.retention.window is None:
            continue
        for s, sequence in enumerate(sequences):
            runs = sequence.tables[g].runs
            plan = deciding.keep(group.retention, seen_tokens, runs, group.block_tokens)
            if group.recent_of is not None and (group.recent_of, s) in kept:
                plan = _within(kept[group.recent_of, s], plan or KeepPlan(runs, 0), runs)
            if plan is not None:
                changes.append((sequence, g, plan))
                kept[g, s] = plan.runs
    return changes


def compactions(spec: CacheSpec, plan: KeepPlan, sequences: Seq[Sequence], seen_tokens: int) -> Changes:
    """What is not in `plan`, in every group that has no window of the model's own."""
    groups = [g for g, group in enumerate(spec.groups) if group.imposed or not group.retention.window]
    # A shorter run would see rows that are gone now, whatever the plan says.
    exact = replace(plan, floor=max(plan.floor, seen_tokens))
    changes = [(s, g, exact) for s in sequences for g in groups if s.tables[g].runs != exact.runs]
    for sequence in sequences:
        for recent in (spec.recents[g] for g in groups if g in spec.recents):
            runs = sequence.tables[recent].runs
            if (both := _within(exact.runs, KeepPlan(runs, 0), runs)) is not None:
                changes.append((sequence, recent, both))
    return changes


def _within(runs: tuple[Run, ...], plan: KeepPlan, stored: tuple[Run, ...]) -> KeepPlan | None:
    """`plan` less the positions that are not in `runs`; None where all that is `stored` stays."""
    both = join_runs(run for first, count in runs for run in clip_runs(plan.runs, first, first + count))
    return None if both == stored else KeepPlan(both, plan.floor)
