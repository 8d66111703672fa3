"""Keys coded channel by channel over groups of rows.

A few channels of keys are much larger than the others, and the same ones in all rows: with a step of its own a channel
harms no other (KIVI, Liu et al. 2024, arXiv:2402.02750).
"""

from __future__ import annotations

import torch
from torch import Tensor

from stratakv.codecs.floats import saturated
from stratakv.codecs.tiles import MOST, TileCodec, in_range, stored
from stratakv.errors import InvariantError
from stratakv.spec import PageLayout

GROUP_ROWS = 64
"""Rows that share parameters, at most: a page's last group has what is left of the page."""


class ChannelCodec(TileCodec):
    """Levels at equal distances, which each channel chooses for a group of rows: `lowest + step * code`.

    A channel with an infinity or NaN is read as NaN in all rows of the group.
    """

    def group_rows(self, block_tokens: int) -> int:
        """64, or a whole page."""
        return min(GROUP_ROWS, block_tokens)

    def parameter_shape(self, head_dim: int, block_tokens: int) -> tuple[int, ...]:
        """Groups; step and lowest level; channels."""
        return -(-block_tokens // GROUP_ROWS), 2, head_dim

    def encode(self, layout: PageLayout, pages: Tensor, block: Tensor, row: Tensor, values: Tensor) -> None:
        """Round whole groups of rows (of the last group of a sequence, its first rows), which follow one another."""
        codes, parameters = self.parts(layout, pages)
        sizes = _group_sizes(block, row)
        at = 0
        for size, n_groups in _stretches(sizes):
            chosen = slice(at, at + size * n_groups)
            at = chosen.stop
            groups = values[chosen].unflatten(0, (n_groups, size)).movedim(2, 1)  # [n_groups, n_heads, size, head_dim]
            new_codes, new_parameters = self._coded(groups)
            rows = self.arrangement.packed(new_codes, self.bits).movedim(1, 2).flatten(0, 1)
            codes[self.arrangement.at(block[chosen], row[chosen])] = rows
            first = slice(chosen.start, chosen.stop, size)
            parameters[block[first], :, row[first] // GROUP_ROWS] = new_parameters

    def take(self, layout: PageLayout, pages: Tensor, block: Tensor, row: Tensor) -> tuple[Tensor, ...]:
        """Packed codes `[n, n_heads, n quads, 4]`, and for each row its group's parameters `[n, n_heads, 2, k_dim]`."""
        codes, parameters = self.parts(layout, pages)
        return codes[self.arrangement.at(block, row)], parameters[block, :, row // GROUP_ROWS]

    def place(self, layout: PageLayout, pages: Tensor, block: Tensor, row: Tensor, stored: tuple[Tensor, ...]) -> None:
        """Scatter the rows of whole groups.

        Raises:
            InvariantError: rows of one group come from different ones. Nothing was written.
        """
        sizes = _group_sizes(block, row)
        first = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        bits = stored[1].view(torch.int16)
        if not torch.equal(bits, bits[first]):
            raise InvariantError("rows of different groups cannot share one, whose parameters they would have to share")
        codes, parameters = self.parts(layout, pages)
        codes[self.arrangement.at(block, row)] = stored[0]
        parameters[block, :, row // GROUP_ROWS] = stored[1]

    def rounded(self, values: Tensor, block_tokens: int = GROUP_ROWS) -> Tensor:
        """Coded and back: rows `[..., n_rows, head_dim]` from the first of a page on."""
        pieces = []
        for page in values.split(block_tokens, dim=-2):
            for group in page.split(GROUP_ROWS, dim=-2):
                codes, parameters = self._coded(group)
                pieces.append(self.decoded(codes, parameters.float().unsqueeze(-3).expand(*codes.shape[:-1], 2, -1)))
        return saturated(torch.cat(pieces, -2), values.dtype)

    def by_row(self, layout: PageLayout, parameters: Tensor) -> Tensor:
        """`[..., block_tokens, 2, head_dim]`."""
        return parameters.repeat_interleave(GROUP_ROWS, -3)[..., : layout.block_tokens, :, :]

    def decoded(self, codes: Tensor, parameters: Tensor) -> Tensor:
        """Levels of codes."""
        step, lowest = parameters.unbind(-2)
        return (lowest + step * codes.float()).clamp(-MOST, MOST)

    def scrub_parameters(self, layout: PageLayout, parameters: Tensor, n_rows: int) -> None:
        """Those of later groups."""
        parameters[..., -(-n_rows // GROUP_ROWS) :, :, :] = 0

    def _coded(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of groups `[..., n_rows, head_dim]`, and their parameters in bf16 `[..., 2, head_dim]`."""
        most = 2**self.bits - 1
        rows, exponent = in_range(groups, (-2,))  # of each channel

        def read(parameters: Tensor) -> Tensor:
            return torch.ldexp(stored(parameters, exponent).float(), -exponent)

        lowest = rows.amin(-2, keepdim=True)
        step = (rows.amax(-2, keepdim=True) - lowest) / most
        is_number = lowest.isfinite() & step.isfinite()
        lowest, step = (read(torch.where(is_number, parameter, torch.nan)) for parameter in (lowest, step))
        codes = torch.where(step > 0, (rows - lowest) / step, 0.0).round().clamp(0, most).nan_to_num(0.0)
        parameters = torch.cat((stored(step, exponent), stored(lowest, exponent)), -2)
        return codes.to(torch.uint8), parameters


def _group_sizes(block: Tensor, row: Tensor) -> Tensor:
    """int64: how many of the rows, which follow one another, lie in each group."""
    pairs = torch.stack((block, row // GROUP_ROWS))
    sizes: Tensor = torch.unique_consecutive(pairs, dim=1, return_counts=True)[1]
    return sizes


def _stretches(sizes: Tensor) -> list[tuple[int, int]]:
    """Runs of equal sizes: (size, how many)."""
    values, counts = torch.unique_consecutive(sizes, return_counts=True)
    return list(zip(values.tolist(), counts.tolist(), strict=True))
