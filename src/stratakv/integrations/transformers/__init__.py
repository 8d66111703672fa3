"""transformers: the cache, and the attention that reads it."""

from stratakv.integrations.transformers.attach import Attachment, attach, detach
from stratakv.integrations.transformers.cache import CacheCheckpoint, KVCache
from stratakv.integrations.transformers.encoder_decoder import EncoderDecoderCheckpoint, EncoderDecoderKVCache

__all__ = [
    "Attachment",
    "CacheCheckpoint",
    "EncoderDecoderCheckpoint",
    "EncoderDecoderKVCache",
    "KVCache",
    "attach",
    "detach",
]
