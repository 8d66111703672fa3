"""transformers: the cache, and the attention that reads it."""

from stratakv.integrations.transformers.attachment import Attachment, attach
from stratakv.integrations.transformers.cache import KVCache
from stratakv.integrations.transformers.checkpoint import CacheCheckpoint
from stratakv.integrations.transformers.encoder_decoder import EncoderDecoderCheckpoint, EncoderDecoderKVCache

__all__ = [
    "Attachment",
    "CacheCheckpoint",
    "EncoderDecoderCheckpoint",
    "EncoderDecoderKVCache",
    "KVCache",
    "attach",
]
