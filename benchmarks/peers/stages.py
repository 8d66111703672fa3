"""What is measured of each peer in one visit: a length of prompt, or a batch of requests."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from benchmarks.peers.results import BatchCell, LengthCell

Ask = Callable[..., dict[str, Any]]
"""`ask(verb, **arguments)` of one worker."""

WARM_TOKENS = 1024
FIRST_TOKENS = 8


@dataclass(frozen=True)
class Settings:
    """What a run measures."""

    lengths: tuple[int, ...] = (128, 1024, 4096, 8192)
    rounds: int = 5
    decode_steps: int = 40
    batches: tuple[int, ...] = (8, 32)
    batch_prompt_tokens: int = 128
    batch_new_tokens: int = 64
    threads: int = 2
    timeout: float = 900  # seconds for one request

    @property
    def n_tokens(self) -> int:
        """Tokens of text that all of it needs."""
        return max((*self.lengths, *(n * self.batch_prompt_tokens for n in self.batches)))


class Stage(Protocol):
    """A part of the run. All peers finish it before the next begins."""

    @property
    def title(self) -> str:
        """For whoever watches, and for the JSON."""

    def new_cell(self) -> Any:
        """An empty result."""

    def warm_up(self, ask: Ask) -> None:
        """What every peer may do once before it counts: compile, allocate, plan."""

    def measure(self, ask: Ask, cell: Any) -> None:
        """One round: adds a sample to `cell`."""


@dataclass(frozen=True)
class LengthStage:
    """A prompt, and single tokens after it."""

    tokens: Sequence[int]
    decode_steps: int

    @property
    def title(self) -> str:
        """As in the JSON."""
        return f"length {len(self.tokens)}"

    def new_cell(self) -> LengthCell:
        """An empty result."""
        return LengthCell()

    def warm_up(self, ask: Ask) -> None:
        """The prompt itself, or as much of a long one as brings in all code that it takes."""
        ask("prefill", tokens=list(self.tokens[:WARM_TOKENS]), room=3)
        ask("decode", n=2)

    def measure(self, ask: Ask, cell: LengthCell) -> None:
        """Prefill, then decode."""
        prefill = ask("prefill", tokens=list(self.tokens), room=self.decode_steps + 1)
        decode = ask("decode", n=self.decode_steps)
        cell.prefill.append(len(self.tokens) / prefill["seconds"])
        cell.decode.append(1e3 * statistics.median(decode["seconds"]))
        cell.first_tokens = [prefill["token"], *decode["tokens"]][:FIRST_TOKENS]


@dataclass(frozen=True)
class BatchStage:
    """Requests that come at once and are continued together; the time of their prompts counts."""

    prompts: Sequence[Sequence[int]]
    new_tokens: int

    @property
    def title(self) -> str:
        """As in the JSON."""
        return f"batch {len(self.prompts)}"

    def new_cell(self) -> BatchCell:
        """An empty result."""
        return BatchCell()

    def warm_up(self, ask: Ask) -> None:
        """The same with two new tokens."""
        ask("batch", prompts=self.prompts, new_tokens=2)

    def measure(self, ask: Ask, cell: BatchCell) -> None:
        """All of it, timed as one."""
        answer = ask("batch", prompts=self.prompts, new_tokens=self.new_tokens)
        if answer["output_tokens"] != len(self.prompts) * self.new_tokens:
            raise ValueError(f"{answer['output_tokens']} tokens came back")
        cell.output.append(answer["output_tokens"] / answer["seconds"])
        cell.first_tokens = answer["first"]


def stages(settings: Settings, tokens: Sequence[int]) -> dict[tuple[str, int], Stage]:
    """All parts of a run, by kind ("lengths" or "batches") and number, in order. `tokens` is the text."""
    found: dict[tuple[str, int], Stage] = {}
    for length in settings.lengths:
        found["lengths", length] = LengthStage(tokens[:length], settings.decode_steps)
    size = settings.batch_prompt_tokens
    for n in settings.batches:
        prompts = [list(tokens[i * size : (i + 1) * size]) for i in range(n)]
        found["batches", n] = BatchStage(prompts, settings.batch_new_tokens)
    return found
