"""Which model a cache belongs to: enough of it that rows are never mixed up between models."""

from __future__ import annotations

import json
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from stratakv.integrations.transformers.compat import PreTrainedModel
from stratakv.integrations.transformers.geometry import decoder_config

SAMPLED_VALUES = 4096
"""Of a tensor with more values than this, this many are hashed, evenly spread, beside its shape and dtype."""

_NOT_IDENTITY = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "architectures")


def model_identity(model: PreTrainedModel) -> dict[str, str]:
    """What a cache file says of its model, field by field, so that a refusal can name what differs.

    `weights` is a digest over names, shapes, dtypes and values of all parameters and buffers; of tensors with more
    than `SAMPLED_VALUES` values, that many evenly spread ones. A change to a few single weights of a large tensor can
    go unseen; another checkpoint, an adapter merged or loaded, or another quantisation cannot.
    """
    config = decoder_config(model.config)
    plain = {key: value for key, value in config.to_dict().items() if key not in _NOT_IDENTITY}
    rope = {key: plain[key] for key in ("rope_parameters", "rope_theta", "rope_scaling") if plain.get(key) is not None}
    digest = blake3()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(_sampled(tensor))
    return {
        "architecture": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "rope": _canonical(rope),
        "config": blake3(_canonical(plain).encode()).hexdigest(length=16),
        "weights": digest.hexdigest(length=16),
    }


def _sampled(tensor: Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    if flat.numel() > SAMPLED_VALUES:
        at = torch.linspace(0, flat.numel() - 1, SAMPLED_VALUES, dtype=torch.float64, device="cpu").long()
        flat = flat[at.to(flat.device)]
    return flat.cpu().contiguous().view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _canonical(data: Any) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), default=str)
