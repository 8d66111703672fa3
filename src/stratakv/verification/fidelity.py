"""What a format or a policy costs: a cache that rounds or lets rows go, against none, on the same tokens."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stratakv.errors import ConfigurationError, UnsupportedError
from stratakv.integrations.transformers import KVCache
from stratakv.integrations.transformers.arguments import check_model, whole_numbers
from stratakv.integrations.transformers.compat import PreTrainedModel, cache_keyword
from stratakv.integrations.transformers.quiet import quiet_transformers
from stratakv.units import whole
from stratakv.verification.scoring import Scorer, Scores

PREFILLED = 256
"""Tokens that are fed at once, and not scored."""
_OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj")  # what mixes the heads' outputs, in one model or another


@dataclass(frozen=True, slots=True)
class FidelityReport(Scores):
    """One cache configuration against none: the scores, of predictions after `prefilled` tokens, and what it takes.

    Attributes:
        model: its class.
        k_format: how keys were stored.
        v_format: how values were.
        policy: name of the policy, or None.
        n_sequences: texts, fed side by side.
        n_tokens: of each.
        output_errors: by layer and query head, the relative L2 error of what the head gives, over all that was scored;
            empty where the model's attention has no linear layer that mixes heads.
        bytes_per_token: allocated at the end, over all tokens of all texts.
        marginal_bytes_per_token: what one more token of one text takes; the rest is fixed.
        seconds_per_token: of a decode step, the median.
    """

    model: str
    k_format: str
    v_format: str
    policy: str | None
    n_sequences: int
    n_tokens: int
    output_errors: tuple[tuple[float, ...], ...]
    bytes_per_token: float
    marginal_bytes_per_token: int
    seconds_per_token: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**dataclasses.asdict(self), "perplexity_change": self.perplexity_change}


def fidelity(
    model: PreTrainedModel,
    text: Any,
    *,
    tokenizer: Any = None,
    prefilled: int = PREFILLED,
    on_step: Callable[[int, int], None] | None = None,
    **options: Any,
) -> FidelityReport:
    """Feed a text through a cache, `prefilled` tokens at once and then one at a time, and compare with no cache.

    The model should compute in fp32, so that the cache is all that rounds.

    Args:
        model: a decoder-only model in eval mode, attached or not.
        text: with a `tokenizer` text; otherwise token ids, `[n_tokens]` or `[n_sequences, n_tokens]`.
        tokenizer: of the model.
        prefilled: tokens that are fed at once first. What follows them is scored.
        on_step: called with (tokens fed, tokens in all) now and then.
        options: for `KVCache.for_model`: `format`, `residual`, `policy`, ...

    Raises:
        ConfigurationError: no text, or not more tokens than `prefilled`.
        UnsupportedError: the model or the combination is not served.
    """
    check_model(model)
    prefilled = whole("prefilled", prefilled)
    ids = _token_ids(model, text, tokenizer)
    n_sequences, n_tokens = ids.shape
    if not 0 < prefilled < n_tokens:
        raise ConfigurationError(f"of {n_tokens} tokens some must be left to score, {prefilled} are prefilled")
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedError("fidelity feeds decoder-only models")
    cache = KVCache.for_model(model, **options)
    policy = options.get("policy")
    with torch.no_grad(), quiet_transformers():
        with _outputs(model) as exact_outputs:
            exact = torch.cat(
                [model(input_ids=row[None], use_cache=False).logits[:, prefilled - 1 : -1] for row in ids]
            )
        with _outputs(model) as outputs:
            scores, seconds = _scored(model, cache, ids, prefilled, exact, on_step)
    return FidelityReport(
        **dataclasses.asdict(scores),
        model=type(model).__name__,
        k_format=cache.spec.k_format,
        v_format=cache.spec.v_format,
        policy=None if policy is None else policy.name,
        n_sequences=n_sequences,
        n_tokens=n_tokens,
        output_errors=_head_errors(model, outputs, exact_outputs, n_sequences, prefilled),
        bytes_per_token=cache.batch.memory.nbytes / (n_sequences * n_tokens),
        marginal_bytes_per_token=cache.spec.bytes_per_token(),
        seconds_per_token=seconds,
    )


def _token_ids(model: PreTrainedModel, text: Any, tokenizer: Any) -> Tensor:
    if tokenizer is not None:
        if not isinstance(text, str) or not text:
            raise ConfigurationError(f"with a tokenizer the text is a string that is not empty, got {type(text)}")
        text = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    ids = whole_numbers("text", text).to(model.device)
    if ids.dim() not in (1, 2) or not ids.numel():
        raise ConfigurationError(f"token ids are [n_tokens] or [n_sequences, n_tokens], got {tuple(ids.shape)}")
    return ids if ids.dim() == 2 else ids.unsqueeze(0)


def _scored(
    model: PreTrainedModel,
    cache: KVCache,
    ids: Tensor,
    prefilled: int,
    exact: Tensor,
    on_step: Callable[[int, int], None] | None,
) -> tuple[Scores, float]:
    """Feed `ids`, and hold each prediction against `exact`, logits `[n_sequences, n_scored, vocabulary]`.

    Returns:
        What was found, and the median of a step's seconds.
    """
    keyword, n_tokens = cache_keyword(model), ids.shape[1]
    scorer, times = Scorer(), []
    edges = [0, *range(prefilled, n_tokens)]
    for i, (start, stop) in enumerate(itertools.pairwise(edges)):
        began = time.perf_counter()
        logits = model(input_ids=ids[:, start:stop], use_cache=True, **{keyword: cache}).logits[:, -1]
        times.append(time.perf_counter() - began)
        scorer.add(logits, exact[:, i], ids[:, stop])
        if on_step is not None and (stop % 64 == 0 or stop == n_tokens - 1):
            on_step(stop, n_tokens - 1)
    steps = torch.tensor(times[1:] or times, device="cpu")
    return scorer.scores(), float(steps.median())


@contextmanager
def _outputs(model: PreTrainedModel) -> Iterator[dict[int, list[Tensor]]]:
    """While it lasts, what attention of each layer gives before heads are mixed goes into the dict, on the CPU."""
    found: dict[int, list[Tensor]] = {}
    handles = []
    for module in model.modules():
        layer = getattr(module, "layer_idx", None)
        mixer = next((getattr(module, name) for name in _OUTPUTS if hasattr(module, name)), None)
        if isinstance(layer, int) and isinstance(mixer, torch.nn.Module):
            found[layer] = []

            def keep(_: Any, inputs: tuple[Tensor, ...], layer: int = layer) -> None:
                found[layer].append(inputs[0].detach().to("cpu", torch.float32))

            handles.append(mixer.register_forward_pre_hook(keep))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _head_errors(
    model: PreTrainedModel,
    outputs: dict[int, list[Tensor]],
    exact: dict[int, list[Tensor]],
    n_sequences: int,
    prefilled: int,
) -> tuple[tuple[float, ...], ...]:
    n_heads = getattr(model.config, "num_attention_heads", None)
    if not isinstance(n_heads, int) or not all(outputs.values()) or not all(exact.values()):
        return ()
    errors = []
    for layer in sorted(outputs):
        own = torch.cat([piece.reshape(n_sequences, -1, piece.shape[-1]) for piece in outputs[layer]], 1)
        right = torch.cat([piece.reshape(1, -1, piece.shape[-1]) for piece in exact[layer]], 0)[:, : own.shape[1]]
        if own.shape != right.shape or own.shape[-1] % n_heads:
            return ()
        own, right = (x[:, prefilled - 1 :].unflatten(-1, (n_heads, -1)).double() for x in (own, right))
        error, size = ((x * x).sum(dim=(0, 1, 3)).sqrt() for x in (own - right, right))
        error = error / size.clamp(min=1e-30)
        errors.append(tuple(x if math.isfinite(x) else math.inf for x in error.tolist()))
    return tuple(errors)
