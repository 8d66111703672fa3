"""Formats by name. A new format is one file and one entry here, or a call of `register_codec` from outside."""

from __future__ import annotations

from collections.abc import Callable

from stratakv.codecs.base import Codec
from stratakv.codecs.floats import BFloat16, Float16, Float32
from stratakv.codecs.fp8 import Float8
from stratakv.codecs.int2 import Int2
from stratakv.codecs.int4 import Int4
from stratakv.codecs.int8 import Int8
from stratakv.errors import ConfigurationError

_factories: dict[str, Callable[[], Codec]] = {
    codec.name: codec for codec in (Float32, BFloat16, Float16, Float8, Int8, Int4, Int2)
}


def codec_names() -> tuple[str, ...]:
    """All formats that can be named."""
    return tuple(_factories)


def get_codec(name: str) -> Codec:
    """The codec called `name`.

    Raises:
        ConfigurationError: no such format.
    """
    try:
        return _factories[name]()
    except KeyError:
        raise ConfigurationError(f"unknown format {name!r}; accepted are {', '.join(_factories)}") from None


def get_codecs(k_format: str, v_format: str) -> tuple[Codec, Codec]:
    """The codecs for keys and for values; see `get_codec`."""
    return get_codec(k_format).for_keys(), get_codec(v_format).for_values()


def register_codec(name: str, factory: Callable[[], Codec]) -> None:
    """Make a third party's format known under `name`.

    Raises:
        ConfigurationError: the name is taken.
    """
    if name in _factories:
        raise ConfigurationError(f"the format name {name!r} is taken")
    _factories[name] = factory
