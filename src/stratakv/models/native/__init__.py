"""Forwards of the Llama family by our own kernels."""

from stratakv.models.native.architecture import FAMILIES, Architecture, architecture_of
from stratakv.models.native.inspection import calls_more
from stratakv.models.native.runner import NativeRunner

__all__ = ["FAMILIES", "Architecture", "NativeRunner", "architecture_of", "calls_more"]
