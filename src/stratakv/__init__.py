"""StrataKV: a paged, verified key/value cache for autoregressive Transformers.

    import stratakv as sk

    cache = sk.KVCache.for_model(model)
    model.generate(**inputs, cache=cache)

The heavy imports (torch, transformers) happen when a name is first used.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stratakv import errors, policies
    from stratakv.integrations.transformers import Attachment, EncoderDecoderKVCache, KVCache, attach
    from stratakv.models import load
    from stratakv.verification import FidelityReport, VerifyReport, fidelity, verify

__version__ = version("stratakv")

_HOMES = {
    "Attachment": "stratakv.integrations.transformers",
    "EncoderDecoderKVCache": "stratakv.integrations.transformers",
    "FidelityReport": "stratakv.verification",
    "KVCache": "stratakv.integrations.transformers",
    "VerifyReport": "stratakv.verification",
    "attach": "stratakv.integrations.transformers",
    "fidelity": "stratakv.verification",
    "load": "stratakv.models",
    "verify": "stratakv.verification",
}
_MODULES = ("errors", "policies")

__all__ = [
    "Attachment",
    "EncoderDecoderKVCache",
    "FidelityReport",
    "KVCache",
    "VerifyReport",
    "__version__",
    "attach",
    "errors",
    "fidelity",
    "load",
    "policies",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _MODULES:
        return import_module(f"stratakv.{name}")
    raise AttributeError(f"module 'stratakv' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
