"""Four levels: keys channel by channel over groups of rows, values in rotated rows."""

from __future__ import annotations

from stratakv.codecs.affine import AffineCodec
from stratakv.codecs.base import Codec
from stratakv.codecs.channels import ChannelCodec


class Int2Keys(ChannelCodec):
    """Codes of 2 bits for keys."""

    name = "int2"
    bits = 2
    residual = 64
    sinks = 16


class Int2(AffineCodec):
    """Codes of 2 bits for values."""

    name = "int2"
    bits = 2
    spreads = (1.0, 0.8, 0.63)  # 0.63 is best for normally distributed numbers
    residual = 64
    sinks = 16

    def for_keys(self) -> Codec:
        """Channels of keys differ too much for that."""
        return Int2Keys()
