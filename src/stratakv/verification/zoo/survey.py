"""Run columns (caches) over rows (architectures); no row can stop the others."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from stratakv.verification.zoo.architectures import Architecture, Kind, architectures
from stratakv.verification.zoo.harness import CacheFactory, Outcome, has_kv_cache, run
from stratakv.verification.zoo.tiny import BuildError, TinyModel, build_tiny, one_line

Attend = Callable[[TinyModel, Any], object]
"""Called with the tiny model that a column has to itself, and its transformers model."""


@dataclass(frozen=True)
class Row:
    """One architecture under every column.

    ``has_cache`` is None where no model could be built; ``results`` is empty then, and where it is False; ``note``
    says why. ``seconds`` is the wall time of the row.
    """

    name: str
    model_type: str
    kind: Kind
    has_cache: bool | None
    results: Mapping[str, Outcome] = field(default_factory=dict)
    note: str = ""
    n_parameters: int = 0
    seconds: float = 0.0


def survey(
    columns: Mapping[str, CacheFactory],
    names: Collection[str] | None = None,
    on_row: Callable[[Row], None] | None = None,
    attend: Mapping[str, Attend] | None = None,
) -> list[Row]:
    """A row for every architecture, or for those whose class name or model type is in ``names``.

    The model is built anew for each column, since a column may change it. ``on_row`` sees each row as it is done.
    ``attend`` names for a column what is done to its model after the uncached forwards: the place for
    ``stratakv.attach``.
    """
    rows = []
    for architecture in architectures():
        if names is not None and not {architecture.name, architecture.model_type} & set(names):
            continue
        row = _row(architecture, columns, attend or {})
        gc.collect()
        rows.append(row)
        if on_row is not None:
            on_row(row)
    return rows


def _row(
    architecture: Architecture,
    columns: Mapping[str, CacheFactory],
    attend: Mapping[str, Attend],
) -> Row:
    start = time.perf_counter()
    results: dict[str, Outcome] = {}
    has_cache, note, n_parameters = None, "", 0
    try:
        tiny = build_tiny(architecture)
        n_parameters = tiny.n_parameters
        has_cache, note = _has_cache(tiny)
        if has_cache:
            for column, make_cache in columns.items():
                own = build_tiny(architecture)
                prepare = partial(attend[column], own) if column in attend else None
                results[column] = run(own, make_cache, attend=prepare)
    except BuildError as error:
        note = str(error)
    except Exception as error:
        note = one_line(error)
    return Row(
        name=architecture.name,
        model_type=architecture.model_type,
        kind=architecture.kind,
        has_cache=has_cache,
        results=results,
        note=note,
        n_parameters=n_parameters,
        seconds=time.perf_counter() - start,
    )


def _has_cache(tiny: TinyModel) -> tuple[bool, str]:
    """Whether the columns shall run; a model that fails in the check runs, so that each column shows how."""
    try:
        found = has_kv_cache(tiny)
    except Exception as error:
        return True, f"while looking for a KV cache: {one_line(error)}"
    return found, "" if found else "no KV cache"
