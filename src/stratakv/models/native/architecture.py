"""What the native runner has to know of a model of the Llama family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from stratakv.errors import UnsupportedError
from stratakv.models.native.inspection import check_is_plain
from stratakv.spec import LayerSpec

FAMILIES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
)
ACTIVATIONS = {"silu": 0, "swish": 0, "gelu_pytorch_tanh": 1}
_STILL_ROTATIONS = (
    "default",
    "linear",
    "llama3",
    "yarn",
    "proportional",
)  # others' angles may change with the text's length


@dataclass(frozen=True)
class Architecture:
    """The facts of one model. Softcaps of 0 mean none."""

    hidden: int
    intermediate: int
    head_dim: int
    n_query_heads: int
    n_kv_heads: int
    vocabulary: int
    norm_epsilon: float
    norm_offset: float  # added to the weights of every norm: 1 in Gemma
    embedding_scale: float
    attention_scale: float
    attention_softcap: float
    logit_softcap: float
    activation: int
    has_outer_norms: bool  # Gemma: norms after attention and after the MLP, too
    layer_types: tuple[str, ...]  # of each layer; the key of its rotation
    windows: tuple[int | None, ...]

    @property
    def n_layers(self) -> int:
        """Decoder layers."""
        return len(self.layer_types)

    def layer_specs(self) -> list[LayerSpec]:
        """What a cache for this model has to hold."""
        return [
            LayerSpec(index, self.n_kv_heads, self.head_dim, self.head_dim, window)
            for index, window in enumerate(self.windows)
        ]


def architecture_of(model: Any) -> Architecture:
    """Read the facts from one of transformers' models.

    Raises:
        UnsupportedError: the model is of another family, uses something that the runner does not compute, or was
            changed after it was made: adapters, quantised layers, hooks.
    """
    name = type(model).__name__
    if name not in FAMILIES:
        raise UnsupportedError(f"the native runner serves {', '.join(FAMILIES)}, not {name}")
    check_is_plain(model)
    config = model.config
    is_gemma = name.startswith("Gemma")
    activation = config.hidden_activation if is_gemma else config.hidden_act
    if activation not in ACTIVATIONS:
        raise UnsupportedError(
            f"the native runner computes {', '.join(ACTIVATIONS)}, not the activation {activation!r}"
        )
    if not config.num_hidden_layers:
        raise UnsupportedError(f"this {name} has no layers, and so no keys and values to cache")
    if getattr(config, "use_bidirectional_attention", False):
        raise UnsupportedError("the native runner is causal; this model attends in both directions")
    n_layers: int = config.num_hidden_layers
    windows = tuple(getattr(layer.self_attn, "sliding_window", None) for layer in model.model.layers)
    if name == "MistralForCausalLM":
        windows = (config.sliding_window,) * n_layers
    kinds = tuple(getattr(config, "layer_types", None) or ("full_attention",) * n_layers)
    rotation = model.model.rotary_emb
    types = rotation.rope_type if isinstance(rotation.rope_type, dict) else {"": rotation.rope_type}
    if others := sorted(set(types.values()) - set(_STILL_ROTATIONS)):
        raise UnsupportedError(
            f"the native runner turns by rotations of type {', '.join(_STILL_ROTATIONS)}, not {', '.join(others)}"
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    softcap = config.attn_logit_softcapping if name == "Gemma2ForCausalLM" else None  # Gemma 3 has it and ignores it
    scale = config.query_pre_attn_scalar**-0.5 if is_gemma else head_dim**-0.5
    return Architecture(
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        head_dim=head_dim,
        n_query_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        vocabulary=model.lm_head.weight.shape[0],
        norm_epsilon=config.rms_norm_eps,
        norm_offset=1.0 if is_gemma else 0.0,
        embedding_scale=_embedding_scale(model) if is_gemma else 1.0,
        attention_scale=scale,
        attention_softcap=softcap or 0.0,
        logit_softcap=(config.final_logit_softcapping if is_gemma else None) or 0.0,
        activation=ACTIVATIONS[activation],
        has_outer_norms=is_gemma,
        layer_types=kinds,
        windows=windows,
    )


def _embedding_scale(model: Any) -> float:
    """Gemma's, which is rounded to the weights' own dtype. Where the embedding holds it, it may have been before."""
    weight = model.model.embed_tokens.weight
    scale = getattr(model.model.embed_tokens, "embed_scale", None)
    if scale is None:
        scale = torch.tensor(model.config.hidden_size**0.5, device="cpu")
    return float(scale.to(weight.dtype))
