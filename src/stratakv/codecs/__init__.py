"""How numbers are stored in a page: one file a format, found by name through the registry."""

from stratakv.codecs.base import Codec
from stratakv.codecs.registry import codec_names, get_codec, get_codecs, register_codec

__all__ = ["Codec", "codec_names", "get_codec", "get_codecs", "register_codec"]
