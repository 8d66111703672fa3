"""Tiny random models in which attention matters, for tests of a cache.

Published initialisations give a tiny model whose logits hardly depend on the context: a fault of the cache would drown
in rounding. Here all matrices are drawn with a standard deviation of 0.15, which makes attention far from uniform.

Every model is in evaluation mode, fp32, on torch's default device, has 2 layers (3 where layers of two kinds
alternate), 4 query and 2 KV heads of dim 8 (4 and 4 for encoder-decoders, which share none), and never ends a text of
its own accord.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

from stratakv.integrations.transformers.compat import PreTrainedModel

VOCABULARY = 97
WEIGHT_STD = 0.15
PAD_ID = 0

_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 8192,
    "pad_token_id": PAD_ID,
    "bos_token_id": None,
    "eos_token_id": None,
}


def tiny_llama(*, seed: int = 0, **config: Any) -> PreTrainedModel:
    """Full attention in every layer. `config` overrides entries of the model's config."""
    return _drawn(transformers.LlamaForCausalLM, transformers.LlamaConfig(**{**_DECODER, **config}), seed)


def tiny_mistral(*, window: int = 4, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A sliding window of `window` tokens in every layer."""
    options = {**_DECODER, "sliding_window": window, **config}
    return _drawn(transformers.MistralForCausalLM, transformers.MistralConfig(**options), seed)


def tiny_qwen2(*, seed: int = 0, **config: Any) -> PreTrainedModel:
    """Full attention, and biases on queries, keys and values."""
    return _drawn(transformers.Qwen2ForCausalLM, transformers.Qwen2Config(**{**_DECODER, **config}), seed)


def tiny_qwen3(*, seed: int = 0, **config: Any) -> PreTrainedModel:
    """Full attention, and norms of queries and keys."""
    return _drawn(transformers.Qwen3ForCausalLM, transformers.Qwen3Config(**{**_DECODER, **config}), seed)


def tiny_gemma2(*, window: int = 5, seed: int = 0, **config: Any) -> PreTrainedModel:
    """Windows of `window` tokens in every other layer, and softcaps."""
    options = {**_DECODER, "sliding_window": window, "query_pre_attn_scalar": 8, **config}
    return _drawn(transformers.Gemma2ForCausalLM, transformers.Gemma2Config(**options), seed)


def tiny_gemma3(*, window: int = 5, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A hybrid: a full layer between two with a sliding window of `window` tokens."""
    options = {
        **_DECODER,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": window,
        "query_pre_attn_scalar": 8,
        **config,
    }
    return _drawn(transformers.Gemma3ForCausalLM, transformers.Gemma3TextConfig(**options), seed)


def tiny_t5(*, seed: int = 0, **config: Any) -> PreTrainedModel:
    """An encoder-decoder with relative positions as a bias on the scores."""
    options = {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "pad_token_id": PAD_ID,
        "eos_token_id": None,
        "decoder_start_token_id": 1,
        **config,
    }
    return _drawn(transformers.T5ForConditionalGeneration, transformers.T5Config(**options), seed)


def tiny_bart(*, seed: int = 0, **config: Any) -> PreTrainedModel:
    """An encoder-decoder with learned positions."""
    options = {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 256,
        "pad_token_id": PAD_ID,
        "bos_token_id": 1,
        "eos_token_id": None,
        "forced_eos_token_id": None,
        "decoder_start_token_id": 1,
        **config,
    }
    return _drawn(transformers.BartForConditionalGeneration, transformers.BartConfig(**options), seed)


def _drawn(model_class: Any, config: Any, seed: int) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(seed)
    with torch.device("cpu"), torch.no_grad():  # the same numbers on every device
        model: PreTrainedModel = model_class(config).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=WEIGHT_STD, generator=generator)
    generation = model.generation_config
    generation.pad_token_id, generation.eos_token_id, generation.do_sample = PAD_ID, None, False
    return model.requires_grad_(requires_grad=False).to(torch.get_default_device())
