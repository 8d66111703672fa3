"""Which tokens stay: one file a policy."""

from stratakv.policies.base import RetentionPolicy
from stratakv.policies.window import Window

__all__ = ["RetentionPolicy", "Window"]
