"""How far predictions are from exact ones, whoever made them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stratakv.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Scores:
    """Predictions against exact ones.

    Attributes:
        n_scored: predictions that were compared.
        kl: mean KL divergence of the next token's distribution from the exact one, in nats.
        kl_p99: its 99th percentile.
        top1: share of predictions whose likeliest token is the exact one's.
        perplexity: of the tokens that followed.
        exact_perplexity: of the same tokens, by the exact predictions.
    """

    n_scored: int
    kl: float
    kl_p99: float
    top1: float
    perplexity: float
    exact_perplexity: float

    @property
    def perplexity_change(self) -> float:
        """Relative to the exact one."""
        return self.perplexity / self.exact_perplexity - 1


class Scorer:
    """Takes predictions as they come and keeps a few numbers of each, not their logits."""

    def __init__(self) -> None:
        self._kl: list[Tensor] = []
        self._agree: list[Tensor] = []
        self._losses: list[Tensor] = []

    def add(self, logits: Tensor, exact: Tensor, next_ids: Tensor) -> None:
        """Compare predictions, in fp64.

        Args:
            logits: those to judge, `[n, vocabulary]`.
            exact: those to judge by, `[n, vocabulary]`.
            next_ids: the tokens that followed, int64 `[n]`.

        Raises:
            ConfigurationError: the shapes do not fit together.
        """
        if logits.dim() != 2 or logits.shape != exact.shape or next_ids.shape != logits.shape[:1]:
            shapes = ", ".join(str(tuple(x.shape)) for x in (logits, exact, next_ids))
            raise ConfigurationError(f"logits are [n, vocabulary] twice and token ids [n], got {shapes}")
        found, right = (x.double().log_softmax(-1) for x in (logits, exact))
        self._kl.append((right.exp() * (right - found)).sum(-1).clamp(min=0))
        self._agree.append((found.argmax(-1) == right.argmax(-1)).double())
        self._losses.append(torch.cat([-x.gather(-1, next_ids[:, None]) for x in (found, right)], -1))

    def scores(self) -> Scores:
        """Of all that was added.

        Raises:
            ConfigurationError: that was nothing.
        """
        if not self._kl:
            raise ConfigurationError("no prediction was added, so there is nothing to score")
        kl = torch.cat(self._kl)
        perplexity, exact_perplexity = torch.cat(self._losses).mean(0).exp().tolist()
        return Scores(
            kl.numel(),
            float(kl.mean()),
            float(kl.quantile(0.99)),
            float(torch.cat(self._agree).mean()),
            perplexity,
            exact_perplexity,
        )
