"""A state of a batch of sequences, to come back to."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from stratakv.blocks.interrupts import uninterrupted
from stratakv.blocks.memory import Memory
from stratakv.blocks.sequence import Sequence


class Checkpoint:
    """A state to come back to. It holds its blocks until it is released or garbage collected."""

    def __init__(self, memory: Memory, sequences: Seq[Sequence], seen_tokens: int) -> None:
        self.memory = memory
        self.sequences = tuple(memory.fork(sequence, as_checkpoint=True) for sequence in sequences)
        self.seen_tokens = seen_tokens
        self.released = False

    @uninterrupted
    def release(self) -> None:
        """Let go of the blocks; the checkpoint can no longer be rolled back to."""
        self.memory.release(self.sequences)
        self.sequences = ()
        self.released = True
