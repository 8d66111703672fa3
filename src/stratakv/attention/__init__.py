"""Attention over the rows of a view: one file a backend."""

from stratakv.attention.base import AttentionBackend, AttentionOptions, apply_sinks, merge_states
from stratakv.attention.reference import ReferenceBackend

__all__ = ["AttentionBackend", "AttentionOptions", "ReferenceBackend", "apply_sinks", "merge_states"]
