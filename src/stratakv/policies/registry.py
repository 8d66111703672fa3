"""Policies by name. A new policy is one file and one entry here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stratakv.errors import ConfigurationError
from stratakv.policies.base import RetentionPolicy
from stratakv.policies.window import Window

_readers: dict[str, Callable[[dict[str, Any]], RetentionPolicy]] = {Window.name: Window.from_dict}


def policy_from_dict(data: dict[str, Any]) -> RetentionPolicy:
    """The policy that its `to_dict` described.

    Raises:
        ConfigurationError: no policy of that name.
    """
    try:
        return _readers[data["name"]](data)
    except KeyError:
        raise ConfigurationError(f"unknown policy {data.get('name')!r}; known are {', '.join(_readers)}") from None
