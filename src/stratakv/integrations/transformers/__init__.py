"""transformers: the cache, and the attention that reads it."""

from stratakv.integrations.transformers.attachment import Attachment, attach
from stratakv.integrations.transformers.cache import KVCache
from stratakv.integrations.transformers.encoder_decoder import EncoderDecoderCheckpoint, EncoderDecoderKVCache
from stratakv.integrations.transformers.state import CacheCheckpoint

__all__ = [
    "Attachment",
    "CacheCheckpoint",
    "EncoderDecoderCheckpoint",
    "EncoderDecoderKVCache",
    "KVCache",
    "attach",
]
