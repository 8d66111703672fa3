"""Rotated rows of few bits: levels at equal distances, which a row chooses for each 128 of its channels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stratakv.codecs.arrangements import GROUP
from stratakv.codecs.rows import RowCodec


class AffineCodec(RowCodec):
    """Codes from 0 on, a step and a lowest level: `lowest + step * code`."""

    rotates = True
    spreads: tuple[float, ...] = (1.0,)
    """Shares of the way from a row's smallest number to its largest that levels may span; the best one is taken."""

    def n_parameters(self, head_dim: int) -> int:
        """The steps of all groups, then their lowest levels."""
        return 2 * -(-head_dim // GROUP)

    def coded(self, rows: Tensor, read: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """The nearest levels."""
        groups = [self._group(group, read) for group in rows.split(GROUP, -1)]
        codes = torch.cat([codes for codes, _, _ in groups], -1)
        parameters = [torch.cat([group[which] for group in groups], -1) for which in (1, 2)]
        return codes.to(torch.uint8), torch.cat(parameters, -1)

    def levels(self, codes: Tensor, parameters: Tensor) -> Tensor:
        """Levels of codes."""
        step, low = (p.repeat_interleave(GROUP, -1)[..., : codes.shape[-1]] for p in parameters.chunk(2, -1))
        return low + step * codes.float()

    def _group(self, rows: Tensor, read: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, step and lowest level of a group of channels."""
        most = 2**self.bits - 1
        least, largest = (bound(rows, -1, keepdim=True) for bound in (torch.amin, torch.amax))
        best: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        for spread in self.spreads:
            span = (largest - least) * spread
            step, low = read(span / most), read((least + largest - span) / 2)
            codes = torch.where(step > 0, (rows - low) / step, 0.0).round().clamp(0, most).nan_to_num(0.0)
            found = (codes, step, low, _summed((low + step * codes - rows).square()))
            if best is not None:
                is_better = found[3] < best[3]
                codes, step, low, error = (
                    torch.where(is_better, new, old) for new, old in zip(found, best, strict=True)
                )
                found = codes, step, low, error
            best = found
        assert best is not None
        return best[0], best[1], best[2]


def _summed(numbers: Tensor) -> Tensor:
    """Sums `[..., 1]` of rows, in an order that does not depend on how many there are."""
    while numbers.shape[-1] > 1:
        half = -(-numbers.shape[-1] // 2)
        rest = numbers[..., half:]
        numbers = torch.cat((numbers[..., : rest.shape[-1]] + rest, numbers[..., rest.shape[-1] : half]), -1)
    return numbers
