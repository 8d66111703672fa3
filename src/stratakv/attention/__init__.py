"""Attention over the rows of a view: one file a backend."""

from stratakv.attention.base import AttentionBackend, AttentionOptions, apply_sinks, merge_states
from stratakv.attention.cpu import CpuBackend
from stratakv.attention.reference import ReferenceBackend
from stratakv.attention.registry import backend_for, backends

__all__ = [
    "AttentionBackend",
    "AttentionOptions",
    "CpuBackend",
    "ReferenceBackend",
    "apply_sinks",
    "backend_for",
    "backends",
    "merge_states",
]
