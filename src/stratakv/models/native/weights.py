"""A model's weights as the native runner reads them: fused, in one dtype, in one stretch of memory.

For a processor that multiplies tiles, the rows of a matrix are taken in pairs of 16, and of each pair 32 columns at a
time: `[pair of 16 rows, step of 32 columns, panel of the pair, two columns, row, 2]`, filled up with zeros. Of gates
and ups the pairs are 16 gates and their 16 ups.
"""

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
_TILE = 16
_STEP = 2 * _TILE


@dataclass(frozen=True)
class Linear:
    """One matrix `[n_rows, n_columns]`, in rows or in tiles, and its bias `[n_rows]` in fp32, or None."""

    weight: Tensor
    bias: Tensor | None
    n_rows: int
    n_columns: int
    is_tiled: bool


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
    def of(cls, model: Any, architecture: Architecture, dtype: torch.dtype, *, in_tiles: bool = False) -> Weights:
        """Copy the weights of one of transformers' models, for which `architecture_of` vouches.

        Raises:
            ConfigurationError: a weight is too large for `dtype`.
        """
        return _Copy(model, architecture, dtype, in_tiles=in_tiles).weights()

    @property
    def nbytes(self) -> int:
        """Bytes that one token's forward reads: all matrices, of the embedding only a row."""
        matrices = [
            self.head,
            *(m for layer in self.layers for m in (layer.qkv, layer.output, layer.gate_up, layer.down)),
        ]
        return sum(matrix.weight.nbytes for matrix in matrices)


class _Copy:
    def __init__(self, model: Any, architecture: Architecture, dtype: torch.dtype, *, in_tiles: bool) -> None:
        self._model, self._architecture, self._dtype, self._in_tiles = model, architecture, dtype, in_tiles
        self._is_tied = model.lm_head.weight is model.model.embed_tokens.weight
        self._room = zeros(sum(_padded(rows * columns * dtype.itemsize) for rows, columns in self._shapes()))
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
            self._linear(mlp.gate_proj, mlp.up_proj, in_turn=True),
            self._linear(mlp.down_proj),
            self._norm(layer.input_layernorm),
            self._norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
            self._norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
            self._norm(layer.post_attention_layernorm) if outer else None,
            self._norm(layer.pre_feedforward_layernorm if outer else layer.post_attention_layernorm),
            self._norm(layer.post_feedforward_layernorm) if outer else None,
        )

    def _shapes(self) -> Iterator[tuple[int, int]]:
        """Of each matrix, as it is stored."""
        decoder = self._model.model
        yield self._stored_shape(decoder.embed_tokens)
        if not self._is_tied:
            yield self._stored_shape(self._model.lm_head)
        for layer in decoder.layers:
            attention, mlp = layer.self_attn, layer.mlp
            yield self._stored_shape(attention.q_proj, attention.k_proj, attention.v_proj)
            yield self._stored_shape(attention.o_proj)
            yield self._stored_shape(mlp.gate_proj, mlp.up_proj, in_turn=True)
            yield self._stored_shape(mlp.down_proj)

    def _stored_shape(self, *modules: Any, in_turn: bool = False) -> tuple[int, int]:
        rows, columns = sum(module.weight.shape[0] for module in modules), modules[0].weight.shape[1]
        if not self._in_tiles:
            return rows, columns
        rows = len(modules) * _filled(rows // len(modules)) if in_turn else _filled(rows)
        return rows, _filled(columns)

    def _linear(self, *modules: Any, in_turn: bool = False) -> Linear:
        """The rows of all modules; `in_turn` where tiles take as many from each."""
        rows, columns = self._stored_shape(*modules, in_turn=in_turn)
        nbytes = rows * columns * self._dtype.itemsize
        stored = self._room[self._used : self._used + nbytes].view(self._dtype)
        self._used += _padded(nbytes)
        weights = [module.weight.detach().to("cpu", self._dtype) for module in modules]
        if self._in_tiles:
            self._tile(weights, stored, rows, columns, in_turn=in_turn)
        else:
            stored = stored.view(rows, columns)
            torch.cat(weights, out=stored)
        if self._dtype == torch.float16 and stored.isinf().any() and not any(m.weight.isinf().any() for m in modules):
            raise ConfigurationError("the model has weights beyond the range of torch.float16; take torch.bfloat16")
        n_rows = rows if in_turn else sum(len(weight) for weight in weights)
        return Linear(stored, self._bias(modules), n_rows, weights[0].shape[1], self._in_tiles)

    @staticmethod
    def _tile(weights: list[Tensor], stored: Tensor, rows: int, columns: int, *, in_turn: bool) -> None:
        n = len(weights) if in_turn else 1
        filled = torch.zeros(n, rows // n, columns, dtype=stored.dtype, device="cpu")
        for i, weight in enumerate(weights if in_turn else [torch.cat(weights)]):
            filled[i, : weight.shape[0], : weight.shape[1]] = weight
        pairs = filled.view(n, rows // n // _TILE, _TILE, columns).transpose(0, 1) if in_turn else filled
        parts = pairs.reshape(
            rows // _STEP, 2, _TILE, columns // _STEP, _TILE, 2
        )  # [pair, panel, row, step, two columns, 2]
        stored.view(rows // _STEP, columns // _STEP, 2, _TILE, _TILE, 2).copy_(parts.permute(0, 3, 1, 4, 2, 5))

    @staticmethod
    def _bias(modules: tuple[Any, ...]) -> Tensor | None:
        biases = [getattr(module, "bias", None) for module in modules]
        if all(bias is None for bias in biases):
            return None
        parts = [
            torch.zeros(module.weight.shape[0], dtype=torch.float32, device="cpu")
            if bias is None
            else bias.detach().to("cpu", torch.float32)
            for module, bias in zip(modules, biases, strict=True)
        ]
        return torch.cat(parts)

    def _norm(self, module: Any) -> Tensor:
        weight: Tensor = module.weight.detach().to("cpu", torch.float32) + self._architecture.norm_offset
        return weight.contiguous()


def _filled(n: int) -> int:
    return -(-n // _STEP) * _STEP


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
