"""A model's weights as the native runner reads them: fused, in one dtype, in one stretch of memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stratakv.blocks.ram import zeros
from stratakv.errors import ConfigurationError
from stratakv.models.native.architecture import Architecture

_ALIGNMENT = 64  # bytes of a cache line


@dataclass(frozen=True)
class Linear:
    """One matrix `[n_rows, n_columns]` and its bias `[n_rows]` in fp32, or None."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. Norms are fp32 vectors, or None where the model has none."""

    qkv: Linear
    output: Linear
    gate_up: Linear
    down: Linear
    attention_norm: Tensor
    query_norm: Tensor | None
    key_norm: Tensor | None
    after_attention_norm: Tensor | None
    mlp_norm: Tensor
    after_mlp_norm: Tensor | None


@dataclass(frozen=True)
class Weights:
    """All of a model."""

    embedding: Linear
    head: Linear  # the embedding itself where they are tied
    norm: Tensor
    layers: tuple[LayerWeights, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, model: Any, architecture: Architecture, dtype: torch.dtype) -> Weights:
        """Copy the weights of one of transformers' models, for which `architecture_of` vouches.

        Raises:
            ConfigurationError: a weight is too large for `dtype`.
        """
        return _Copy(model, architecture, dtype).weights()

    @property
    def nbytes(self) -> int:
        """Bytes that one token's forward reads: all matrices, of the embedding only a row."""
        matrices = [
            self.head,
            *(m for layer in self.layers for m in (layer.qkv, layer.output, layer.gate_up, layer.down)),
        ]
        return sum(matrix.weight.nbytes for matrix in matrices)


class _Copy:
    def __init__(self, model: Any, architecture: Architecture, dtype: torch.dtype) -> None:
        self._model, self._architecture, self._dtype = model, architecture, dtype
        self._is_tied = model.lm_head.weight is model.model.embed_tokens.weight
        self._room = zeros(sum(_padded(n * dtype.itemsize) for n in self._sizes()))
        self._used = 0

    def weights(self) -> Weights:
        decoder = self._model.model
        embedding = self._linear(decoder.embed_tokens)
        head = embedding if self._is_tied else self._linear(self._model.lm_head)
        layers = tuple(self._layer(layer) for layer in decoder.layers)
        return Weights(embedding, head, self._norm(decoder.norm), layers, self._dtype)

    def _layer(self, layer: Any) -> LayerWeights:
        attention, mlp = layer.self_attn, layer.mlp
        outer = self._architecture.has_outer_norms
        return LayerWeights(
            self._linear(attention.q_proj, attention.k_proj, attention.v_proj),
            self._linear(attention.o_proj),
            self._linear(mlp.gate_proj, mlp.up_proj),
            self._linear(mlp.down_proj),
            self._norm(layer.input_layernorm),
            self._norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
            self._norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
            self._norm(layer.post_attention_layernorm) if outer else None,
            self._norm(layer.pre_feedforward_layernorm if outer else layer.post_attention_layernorm),
            self._norm(layer.post_feedforward_layernorm) if outer else None,
        )

    def _sizes(self) -> Iterator[int]:
        """Numbers in each matrix."""
        decoder = self._model.model
        yield decoder.embed_tokens.weight.numel()
        if not self._is_tied:
            yield self._model.lm_head.weight.numel()
        for layer in decoder.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for fused in (
                (attention.q_proj, attention.k_proj, attention.v_proj),
                (attention.o_proj,),
                (mlp.gate_proj, mlp.up_proj),
                (mlp.down_proj,),
            ):
                yield sum(module.weight.numel() for module in fused)

    def _linear(self, *modules: Any) -> Linear:
        rows = sum(module.weight.shape[0] for module in modules)
        columns = modules[0].weight.shape[1]
        nbytes = rows * columns * self._dtype.itemsize
        fused = self._room[self._used : self._used + nbytes].view(self._dtype).view(rows, columns)
        self._used += _padded(nbytes)
        torch.cat([module.weight.detach().to("cpu", self._dtype) for module in modules], out=fused)
        if self._dtype == torch.float16 and fused.isinf().any() and not any(m.weight.isinf().any() for m in modules):
            raise ConfigurationError("the model has weights beyond the range of torch.float16; take torch.bfloat16")
        biases = [getattr(module, "bias", None) for module in modules]
        if all(bias is None for bias in biases):
            return Linear(fused, None)
        parts = [
            torch.zeros(module.weight.shape[0], dtype=torch.float32, device="cpu")
            if bias is None
            else bias.detach().to("cpu", torch.float32)
            for module, bias in zip(modules, biases, strict=True)
        ]
        return Linear(fused, torch.cat(parts))

    def _norm(self, module: Any) -> Tensor:
        weight: Tensor = module.weight.detach().to("cpu", torch.float32) + self._architecture.norm_offset
        return weight.contiguous()


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
