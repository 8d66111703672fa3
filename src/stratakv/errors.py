"""Every error this library raises on purpose.

    StrataKVError
    ├── ConfigurationError      an argument is wrong; says what was given and what is accepted (also a ValueError)
    │   └── UnsupportedError    each argument is fine, the combination is not served; says why
    ├── CapacityError           the cache cannot hold more; nothing was changed (also a RuntimeError)
    ├── StateError              a verb that the cache's present state does not allow; nothing was changed
    ├── FormatError             a file is not ours, is damaged or is of another version; nothing was changed
    │   └── FingerprintError    a sound file that belongs to another model, dtype or layout
    ├── ModelNotFoundError      no model under the given name or path
    └── InvariantError          the library's own books do not add up: always a bug (also an AssertionError)

An error leaves the object it was raised from as it was before the call.
"""

from __future__ import annotations


class StrataKVError(Exception):
    """Base of all errors raised by StrataKV."""


class ConfigurationError(StrataKVError, ValueError):
    """An argument is outside what is accepted."""


class UnsupportedError(ConfigurationError):
    """A combination that StrataKV does not serve, refused before any work was done."""


class CapacityError(StrataKVError, RuntimeError):
    """The cache cannot hold what was asked for."""


class StateError(StrataKVError, RuntimeError):
    """The verb does not apply to the present state of the cache."""


class FormatError(StrataKVError):
    """A file that is not ours, is damaged or has another version."""


class FingerprintError(FormatError):
    """A sound file that was written for another model, dtype or layout."""


class ModelNotFoundError(StrataKVError):
    """No model was found under the given name or path."""


class InvariantError(StrataKVError, AssertionError):
    """The library's own bookkeeping is inconsistent."""
