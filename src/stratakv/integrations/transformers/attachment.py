"""`attach`: let a transformers model compute attention with our function, after proving that it may."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from stratakv.errors import StrataKVError, UnsupportedError
from stratakv.integrations.transformers import recurrent
from stratakv.integrations.transformers.arguments import check_model
from stratakv.integrations.transformers.attention import register
from stratakv.integrations.transformers.cache import KVCache
from stratakv.integrations.transformers.compat import PreTrainedModel, cache_keyword, forward_parameters
from stratakv.integrations.transformers.geometry import attention_config, decoder_config, template_layers
from stratakv.integrations.transformers.native import NativeForward
from stratakv.integrations.transformers.quiet import quiet_transformers
from stratakv.integrations.transformers.state import ATTENTION_NAME

PROBE_TOKENS = 12
PROBE_CHUNKS = (7, 1, 1, 3)
PROBE_CHUNKS_OF_STATES = (9, 1, 1, 1)
"""Many models with recurrent states take several tokens in the first forward only, whatever cache they use."""
_OWN = "_attention_before_stratakv"
"""Where an attached model remembers what `detach` gives back, for whoever attaches it again."""


@dataclass(frozen=True)
class Attachment:
    """What `attach` did.

    Attributes:
        model: the model.
        replaced: its configs and the attention that they named.
        max_abs: the largest difference that the probe saw in the logits.
        scale: their size.
    """

    model: PreTrainedModel
    replaced: Mapping[int, tuple[Any, str]]
    max_abs: float
    scale: float

    @property
    def is_native(self) -> bool:
        """Whether the native runner takes the forwards that it can."""
        return isinstance(vars(self.model).get("forward"), NativeForward)

    @property
    def native_reason(self) -> str | None:
        """Why the last forward of a model that `is_native` was its own in torch; None: the runner took it."""
        forward = vars(self.model).get("forward")
        return forward.reason if isinstance(forward, NativeForward) else "the model is not attached with native=True"

    def detach(self) -> None:
        """Give the model its own attention back, and its own forward."""
        _restore(self.replaced)
        for module in _parts(self.model):
            vars(module).pop(_OWN, None)
        if self.is_native:
            del self.model.forward


def attach(
    model: PreTrainedModel, *, probe_inputs: Mapping[str, Tensor] | None = None, native: bool = False
) -> Attachment:
    """Register our attention and mask functions and make `model` use them.

    The model is run once without a cache, and once through a `KVCache` with our attention, on a few tokens. Where the
    two differ, or a number is not finite, the model does something between storing keys and attending to them that
    our function does not see: it is refused and left as it was.

    Args:
        model: a transformers model in eval mode.
        probe_inputs: what the probe feeds beside its tokens, for models that need more than `input_ids` (an encoder's
            `input_features`, say); `input_ids` or `decoder_input_ids` here replace the probe's own.
        native: let a `NativeRunner` compute whole forwards over a `KVCache`, attention and all else, where they ask for
            logits of further tokens and nothing else; all other forwards run as without. It holds the weights once
            more. A model of the Llama family, in RAM.

    Raises:
        UnsupportedError: with the reason. CapacityError: no room for the weights. The model is as it was.
        ConfigurationError: it is no model.
    """
    check_model(model)
    was_attached = attention_config(model)._attn_implementation == ATTENTION_NAME
    attachment = _attach(model, probe_inputs)
    before = vars(model).get("forward") if attachment.is_native else None
    if not native or (before is not None and before.is_current):
        return attachment
    try:
        if before is not None:
            del model.forward  # the runner is made from the model as its class is
        model.forward = NativeForward(model)
    except BaseException:
        if not was_attached:
            attachment.detach()
        elif before is not None:
            model.forward = before
        raise
    return attachment


def _attach(model: PreTrainedModel, probe_inputs: Mapping[str, Tensor] | None) -> Attachment:
    config = attention_config(model)
    if config._attn_implementation == ATTENTION_NAME:
        return Attachment(model, _implementations(model), 0.0, 1.0)
    register()
    name = type(model).__name__
    before = _implementations(model)
    try:
        with torch.no_grad(), quiet_transformers():
            inputs = _probe_inputs(model, probe_inputs)
            expected = _logits(model, inputs, use_cache=False)
            model.set_attn_implementation(ATTENTION_NAME)
            if config._attn_implementation != ATTENTION_NAME:
                raise UnsupportedError(f"{name} computes attention in code of its own and takes no other function")
            found = _cached_logits(model, inputs)
    except Exception as error:
        _restore(before)
        if isinstance(error, StrataKVError):
            raise UnsupportedError(f"{name} cannot be attached: {error}") from error
        raise UnsupportedError(
            f"{name} cannot be attached, the probe failed: {type(error).__name__}: {error}"
        ) from error
    except BaseException:
        _restore(before)
        raise
    max_abs, scale = float((found - expected).abs().max()), float(expected.abs().max())
    if not torch.isfinite(expected).all():
        reason = "its own output is not finite"
    elif not torch.isfinite(found).all():
        reason = "it changes keys or values after storing them, or attends in code of its own (the output is NaN)"
    elif max_abs > _tolerance(model.dtype) * max(scale, 1.0):
        reason = (
            f"its logits differ by {max_abs:.3g} at a size of {scale:.3g}: its attention has a term ours does not see"
            + (", or its dropout is at work: call model.eval()" if model.training else "")
        )
    else:
        for module in _parts(model):
            vars(module)[_OWN] = before
        return Attachment(model, before, max_abs, scale)
    _restore(before)
    raise UnsupportedError(f"{name} cannot be attached: {reason}")


def _tolerance(dtype: torch.dtype) -> float:
    """Relative to the largest logit. In fp32 rounding stays below 1e-5; half precision rounds after every layer."""
    return 1e-4 if dtype == torch.float32 else 16 * torch.finfo(dtype).eps if dtype.itemsize < 4 else 1e-8


def _probe_inputs(model: PreTrainedModel, given: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    config = decoder_config(model.config)
    inputs = dict(given or {})
    is_encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    ids_name = "decoder_input_ids" if is_encoder_decoder else "input_ids"
    special = [getattr(config, f"{kind}_token_id", None) for kind in ("pad", "bos", "eos", "unk", "mask")]
    hidden = {i for ids in special for i in (ids if isinstance(ids, list) else [ids])}
    usable = [i for i in range(config.vocab_size - 1, 0, -1) if i not in hidden][:997]
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(usable), (1, PROBE_TOKENS), generator=generator, device="cpu")
    ids = inputs.setdefault(ids_name, torch.tensor(usable, device="cpu")[picks].to(model.device))
    if is_encoder_decoder and model.main_input_name == "input_ids":
        inputs.setdefault("input_ids", ids.flip(1))
    if not is_encoder_decoder and "position_ids" in forward_parameters(model):
        # As `generate` does: some models count from 0 in every forward that is not told.
        inputs.setdefault("position_ids", torch.arange(ids.shape[1], device=ids.device).expand(ids.shape))
    return inputs


def _cached_logits(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    cache = KVCache.for_model(model)
    sliced = ("decoder_input_ids",) if "decoder_input_ids" in inputs else ("input_ids", "position_ids")
    n_tokens = inputs[sliced[0]].shape[1]
    sizes = PROBE_CHUNKS_OF_STATES if any(map(recurrent.has_states, template_layers(model.config))) else PROBE_CHUNKS
    starts = [start for start in accumulate(sizes, initial=0) if start < n_tokens]
    pieces = []
    for start, stop in pairwise([*starts, n_tokens]):
        piece = {name: value[:, start:stop] if name in sliced else value for name, value in inputs.items()}
        pieces.append(_logits(model, piece, **{cache_keyword(model): cache}, use_cache=True))
    return torch.cat(pieces, dim=1)


def _logits(model: PreTrainedModel, inputs: Mapping[str, Tensor], **options: Any) -> Tensor:
    output = model(**copy.deepcopy(dict(inputs)), **options)  # some models change what they are given in place
    logits = output.logits if hasattr(output, "logits") else output[0]
    assert isinstance(logits, Tensor)
    return logits.float()


def _parts(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The model, and what it has inside that could be attached by itself."""
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def _implementations(model: PreTrainedModel) -> dict[int, tuple[Any, str]]:
    """Every config in the model, with the attention that it names; the one before, or sdpa, where it names ours."""
    found = {}
    parts = _parts(model)
    # A copy of a model has what its original remembers, about configs of its own.
    before = {id(config): name for part in parts for config, name in vars(part).get(_OWN, {}).values()}
    configs = [part.config for part in parts]
    while configs:
        config = configs.pop()
        if id(config) not in found:
            own = config._attn_implementation_internal
            found[id(config)] = (config, before.get(id(config), "sdpa") if own == ATTENTION_NAME else own)
            configs.extend(sub for key in config.sub_configs if (sub := getattr(config, key, None)) is not None)
    return found


def _restore(implementations: Mapping[int, tuple[Any, str]]) -> None:
    for config, implementation in implementations.values():
        config._attn_implementation_internal = implementation
