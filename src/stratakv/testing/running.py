"""Ways to run a model with and without a cache, in every version of transformers that is accepted.

The oracle is always a forward without any cache: `uncached_logits`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stratakv.integrations.transformers.compat import PreTrainedModel, cache_keyword
from stratakv.testing.tiny import VOCABULARY


def random_ids(n_sequences: int, n_tokens: int, seed: int = 0) -> Tensor:
    """int64 `[n_sequences, n_tokens]` on torch's default device: ids of a tiny model, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (n_sequences, n_tokens), generator=generator, device="cpu")
    return ids.to(torch.get_default_device())


def cache_argument(model: PreTrainedModel, cache: Any) -> dict[str, Any]:
    """The keyword argument that hands `cache` to the model's `forward` or `generate`."""
    return {cache_keyword(model): cache}


def uncached_logits(model: PreTrainedModel, ids: Tensor, **inputs: Any) -> Tensor:
    """Logits `[n_sequences, n_tokens, vocabulary]` of `ids` in one forward without a cache.

    Args:
        model: a model; of an encoder-decoder, `ids` are the decoder's and `inputs` hold the encoder's `input_ids`.
        ids: int64 `[n_sequences, n_tokens]`.
        inputs: further arguments of the forward.
    """
    with torch.no_grad():
        logits: Tensor = model(**{_ids_name(model): ids}, **inputs, use_cache=False).logits
    return logits


def fed_logits(
    model: PreTrainedModel, cache: Any, ids: Tensor, chunks: Sequence[int] | None = None, **inputs: Any
) -> Tensor:
    """Logits `[n_sequences, n_tokens, vocabulary]` of `ids` fed through `cache`; books are checked after each call.

    Args:
        model: as for `uncached_logits`.
        cache: a `KVCache`; what it holds already comes before `ids`.
        ids: int64 `[n_sequences, n_tokens]`.
        chunks: tokens in each call; None: all in one.
        inputs: further arguments of each forward.
    """
    pieces = []
    for piece in ids.split(list(chunks or [ids.shape[1]]), dim=1):
        with torch.no_grad():
            output = model(**{_ids_name(model): piece}, **cache_argument(model, cache), **inputs, use_cache=True)
        cache.check()
        pieces.append(output.logits)
    return torch.cat(pieces, dim=1)


def assert_logits_equal(found: Tensor, expected: Tensor, tolerance: float = 3e-5) -> None:
    """Fail unless all numbers are finite and `found` is `expected` within `tolerance`, absolute.

    In fp32, and at the size that logits of the tiny models have (some units), rounding stays below 1e-5.
    """
    assert found.shape == expected.shape, f"shapes {tuple(found.shape)} and {tuple(expected.shape)}"
    assert torch.isfinite(found).all(), f"{int((~torch.isfinite(found)).sum())} numbers are not finite"
    difference = float((found - expected).abs().max())
    assert difference <= tolerance, f"logits differ by {difference:.3g}"


def visibility_mask(see: Tensor) -> Tensor:
    """fp32 `[1, n_heads or 1, n_queries, n_rows]`: `see`, bool and perhaps without heads, as additive mask."""
    table = see if see.dim() == 3 else see.unsqueeze(0)
    mask = torch.zeros(table.shape).masked_fill(~table, torch.finfo(torch.float32).min)
    return mask.unsqueeze(0)


def window_visibility(n_tokens: int, window: int, sinks: int = 0) -> Tensor:
    """bool `[n_tokens, n_tokens]`: query i sees the last `window` positions up to i, and the sinks up to i."""
    query, row = torch.arange(n_tokens)[:, None], torch.arange(n_tokens)[None, :]
    return (row <= query) & ((row > query - window) | (row < sinks))


def _ids_name(model: PreTrainedModel) -> str:
    return "decoder_input_ids" if getattr(model.config, "is_encoder_decoder", False) else "input_ids"
