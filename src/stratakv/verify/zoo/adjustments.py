"""What the general rules cannot know, by model type, each with its reason. Keep this table short.

``start``: arguments without which the default config cannot be made. ``values``: final values, with dots for
sub-configs; they win over the rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Adjustment:
    """Values for one model type and why the rules do not find them."""

    reason: str
    values: Mapping[str, Any] = field(default_factory=dict)
    start: Mapping[str, Any] = field(default_factory=dict)


NO_ADJUSTMENT = Adjustment("the general rules serve")

ADJUSTMENTS: Mapping[str, Adjustment] = {}
