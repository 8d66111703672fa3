"""Ways to feed the same tokens through a cache, and the whole forward that each must agree with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stratakv.verify.zoo.tiny import TinyModel, forward_parameters

N_TOKENS = 24
PREFILL = 16
CHUNK = 7
# Left padding of the second row of the padded batch.
PADDING = 7


@dataclass(frozen=True)
class Feed:
    """A name and the number of tokens in each forward call; ``padded``: a left-padded batch of two."""

    name: str
    steps: tuple[int, ...]


FEEDS = (
    Feed("prefill-then-single", (PREFILL, *([1] * (N_TOKENS - PREFILL)))),
    Feed("single", (1,) * N_TOKENS),
    Feed("chunks", tuple(min(CHUNK, N_TOKENS - start) for start in range(0, N_TOKENS, CHUNK))),
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
    return _logits(tiny.model, {**inputs, **_use_cache(tiny.model, wanted=False)})


def fed(tiny: TinyModel, inputs: dict[str, Any], steps: Sequence[int], cache: Any) -> Tensor:
    """Logits [batch, tokens, vocabulary] of the same tokens through ``cache``, ``steps[i]`` tokens in call i."""
    argument = cache_argument(tiny.model)
    if argument is None:
        raise TypeError(f"{type(tiny.model).__name__}.forward takes no cache")
    parts = [
        _logits(tiny.model, {**part, argument: cache, **_use_cache(tiny.model, wanted=True)})
        for part in _parts(tiny, inputs, steps)
    ]
    return torch.cat(parts, dim=1)


def padded(tiny: TinyModel, rows: dict[str, Any]) -> dict[str, Any]:
    """``rows`` [2, tokens] with the first ``PADDING`` tokens of row 1 masked, and positions counted as generate does."""
    ids: Tensor = rows[tiny.token_name]
    mask = torch.ones_like(ids)
    mask[1, :PADDING] = 0
    given = {**rows, tiny.mask_name: mask}
    given[tiny.token_name] = ids.masked_fill(mask == 0, _padding_id(tiny))
    positions = f"decoder_{_POSITIONS}" if tiny.is_encoder_decoder else _POSITIONS
    if positions in forward_parameters(tiny.model):
        given[positions] = (mask.cumsum(-1) - 1).clamp(min=0)
    return given


def unpadded(tiny: TinyModel, rows: dict[str, Any], compute: Callable[[dict[str, Any]], Tensor]) -> list[Tensor]:
    """The two rows of a padded batch, each alone and without its padding: logits [1, tokens, vocabulary] each."""
    found = []
    for row, start in ((0, 0), (1, PADDING)):
        alone = {name: _row(value, row) for name, value in rows.items()}
        alone[tiny.token_name] = alone[tiny.token_name][:, start:]
        found.append(compute(alone))
    return found


_POSITIONS = "position_ids"


def _parts(tiny: TinyModel, inputs: dict[str, Any], steps: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The arguments of each call: tokens and positions are sliced, the mask grows, the encoder's side stays whole."""
    start = 0
    for step in steps:
        stop = start + step
        part = dict(inputs)
        part[tiny.token_name] = inputs[tiny.token_name][:, start:stop]
        if tiny.mask_name in inputs:
            part[tiny.mask_name] = inputs[tiny.mask_name][:, :stop]
        for name in (_POSITIONS, f"decoder_{_POSITIONS}"):
            if name in inputs:
                part[name] = inputs[name][:, start:stop]
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


def _row(value: Any, row: int) -> Any:
    if isinstance(value, Tensor):
        return value[row : row + 1]
    return type(value)(last_hidden_state=value.last_hidden_state[row : row + 1])
