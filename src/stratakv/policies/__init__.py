"""Which tokens stay: one file a policy."""

from stratakv.policies.base import RetentionPolicy
from stratakv.policies.registry import policy_from_dict
from stratakv.policies.window import Window

__all__ = ["RetentionPolicy", "Window", "policy_from_dict"]
