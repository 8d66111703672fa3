"""Ways to feed the same tokens through a cache, and the whole forward that each must agree with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from stratakv.verification.zoo.tiny import TinyModel, encoder_states, forward_parameters

N_TOKENS = 24
PREFILL = 16
CHUNK = 7
# Padding of the second row of the padded batch.
PADDING = 7
ENCODER_PADDING = 4


@dataclass(frozen=True)
class Feed:
    """A name, the number of tokens in each forward call, and who counts positions: ``generate`` or the model.

    ``generate`` gives position ids; a bare call leaves them to the model, which asks the cache how long it is.
    """

    name: str
    steps: tuple[int, ...]
    positions: Literal["given", "from-cache"] = "given"


FEEDS = (
    Feed("prefill-then-single", (PREFILL, *([1] * (N_TOKENS - PREFILL)))),
    Feed("single", (1,) * N_TOKENS),
    Feed("chunks", tuple(min(CHUNK, N_TOKENS - start) for start in range(0, N_TOKENS, CHUNK)), "from-cache"),
)
PADDED = Feed("padded", FEEDS[0].steps)


def cache_argument(model: Any) -> str | None:
    """The argument by which the model's forward takes a cache: ``cache``, ``past_key_values``, or None.

    transformers 5.24 calls it ``cache`` and deprecates ``past_key_values``; 5.0 knows only the latter.
    """
    names = forward_parameters(model)
    for name in ("cache", "past_key_values"):
        if name in names:
            return name
    return None


def whole(tiny: TinyModel, inputs: dict[str, Any]) -> Tensor:
    """Logits [batch, tokens, vocabulary] of one forward without a cache."""
    return _logits(tiny.model, {**_own_states(inputs), **_use_cache(tiny.model, wanted=False)})


def fed(tiny: TinyModel, inputs: dict[str, Any], feed: Feed, cache: Any) -> Tensor:
    """Logits [batch, tokens, vocabulary] of the same tokens through ``cache``, ``feed.steps[i]`` tokens in call i."""
    given = _own_states(inputs)
    argument = cache_argument(tiny.model)
    if argument is None:
        raise TypeError(f"{type(tiny.model).__name__}.forward takes no cache")
    parts = [
        _logits(tiny.model, {**part, argument: cache, **_use_cache(tiny.model, wanted=True)})[:, -step:]
        for part, step in zip(_parts(tiny, given, feed.steps), feed.steps, strict=True)
    ]
    return torch.cat(parts, dim=1)


def with_positions(tiny: TinyModel, inputs: dict[str, Any]) -> dict[str, Any]:
    """``inputs`` with position ids [batch, tokens] where the forward takes them, counted as ``generate`` does."""
    name = _positions(tiny)
    if name not in forward_parameters(tiny.model):
        return inputs
    mask = inputs.get(tiny.mask_name, torch.ones_like(inputs[tiny.token_name]))
    return {**inputs, name: (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)}


def inputs_for(tiny: TinyModel, feed: Feed) -> dict[str, Any]:
    """The one row of tokens, with position ids unless ``feed`` leaves them to the model.

    Each has a whole forward of its own to agree with: RoBERTa counts from the padding id on when it counts itself.
    """
    inputs = tiny.inputs(N_TOKENS)
    if feed.positions == "from-cache" and not tiny.needs_positions:
        return inputs
    return with_positions(tiny, inputs)


def padded(tiny: TinyModel, rows: dict[str, Any]) -> dict[str, Any]:
    """``rows`` [2, tokens] of which row 1 is shorter, padded as in a batch of ``generate``.

    A decoder's tokens are padded on the left; of an encoder-decoder, the encoder's side is padded, on the right.
    """
    if tiny.is_encoder_decoder:
        if "attention_mask" not in forward_parameters(tiny.model):
            raise ValueError("the forward takes no mask for the encoder's side")
        mask = torch.ones(rows["encoder_outputs"].last_hidden_state.shape[:2], dtype=torch.long)
        mask[1, -ENCODER_PADDING:] = 0
        return with_positions(tiny, {**rows, "attention_mask": mask})
    ids: Tensor = rows[tiny.token_name]
    mask = torch.ones_like(ids)
    mask[1, :PADDING] = 0
    given = {**rows, tiny.mask_name: mask, tiny.token_name: ids.masked_fill(mask == 0, _padding_id(tiny))}
    return with_positions(tiny, given)


def unpadded(tiny: TinyModel, rows: dict[str, Any], compute: Callable[[dict[str, Any]], Tensor]) -> Tensor:
    """The logits [1, real tokens of row 0 then of row 1, vocabulary] of each row alone, without any padding."""
    found = []
    for row in (0, 1):
        alone = {name: _row(value, row, ENCODER_PADDING * row) for name, value in rows.items()}
        if not tiny.is_encoder_decoder:
            alone[tiny.token_name] = alone[tiny.token_name][:, PADDING * row :]
        found.append(compute(with_positions(tiny, alone)))
    return torch.cat(found, dim=1)


def real(tiny: TinyModel, logits: Tensor) -> Tensor:
    """Logits [2, tokens, vocabulary] of a padded batch in the shape that ``unpadded`` returns."""
    return torch.cat([logits[:1], logits[1:, 0 if tiny.is_encoder_decoder else PADDING :]], dim=1)


def _own_states(inputs: dict[str, Any]) -> dict[str, Any]:
    """A copy with encoder states of its own: MoonshineStreaming adds to the given ones in place."""
    if "encoder_outputs" not in inputs:
        return dict(inputs)
    states = inputs["encoder_outputs"]
    return {**inputs, "encoder_outputs": encoder_states(states.last_hidden_state.clone())}


def _positions(tiny: TinyModel) -> str:
    return "decoder_position_ids" if tiny.is_encoder_decoder else "position_ids"


def _parts(tiny: TinyModel, inputs: dict[str, Any], steps: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The arguments of each call: tokens and positions are sliced, the mask grows, the encoder's side stays whole."""
    start = 0
    for step in steps:
        stop = start + step
        part = dict(inputs)
        part[tiny.token_name] = inputs[tiny.token_name][:, 0 if tiny.whole_ids else start : stop]
        if tiny.mask_name in inputs:
            part[tiny.mask_name] = inputs[tiny.mask_name][:, :stop]
        if _positions(tiny) in inputs:
            part[_positions(tiny)] = inputs[_positions(tiny)][:, 0 if tiny.whole_ids else start : stop]
        yield part
        start = stop


def _logits(model: Any, arguments: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        output = model(**arguments)
    logits: Tensor = output.logits if hasattr(output, "logits") else output[0]
    return logits.float()


def _use_cache(model: Any, *, wanted: bool) -> dict[str, bool]:
    return {"use_cache": wanted} if "use_cache" in forward_parameters(model) else {}


def _padding_id(tiny: TinyModel) -> int:
    padding = getattr(tiny.model.config, "pad_token_id", None)
    return padding if isinstance(padding, int) and 0 <= padding < tiny.vocab_size else 0


def _row(value: Any, row: int, n_padding: int) -> Any:
    if isinstance(value, Tensor):
        return value[row : row + 1]
    states = value.last_hidden_state[row : row + 1]
    return encoder_states(states[:, : states.shape[1] - n_padding])
