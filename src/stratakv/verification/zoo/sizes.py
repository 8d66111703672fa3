"""Tiny sizes by attribute name: one table of patterns, no architecture is named here.

Each rule maps the default value of an integer attribute to a tiny one. Two things are kept, because faults hide where
they are lost: ratios (query heads to KV heads, key heads to value heads, widths to the hidden size) and differences
(a K head dim that differs from the V head dim still differs).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

VOCABULARY = 128
HIDDEN = 64
INTERMEDIATE = 128
EXPERT_INTERMEDIATE = 32
HEADS = 4
# Shorter than the token sequences of the harness, so that every window, chunk and sparse selection is crossed.
WINDOW = 8
POSITIONS = 128
TOWER_LAYERS = 2


@dataclass(frozen=True)
class Scale:
    """What the default config says about the sizes that others relate to.

    ``hidden``: the default hidden size; ``heads``: its attention heads; ``n_layers``: layers of the tiny config;
    ``default_layers``: layers of the default one.
    """

    hidden: int
    heads: int
    n_layers: int
    default_layers: int

    @property
    def head_dim(self) -> int:
        """The head dim of a config that derives it from the hidden size; 0 when unknown."""
        return self.hidden // self.heads if self.heads else 0


def _at_most(limit: int) -> Callable[[int, Scale], int]:
    return lambda value, scale: min(value, limit)


def width(value: int, scale: Scale) -> int:
    """A hidden-size-like width, at its default ratio to the hidden size (between 1/4 and 4)."""
    if scale.hidden <= 0 or value <= 0:
        return min(value, HIDDEN)
    if value % scale.hidden == 0:
        return HIDDEN * min(value // scale.hidden, 4)
    if scale.hidden % value == 0:
        return max(HIDDEN * value // scale.hidden, HIDDEN // 4)
    return HIDDEN * 3 // 2 if value > scale.hidden else HIDDEN // 2


def query_heads(value: int, scale: Scale) -> int:
    """Attention heads; twice as many where a kind of layer has another number than the main one."""
    if value <= HEADS:
        return value
    return HEADS if scale.heads in (value, 0) else HEADS * 2


def kv_heads(value: int, scale: Scale) -> int:
    """KV heads: all, half or one of the query heads, as in the default."""
    if value in (0, 1):
        return value
    return HEADS if value >= scale.heads else HEADS // 2


def linear_heads(value: int, scale: Scale) -> int:
    """Heads of linear attention: 16 -> 2, 32 -> 4, so that their ratio stays."""
    return min(value, max(1, value // 8)) if value % 8 == 0 else min(value, 2)


def head_dim(value: int, scale: Scale) -> int:
    """A head dim: an eighth, even, at least 8; hidden/heads where the default is exactly that."""
    if value == scale.head_dim:
        return HIDDEN // HEADS
    return max(8, value // 8 // 2 * 2)


def layers(value: int, scale: Scale) -> int:
    """Number of layers: the planned one for the main stack, two for towers."""
    return min(value, scale.n_layers) if value == scale.default_layers else min(value, TOWER_LAYERS)


def period(value: int, scale: Scale) -> int:
    """Every how many layers something occurs: kept, the layer count follows it."""
    return value


Rule = tuple[str, Callable[[int, Scale], int]]

# First match wins. Names are matched whole or by the part that tells what the number is.
RULES: tuple[Rule, ...] = (
    (r"(^|_)(bos|eos|pad|sep|unk|cls|mask)_token_id$", period),
    (r"type_vocab_size|segment_types|prompt_types|n_langs|langs?_", _at_most(8)),
    (r"ngram_vocab_size_base", _at_most(VOCABULARY)),
    (r"vocab(_|$)|num_embeddings|codebook_size|num_codevectors|num_centroids|prompt_length$", _at_most(VOCABULARY)),
    (r"max_window_layers", _at_most(1)),
    (r"first_k_dense_replace|num_dense_layers|n_dense|layer_start_index", _at_most(1)),
    (r"num_kv_shared_layers", period),
    (r"(_period|_offset|_interval|_every_n_layers|_frequency|_pattern|sparse_step|layer_group_size)$", period),
    (r"attn_res_block", _at_most(2)),
    (r"n_(input|output)_layers", _at_most(1)),
    (r"num_(conv|feat_extract|lstm|adapter|residual)_layers|prenet_layers|postnet_layers", period),
    (r"(^|_)n?(um)?_?(hidden_)?layers(_per_stack)?$|^n_layer$|^depth$|_layers$|recurrent_layers$", layers),
    (r"num_blocks$|layer_end_index", _at_most(TOWER_LAYERS)),
    (
        r"max_.*position|n_positions|n_ctx|max_seq_len|model_max_length|^context_length|position_embeddings$",
        lambda v, s: min(v, POSITIONS),
    ),
    (r"max_position|_pos_emb$|_positions$|floor_scale|n_floor$", _at_most(POSITIONS)),
    (
        r"sliding_window|attention_chunk_size|attention_window|local_attention|window_size|keep_window|window_len",
        _at_most(WINDOW),
    ),
    (r"local_radius", _at_most(WINDOW - 1)),
    (r"index_topk_blocks", _at_most(2)),
    (r"index_topk$", _at_most(WINDOW)),
    (r"index_block_size|global_block_size", _at_most(4)),
    (r"attn_chunk_length|^(mamba_)?chunk_size$|^block_size$|chunk_length$|context_size$", _at_most(WINDOW)),
    (r"context_(left|right)|left_context|right_context|chunk_left|rel_extent", _at_most(WINDOW // 2)),
    (r"num_filters|n_filters", _at_most(4)),
    (r"expert_capacity", period),
    (r"linear_num.*heads|linear_.*_heads", linear_heads),
    # ReLU scores: with few heads many are exactly zero, and the top-k of equal scores is arbitrary.
    (r"index_n_heads|index_.*heads", _at_most(16)),
    (r"ssm.*heads|mamba.*heads", linear_heads),
    (r"kv_heads$|key_value_heads$|kv_n_heads$|num_query_groups", kv_heads),
    (r"(^|_)heads$|^n_head$|n_heads$", query_heads),
    (r"mrope|rope_dim$|^rotary_dim$|^rope_head_dim", _at_most(8)),
    (
        r"head_dim$|^d_kv$|^d_head$|^dim_head$|mamba_d_head|mamba_headdim|kv_channels|head_size$|key_dim$|value_dim$",
        head_dim,
    ),
    (r"_rank$|lowrank$", _at_most(16)),
    (r"^(mamba_|ssm_)?(d_)?state(_size)?$|mamba_d_state|ssm_state_size|^state_size", _at_most(16)),
    (r"^n_group$|num_expert_group|^n_groups$|mamba_n_?groups|ngroups|o_groups", _at_most(2)),
    (r"topk_group", _at_most(1)),
    (r"(shared_experts|num_shared_experts|zero_expert_num)$", _at_most(2)),
    (r"experts_per_tok|moe_top_?k|moe_k$|top_k_experts|experts_top_k|^top_k$", _at_most(2)),
    (r"n_routed_experts|num_experts|num_local_experts|moe_num_experts|n_experts", _at_most(8)),
    (r"(moe|expert).*(intermediate|ffn|hidden)_size|expert_dim", _at_most(EXPERT_INTERMEDIATE)),
    (r"intermediate|ffn|d_ff$|^dff$|dim_ff|mlp_dim|feed_forward|d_inner$|mlp_size", _at_most(INTERMEDIATE)),
    (r"kernel|stride|expan|ratio|factor|mult|_conv$|conv1d_width|num_channels|in_channels|out_channels$", period),
    (r"mel_bins|feat_per_channel|feature_size", period),
    (r"num_conv_pos_embeddings$", _at_most(16)),
    (r"groups$", _at_most(4)),
    (r"image_size|crop_size", period),
    (r"d_rel$", _at_most(8)),
    (
        r"hidden_size|d_model|n_embd|emb_dim|embed_dim|embd|hidden_dim|embedding_size|embed_proj_dim|embedding_dim"
        r"|lru_width|d_ssm|conv_channels|conv_dim|output_dim|projector_.*_dim|adapter_.*_dim|codebook_dim|cross_dim"
        r"|size_per_layer_input|attention_hidden|^dim$|_dim$|_width$|input_size$",
        width,
    ),
)


def tiny_integer(name: str, value: int, scale: Scale) -> int:
    """The tiny value of an integer attribute called ``name``; unknown names keep their value."""
    for pattern, rule in RULES:
        if re.search(pattern, name):
            return rule(value, scale)
    return value
