"""Every architecture of the installed transformers as a tiny random model, decoded with a cache and without."""

from stratakv.verification.zoo.architectures import Architecture, architectures
from stratakv.verification.zoo.harness import (
    CacheFactory,
    FeedResult,
    Outcome,
    context_visible,
    dynamic_cache_factory,
    has_kv_cache,
    run,
)
from stratakv.verification.zoo.survey import Row, survey
from stratakv.verification.zoo.tiny import BuildError, TinyModel, build_tiny

__all__ = [
    "Architecture",
    "BuildError",
    "CacheFactory",
    "FeedResult",
    "Outcome",
    "Row",
    "TinyModel",
    "architectures",
    "build_tiny",
    "context_visible",
    "dynamic_cache_factory",
    "has_kv_cache",
    "run",
    "survey",
]
