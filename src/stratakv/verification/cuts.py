"""Ways of feeding the same tokens through a cache. Every one must give what the whole sequence at once gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stratakv.errors import InvariantError, StateError, StrataKVError
from stratakv.integrations.transformers.compat import PreTrainedModel, cache_keyword
from stratakv.integrations.transformers.layers import KVLayer

WRONG_TOKENS = 5
"""How many tokens that do not belong a cut feeds, to take them back."""
SPARE_TOKENS = 10
"""The most tokens that a cut holds beyond the sequence."""


class CutRefusedError(StrataKVError):
    """Tokens cannot be taken back out of what this model keeps."""


class Feeder:
    """Feeds pieces of one token sequence through a cache, and keeps what came out for each position.

    Args:
        model: in eval mode.
        cache: an empty `KVCache`.
        token_ids: `[batch, n_tokens]`.
    """

    def __init__(self, model: PreTrainedModel, cache: Any, token_ids: Tensor) -> None:
        self.model = model
        self.cache = cache
        self.token_ids = token_ids
        n_tokens = token_ids.shape[1]
        self.logits: list[Tensor | None] = [None] * n_tokens
        self.layers: list[Tensor | None] = [None] * n_tokens  # [n_layers + 1, batch, hidden] of each token
        self.rows: dict[int, tuple[Tensor, Tensor]] = {}  # as the step that brought them read them
        self.coded: dict[int, tuple[Tensor, Tensor]] = {}  # as later steps read them
        self.steps: list[tuple[int, int]] = []
        self._known: dict[tuple[int, int], Tensor] = {}  # bool [n_heads, n_tokens], of what is noted

    def feed(self, start: int, stop: int) -> None:
        """Feed the tokens `[start, stop)`, which must be the next ones."""
        out = self._forward(self.token_ids[:, start:stop])
        hidden = out.hidden_states
        for i in range(start, stop):
            self.logits[i] = out.logits[:, i - start].float()
            if hidden is not None:
                self.layers[i] = torch.stack([h[:, i - start].float() for h in hidden if h.shape[1] == stop - start])
        self.steps.append((start, stop))
        self._keep_rows(start, stop)

    def feed_wrong(self, n_tokens: int) -> None:
        """Feed tokens that do not belong to the sequence, to be taken back afterwards."""
        n_known = self.token_ids.shape[1]
        wrong = self.token_ids[:, torch.arange(n_tokens - 1, -1, -1, device=self.token_ids.device) % n_known] + 1
        self._forward(wrong % self.model.get_input_embeddings().weight.shape[0])

    def take_back(self, n_tokens: int) -> None:
        """Crop the last tokens.

        Raises:
            CutRefusedError: the cache says that it cannot.
        """
        try:
            self.cache.crop(-n_tokens)
        except StateError as error:
            raise CutRefusedError(str(error)) from error

    def _forward(self, ids: Tensor) -> Any:
        keyword = cache_keyword(self.model)
        return self.model(input_ids=ids, **{keyword: self.cache}, use_cache=True, output_hidden_states=True)

    def _keep_rows(self, start: int, stop: int) -> None:
        """Read back what was stored for these tokens."""
        for layer in self.cache.layers:
            if not isinstance(layer, KVLayer):
                continue
            view = self.cache.batch.view(layer.index)
            dtype = self.cache.dtypes[layer.index]
            for part in view.parts:
                new = torch.arange(start, stop, device=self.token_ids.device)
                read = (rows[:, :, start - stop :] for rows in part.read(dtype))
                self._keep(self.rows, layer.index, view.n_kv_heads, part.heads, new, tuple(read))
                if part.recent is not None:
                    own = replace(part, recent=None)
                    self._keep(self.coded, layer.index, view.n_kv_heads, part.heads, own.positions(), own.read(dtype))

    def _keep(
        self,
        kept: dict[int, tuple[Tensor, Tensor]],
        layer: int,
        n_heads: int,
        heads: tuple[int, ...],
        positions: Tensor,
        read: tuple[Tensor, ...],
    ) -> None:
        """Note rows of some heads, at positions `[n_rows]`. What was read once must be read again the same.

        Raises:
            InvariantError: it is not.
        """
        if layer not in kept:
            shape = (len(read[0]), n_heads, self.token_ids.shape[1])
            keys, values = (rows.new_zeros((*shape, rows.shape[-1])) for rows in read)
            kept[layer] = keys, values
        none = torch.zeros(n_heads, self.token_ids.shape[1], dtype=torch.bool, device="cpu")
        known = self._known.setdefault((id(kept), layer), none)
        at, chosen = positions.to(self.token_ids.device), list(heads)
        again = known[chosen][:, positions.cpu()].all(0).to(at.device)
        for target, rows in zip(kept[layer], read, strict=True):
            own = target[:, chosen]
            if not torch.equal(own[:, :, at[again]].nan_to_num(), rows[:, :, again].nan_to_num()):
                raise InvariantError(f"rows of layer {layer} are read in another way than before")
            own[:, :, at] = rows
            target[:, chosen] = own
        known[torch.tensor(chosen, device="cpu")[:, None], positions.cpu()] = True


Cut = Callable[[Feeder], None]


def chunks(size: int) -> Cut:
    """Pieces of `size` tokens."""

    def cut(feeder: Feeder) -> None:
        n = feeder.token_ids.shape[1]
        for start in range(0, n, size):
            feeder.feed(start, min(start + size, n))

    return cut


def prompt_then_decode(feeder: Feeder) -> None:
    """The first three quarters at once, then a token at a time."""
    n = feeder.token_ids.shape[1]
    prompt = max(n * 3 // 4, 1)
    feeder.feed(0, prompt)
    for i in range(prompt, n):
        feeder.feed(i, i + 1)


def fork_in_the_middle(feeder: Feeder) -> None:
    """Half; then a fork goes on with the tokens while the original, in turn with it, is fed others.

    The half is an odd number of tokens, so that the last block is shared half full, and the original writes into it
    after the fork has.
    """
    n = feeder.token_ids.shape[1]
    half = min(n // 2 | 1, n)
    feeder.feed(0, half)
    original, fork = feeder.cache, feeder.cache.fork()
    start = half
    for size in (1, 5, n):
        feeder.cache = fork
        stop = min(start + size, n)
        if stop > start:
            feeder.feed(start, stop)
        start = stop
        feeder.cache = original
        feeder.feed_wrong(3)
    feeder.cache = fork


def truncate_and_refeed(feeder: Feeder) -> None:
    """Twice on the way, wrong tokens are fed and taken back with `crop`."""
    n = feeder.token_ids.shape[1]
    stops = sorted({max(n // 3, 1), max(2 * n // 3, 1), n})
    start = 0
    for stop in stops:
        feeder.feed(start, stop)
        feeder.cache.activate_past_recording()
        feeder.feed_wrong(WRONG_TOKENS)
        feeder.take_back(WRONG_TOKENS)
        start = stop


def roll_back(feeder: Feeder) -> None:
    """Twice on the way, a checkpoint is returned to, twice from wrong tokens."""
    n = feeder.token_ids.shape[1]
    start = 0
    for stop in sorted({max(n // 3, 1), max(2 * n // 3, 1), n}):
        feeder.feed(start, stop)
        mark = feeder.cache.checkpoint()
        for _ in range(2):
            feeder.feed_wrong(WRONG_TOKENS)
            feeder.cache.rollback(mark)
        mark.release()
        start = stop


CUTS: dict[str, Cut] = {
    "one-by-one": chunks(1),
    "chunks-of-7": chunks(7),
    "chunks-of-64": chunks(64),
    "prompt-then-decode": prompt_then_decode,
    "fork-in-the-middle": fork_in_the_middle,
    "truncate-and-refeed": truncate_and_refeed,
    "roll-back": roll_back,
}


def stacked(pieces: Sequence[Tensor | None]) -> Tensor | None:
    """The pieces side by side `[n_tokens, ...]`, or None where one is missing."""
    present = [piece for piece in pieces if piece is not None]
    return torch.stack(present) if len(present) == len(pieces) else None
