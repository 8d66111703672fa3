"""`verify`: the same tokens whole and without a cache, then through the cache in several cuts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from stratakv.codecs import get_codecs
from stratakv.errors import ConfigurationError, UnsupportedError
from stratakv.integrations.transformers import KVCache
from stratakv.integrations.transformers.arguments import check_model, whole_numbers
from stratakv.integrations.transformers.compat import PreTrainedModel, cache_keyword
from stratakv.integrations.transformers.geometry import max_positions
from stratakv.integrations.transformers.quiet import quiet_transformers
from stratakv.policies import RetentionPolicy
from stratakv.spec import CacheSpec
from stratakv.verification.cuts import CUTS, SPARE_TOKENS, Cut, CutRefusedError, Feeder, stacked
from stratakv.verification.oracle import ResidualCache, RoundingCache
from stratakv.verification.report import CutResult, Divergence, VerifyReport

LOGIT_TOLERANCE = 1e-4
"""fp32: largest difference of a logit, relative to the position's largest logit."""
IN_DIGITS = 10.0
"""What kernels may be off more where they meet integers: queries and weights are whole numbers of 14 bits there.

Beside a model in 16 bits they may have 8, which the coarseness of its own numbers allows for.
"""
LAYER_TOLERANCE = 1e-4
"""fp32: L2 distance of a layer's output, relative to its L2 norm, at each token."""


def verify(
    model: PreTrainedModel,
    token_ids: Tensor | list[int],
    *,
    cuts: Mapping[str, Cut] | None = None,
    on_cut: Callable[[str], None] | None = None,
    **options: Any,
) -> VerifyReport:
    """Hold a cache against runs without one.

    Args:
        model: a decoder-only model in eval mode, attached or not.
        token_ids: what to feed, `[n_tokens]` or `[batch, n_tokens]`, all of equal length.
        cuts: ways of feeding them, by name; None: all of `stratakv.verification.cuts.CUTS`.
        on_cut: called with each cut's name before it is fed.
        options: for `KVCache.for_model`: `format`, `layout`, `policy`, ...

    Returns:
        Figures and the first divergence of every cut.

    Raises:
        ConfigurationError: no tokens, ids that the model does not have, or more tokens than it has positions.
        UnsupportedError: the model or the combination is not served.
    """
    check_model(model)
    ids = _checked_ids(model, token_ids)
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedError("verify feeds decoder-only models; `stratakv verify --architectures` covers the others")
    empty = KVCache.for_model(model, **options)
    scale = _rounding(model.dtype)
    if empty.is_attached and {"int8", "int4", "int2"} & {empty.spec.k_format, empty.spec.v_format}:
        scale *= IN_DIGITS
    with torch.no_grad(), quiet_transformers():
        mask = _policy_mask(model, empty.spec, options.get("policy"), ids)
        exact = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        results = []
        for name, cut in (CUTS if cuts is None else cuts).items():
            if on_cut is not None:
                on_cut(name)
            cache = KVCache.for_model(model, **options)
            results.append(_run_cut(name, cut, model, cache, ids, exact, mask, scale))
    spec = empty.spec
    return VerifyReport(
        type(model).__name__,
        ids.shape[1],
        spec.k_format,
        spec.v_format,
        spec.layout,
        empty.is_attached,
        LOGIT_TOLERANCE * scale,
        LAYER_TOLERANCE * scale,
        tuple(results),
    )


def _checked_ids(model: PreTrainedModel, token_ids: Tensor | list[int]) -> Tensor:
    """int64 `[batch, n_tokens]` on the model's device."""
    ids = whole_numbers("token_ids", token_ids).to(model.device)
    if ids.dim() not in (1, 2) or not ids.numel():
        raise ConfigurationError(
            f"token_ids must be [n_tokens] or [batch, n_tokens] with at least one, got {list(ids.shape)}"
        )
    n_known = model.get_input_embeddings().weight.shape[0]
    if int(ids.min()) < 0 or int(ids.max()) >= n_known:
        raise ConfigurationError(f"token_ids must lie in [0, {n_known}), got {int(ids.min())} to {int(ids.max())}")
    limit = max_positions(model)
    if limit is not None and limit < ids.shape[-1] + SPARE_TOKENS:
        raise ConfigurationError(
            f"{ids.shape[-1]:,} tokens, and {SPARE_TOKENS} that cuts take back, are more than the model's {limit:,} "
            "positions"
        )
    return ids if ids.dim() == 2 else ids.unsqueeze(0)


def _run_cut(
    name: str,
    cut: Cut,
    model: PreTrainedModel,
    cache: KVCache,
    ids: Tensor,
    exact: Tensor,
    mask: Tensor | None,
    scale: float,
) -> CutResult:
    feeder = Feeder(model, cache, ids)
    try:
        cut(feeder)
        cache.check()
    except CutRefusedError as refusal:
        return CutResult(name, passed=False, refused=str(refusal))
    except Exception as error:  # a fault of the cache can raise nearly anything in a model
        return CutResult(name, passed=False, raised=f"{type(error).__name__}: {error}")
    oracle = _oracle(model, feeder, mask)
    logits = stacked(feeder.logits)
    assert logits is not None, "a cut must feed every token"
    logits = logits.transpose(0, 1)  # [batch, n_tokens, vocab]
    expected = oracle.logits.float()
    difference = (logits - expected).abs().amax(dim=-1)
    logit_errors = difference / (LOGIT_TOLERANCE * scale * expected.abs().amax(dim=-1).clamp(min=1e-6))
    divergence = _first_divergence(name, logit_errors, _layer_errors(feeder, oracle, scale))
    exact_log, log = exact.double().log_softmax(-1), logits.double().log_softmax(-1)
    kl = float((exact_log.exp() * (exact_log - log)).sum(-1).mean())
    top1 = float((exact.argmax(-1) == logits.argmax(-1)).double().mean())
    return CutResult(name, divergence is None, float(difference.max()), max(kl, 0.0), top1, divergence)


def _oracle(model: PreTrainedModel, feeder: Feeder, mask: Tensor | None) -> Any:
    """All tokens at once: without any cache, or with K/V rounded as the format rounds, where it does.

    Where recent rows are held in 16 bits, a token's K/V depend on which step reads them: then the same steps again.
    """
    spec = feeder.cache.spec
    if spec.recents:
        return _stepped(model, feeder, mask)
    codecs = get_codecs(spec.k_format, spec.v_format)
    inputs: dict[str, Any] = {"input_ids": feeder.token_ids, "attention_mask": mask, "output_hidden_states": True}
    probe = torch.linspace(-3, 3, 1001, dtype=model.dtype, device="cpu")
    if all(torch.equal(codec.rounded(probe), probe) for codec in codecs):
        return model(**inputs, use_cache=False)
    cache = RoundingCache(model.config, codecs, feeder.rows)
    return model(**inputs, use_cache=True, **{cache_keyword(model): cache})


def _stepped(model: PreTrainedModel, feeder: Feeder, mask: Tensor | None) -> Any:
    cache = ResidualCache(model.config, feeder.cache.spec, feeder.rows, feeder.coded)
    outs = [
        model(
            input_ids=feeder.token_ids[:, start:stop],
            attention_mask=None if mask is None else mask[:, :, start:stop, :stop],
            output_hidden_states=True,
            use_cache=True,
            **{cache_keyword(model): cache},
        )
        for start, stop in feeder.steps
    ]
    hidden = None
    if outs[0].hidden_states is not None:
        # What has another length is no output of a layer.
        told = [
            [h for h in out.hidden_states if h.shape[1] == stop - start]
            for out, (start, stop) in zip(outs, feeder.steps, strict=True)
        ]
        hidden = [torch.cat(pieces, dim=1) for pieces in zip(*told, strict=True)]
    return SimpleNamespace(logits=torch.cat([out.logits for out in outs], dim=1), hidden_states=hidden)


def _layer_errors(feeder: Feeder, oracle: Any, scale: float) -> Tensor | None:
    """`[n_tokens, n_layers + 1, batch]`: distance over allowance; None where the model tells no hidden states."""
    layers = stacked(feeder.layers)
    if layers is None or oracle.hidden_states is None:
        return None
    n_tokens = feeder.token_ids.shape[1]
    expected = torch.stack([h.float().transpose(0, 1) for h in oracle.hidden_states if h.shape[1] == n_tokens], dim=1)
    norm = expected.norm(dim=-1).clamp(min=1e-6)
    errors: Tensor = (layers - expected).norm(dim=-1) / (LAYER_TOLERANCE * scale * norm)
    return errors


def _first_divergence(cut: str, logit_errors: Tensor, layer_errors: Tensor | None) -> Divergence | None:
    """The first token, and at it the first layer, whose error is above 1 or not a number."""
    worst = torch.nan_to_num(logit_errors.amax(dim=0), nan=torch.inf)  # [n_tokens]
    at_layers = None
    if layer_errors is not None:
        at_layers = torch.nan_to_num(layer_errors.amax(dim=-1), nan=torch.inf)  # [n_tokens, n_layers + 1]
        worst = torch.maximum(worst, at_layers.amax(dim=1))
    wrong = (worst > 1).nonzero().flatten()
    if not len(wrong):
        return None
    token = int(wrong[0])
    layer = None
    if at_layers is not None and len(bad := (at_layers[token] > 1).nonzero().flatten()):
        layer = max(int(bad[0]) - 1, 0)  # entry 0 is the embedding, entry i the output of layer i - 1
    return Divergence(cut, token, layer, float(worst[token]))


def _policy_mask(model: PreTrainedModel, spec: CacheSpec, policy: RetentionPolicy | None, ids: Tensor) -> Tensor | None:
    """What the policy lets each query see, as an explicit mask `[1, n_heads, n_tokens, n_tokens]` for the oracle."""
    if policy is None:
        return None
    if any(not group.imposed and group.recent_of is None for group in spec.groups):
        raise UnsupportedError(
            "a policy over a model with windows of its own has no oracle: one mask is for all layers"
        )
    n_tokens, first = ids.shape[1], spec.layers[0]
    at = torch.arange(n_tokens, device=ids.device)
    query, key = at[:, None], at[None, :]
    heads = []
    for head in range(first.n_kv_heads):
        kept = policy.retention(first.index, head)
        see = key <= query
        if kept.window is not None:
            see = see & ((key > query - kept.window) | (key < kept.sinks))
        heads.append(see)
    n_query_heads = model.config.num_attention_heads
    return torch.stack(heads).repeat_interleave(n_query_heads // first.n_kv_heads, dim=0)[None]


def _rounding(dtype: torch.dtype) -> float:
    """How much coarser than fp32 the model computes. A cached and an uncached kernel round differently."""
    return max(torch.finfo(dtype).eps / torch.finfo(torch.float32).eps / 64, 1.0)
