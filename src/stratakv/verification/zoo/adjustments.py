"""What the general rules cannot know, by model type, each with its reason. Keep this table short.

``start``: arguments without which the default config cannot be made. ``values``: final values, with dots for
sub-configs; they win over the rules. ``whole_ids``: the forward takes all tokens so far, also with a cache.
``needs_positions``: given only the cache, the model counts positions wrongly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Adjustment:
    """Values for one model type and why the rules do not find them."""

    reason: str
    values: Mapping[str, Any] = field(default_factory=dict)
    start: Mapping[str, Any] = field(default_factory=dict)
    whole_ids: bool = False
    needs_positions: bool = False


NO_ADJUSTMENT = Adjustment("the general rules serve")

_NO_ATTENTION = "the default config has linear attention only; released checkpoints are hybrids"
_HYBRID = ["linear_attention", "full_attention"]
_UNSET = "the default config leaves a number None that the model needs"
_TWO_THETAS = {
    "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
_QWEN4: Mapping[str, Any] = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "ple_layer_ids": [1],
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25},
}
_QWEN4_REASON = "indexer fields are None by default, and the per-layer embeddings, with states of their own, are off"
_NO_TEXT_EMBEDDING = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}


_WHOLE = "the forward slices off the cached tokens itself"
_CLAMPED = "the chunked scan clamps time steps from below, the single step does not: they differ before any cache does"


def _below(prefix: str, values: Mapping[str, Any]) -> Mapping[str, Any]:
    return {f"{prefix}.{name}": value for name, value in values.items()}


ADJUSTMENTS: Mapping[str, Adjustment] = {
    # Without position ids its rotary embedding starts at 0 in every call; generate always gives them.
    "bamba": Adjustment(_NO_ATTENTION, {"num_hidden_layers": 2, "attn_layer_indices": [1]}, needs_positions=True),
    "granitemoehybrid": Adjustment(_NO_ATTENTION, {"num_hidden_layers": 2, "layer_types": _HYBRID}),
    "lfm2": Adjustment(
        "the default config has attention only; released checkpoints are hybrids",
        {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    ),
    "lfm2_moe": Adjustment(_UNSET, {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}),
    "deepseek_v2": Adjustment(_UNSET, {"num_experts_per_tok": 2}),
    "dots1": Adjustment(_UNSET, {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2}),
    "dbrx": Adjustment(_UNSET, {"attn_config.rope_theta": 10_000.0, "attn_config.clip_qkv": 8.0}),
    "xmod": Adjustment(_UNSET, {"default_language": "en_XX"}),
    "moonshine_streaming": Adjustment(_UNSET, {"num_key_value_heads": 4}),
    "qwen4_exp_text": Adjustment(_QWEN4_REASON, _QWEN4),
    "qwen4_exp": Adjustment(_QWEN4_REASON, _QWEN4),
    "cohere_compass_text": Adjustment(
        "the default config gives no RoPE parameters by layer type, which the model needs, and no sliding layer",
        {
            "num_hidden_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": _TWO_THETAS,
        },
    ),
    "mamba2": Adjustment("num_heads * head_dim must be the expanded width", {"num_heads": 8, "head_dim": 16}),
    "falcon_h1": Adjustment("mamba_d_ssm must hold mamba_n_heads heads", {"mamba_d_ssm": 128}),
    "blt": Adjustment(
        "three transformers must agree on the global width",
        {"encoder_config.hidden_size_global": 64, "decoder_config.hidden_size_global": 64},
    ),
    "flint": Adjustment("its last layer is always full attention, wherever that is", {"num_hidden_layers": 4}),
    "gpt_neo": Adjustment(
        "layer kinds are run-length coded", {"num_layers": 2, "attention_types": [[["global", "local"], 1]]}
    ),
    "gemma3n_text": Adjustment(
        "layers that share KV stand last and need a layer of their own kind before them",
        {"num_hidden_layers": 10, "num_kv_shared_layers": 5},
    ),
    "gemma4_text": Adjustment(
        "no layer shares KV by default; released checkpoints do", {"num_hidden_layers": 12, "num_kv_shared_layers": 6}
    ),
    "gemma4_unified_text": Adjustment(
        "no layer shares KV by default; released checkpoints do", {"num_hidden_layers": 12, "num_kv_shared_layers": 6}
    ),
    "gemma4_assistant": Adjustment(
        "the default text config is not one that the assistant accepts",
        {**_below("text_config", {"num_hidden_layers": 6, "num_kv_shared_layers": 6, **_NO_TEXT_EMBEDDING})},
        {"text_config": {"model_type": "gemma4_text", **_NO_TEXT_EMBEDDING}},
    ),
    "gemma4_unified_assistant": Adjustment(
        "all its layers share KV", _below("text_config", {"num_hidden_layers": 6, "num_kv_shared_layers": 6})
    ),
    "musicgen": Adjustment("codebooks share the batch axis", {"num_codebooks": 1}),
    "musicgen_melody": Adjustment("codebooks share the batch axis", {"num_codebooks": 1}),
    "reformer": Adjustment(
        "axial positions must multiply to the positions and add up to the width",
        {"axial_pos_shape": (8, 16), "axial_pos_embds_dim": (16, 48), "is_decoder": True},
    ),
    "zamba": Adjustment("the second hybrid layer, tied to the first, is layer 7", {"num_hidden_layers": 8}),
    "zamba2": Adjustment(
        "the default layer types do not follow the number of layers",
        {
            "num_hidden_layers": 5,
            "time_step_min": 1e-6,  # as for nemotron_h
            "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"],
        },
    ),
    "dia": Adjustment(
        "channels are a third axis of the tokens",
        {"decoder_config.num_channels": 1, "decoder_config.cross_hidden_size": 64, "delay_pattern": [0]},
    ),
    "cpmant": Adjustment(_WHOLE, whole_ids=True),
    "xlm": Adjustment(_WHOLE, whole_ids=True),
    "nemotron_h": Adjustment(_CLAMPED, {"time_step_min": 1e-6}),
    "nemo_speechlm": Adjustment(
        "parts must agree on the width of sound",
        {"audio_config.diarization_config.head_config.audio_hidden_size": 64, "text_config.time_step_min": 1e-6},
    ),
}
