"""Forwards that stop half way."""

from __future__ import annotations

from typing import Any

import torch

from stratakv.testing.running import cache_argument


class InjectedError(Exception):
    """Raised in the middle of a forward."""


def stopped_forward(model: Any, cache: Any, module: Any, **inputs: Any) -> None:
    """A forward through `cache` that raises when it reaches `module`. The books are checked afterwards.

    Raises:
        AssertionError: it never got there.
    """

    def stop(*_: Any) -> None:
        raise InjectedError

    hook = module.register_forward_pre_hook(stop)
    try:
        with torch.no_grad():
            model(**inputs, **cache_argument(model, cache), use_cache=True)
    except InjectedError:
        cache.check()
    else:
        raise AssertionError("the forward did not reach the module")
    finally:
        hook.remove()
