"""16 levels: keys channel by channel over groups of rows, values in rotated rows."""

from __future__ import annotations

from stratakv.codecs.affine import AffineCodec
from stratakv.codecs.base import Codec
from stratakv.codecs.channels import ChannelCodec


class Int4Keys(ChannelCodec):
    """Codes of 4 bits for keys."""

    name = "int4"
    bits = 4
    residual = 64
    sinks = 16


class Int4(AffineCodec):
    """Codes of 4 bits for values."""

    name = "int4"
    bits = 4
    residual = 64
    sinks = 16

    def for_keys(self) -> Codec:
        """Channels of keys differ too much for that."""
        return Int4Keys()
