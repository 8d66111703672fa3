"""A batch of sequences that advance together, a step at a time. Every step is a transaction."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from torch import Tensor

from stratakv.blocks.checkpoint import Checkpoint
from stratakv.blocks.eviction import Changes, compactions, evictions
from stratakv.blocks.geometry import rows_coded_together
from stratakv.blocks.groups import write_groups
from stratakv.blocks.interrupts import uninterrupted
from stratakv.blocks.memory import Memory
from stratakv.blocks.plans import Plans, Step
from stratakv.blocks.sequence import Sequence
from stratakv.blocks.view import KVPart, KVView
from stratakv.errors import CapacityError, ConfigurationError, StateError, UnsupportedError
from stratakv.plan import KeepPlan, ReadPlan, WritePlan
from stratakv.policies import RetentionPolicy
from stratakv.spec import LayerSpec
from stratakv.tensors import described, has_numbers
from stratakv.units import whole


class SequenceBatch:
    """Sequences of equal length over one memory.

    A step begins with `begin`, which makes room in all groups or changes nothing. Each layer then writes its rows
    once. With the last layer's rows the step is complete and `seen_tokens` advances. A step that stops half way is
    undone by `abort` (or by truncating to `seen_tokens`); beginning another one over it is refused, since the tokens
    of the first would be half there.

    Args:
        memory: where the blocks are.
        policy: decides for the groups that it limits; windows of the model's own are kept in any case.
    """

    def __init__(self, memory: Memory, policy: RetentionPolicy | None = None) -> None:
        self.memory = memory
        self.policy = policy
        self.sequences: list[Sequence] = []
        self.seen_tokens = 0
        self.recording = False
        """While set, rows that leave a window stay until `evict`, so that drafts can be taken back."""
        self._step: Step | None = None
        self._complete: Step | None = None  # the last step, whose views are still in use
        self._plans = Plans(memory)

    @property
    def stored_tokens(self) -> int:
        """Rows stored in the group that stores most, those of an incomplete step left out."""
        open_rows = self._step.n_tokens if self._step else 0
        return max((sequence.stored_tokens for sequence in self.sequences), default=0) - open_rows

    @property
    def open_step(self) -> Step | None:
        """The step under way, if one is."""
        return self._step

    @uninterrupted
    def begin(self, n_sequences: int, n_tokens: int) -> None:
        """Start a step of `n_tokens` new tokens for each of `n_sequences`.

        Raises:
            StateError: the last step is incomplete, or the cache holds another number of sequences.
            CapacityError: there is no room. In each case nothing was changed.
            ConfigurationError: a number that is not at least 1.
        """
        n_sequences, n_tokens = whole("n_sequences", n_sequences), whole("n_tokens", n_tokens)
        if min(n_sequences, n_tokens) < 1:
            raise ConfigurationError(f"a step has sequences and tokens, got {n_sequences} and {n_tokens}")
        if self._step is not None:
            missing = sorted(self.memory.spec.layers_by_index.keys() - self._step.written)
            raise StateError(
                f"the last forward stopped before layers {missing} had written their tokens; call "
                f"truncate({self.seen_tokens}) to take back what it left, then feed its tokens again"
            )
        if self.sequences and len(self.sequences) != n_sequences:
            raise StateError(f"the cache holds {len(self.sequences)} sequences, this forward has {n_sequences}")
        changes = [] if self.recording else self._evictions()
        is_first = not self.sequences
        if is_first:
            self.sequences = [self.memory.new_sequence() for _ in range(n_sequences)]
        try:
            self.memory.append(self.sequences, n_tokens, changes)
        except BaseException as error:
            if is_first:
                self.sequences = []
            if not isinstance(error, CapacityError):
                self._complete = None  # rows that it reads may have left
            raise
        self._complete = None
        self._step = Step(n_tokens)

    def write(self, layer: int, keys: Tensor, values: Tensor) -> KVView:
        """Store one layer's new rows in the open step, and give what its attention may read.

        Args:
            layer: the model's layer index.
            keys: `[n_sequences, n_kv_heads, n_tokens, k_dim]`.
            values: `[n_sequences, n_kv_heads, n_tokens, v_dim]`.

        Raises:
            StateError: the tensors do not fit the step or what the layer stored before.
            ConfigurationError: tensors that hold no numbers. In each case nothing was changed.
        """
        step = self._step
        if step is None or layer in step.written:
            raise StateError(f"layer {layer} has no step to write in")
        self._check_shapes(layer, step, keys, values)
        for g, m in self.memory.spec.locations[layer]:
            heads = self.memory.spec.groups[g].members[m].heads
            every = len(heads) == keys.shape[1]
            part = (keys, values) if every else (keys[:, heads], values[:, heads])
            for held in (g, self.memory.spec.recents.get(g)):
                if held is not None:
                    self.memory.arenas[held].write(m, self._plans.write(self.sequences, step, held), *part)
            if rows_coded_together(self.memory.spec.groups[g]) > 1:
                write_groups(self.memory, self._plans, self.sequences, step, (g, m), part)
        step.written.add(layer)
        if len(step.written) == len(self.memory.spec.layers):
            self._commit(step)
        return self.view(layer)

    def plans(self) -> list[tuple[ReadPlan, WritePlan]]:
        """For a runner that writes by itself: what queries of the open step read in each group, and where its rows go.

        What is read includes the new rows, the last ones, in groups whose rows are not in another group as well.
        """
        step = self._step
        if step is None:
            raise StateError("no step is open")
        seen, plans = self.seen_tokens + step.n_tokens, self._plans
        groups = range(len(self.memory.arenas))
        return [(plans.read(self.sequences, step, g, seen), plans.write(self.sequences, step, g)) for g in groups]

    def write_groups(self) -> None:
        """For a runner that writes by itself: write those rows of the open step that are coded in groups.

        All others are written.
        """
        step = self._step
        if step is None:
            raise StateError("no step is open")
        for g, group in enumerate(self.memory.spec.groups):
            if rows_coded_together(group) > 1:
                for m in range(len(group.members)):
                    write_groups(self.memory, self._plans, self.sequences, step, (g, m))

    @uninterrupted
    def complete(self) -> None:
        """For a runner that writes by itself: every layer has written its rows of the open step."""
        step = self._step
        if step is None or step.written:
            raise StateError("no step is open, or some of its layers were written one by one")
        step.written.update(self.memory.spec.layers_by_index)
        self._commit(step)

    @uninterrupted
    def abort(self) -> None:
        """Undo the open step. An empty cache forgets how many sequences it was to have."""
        self._step = None
        if self.seen_tokens:
            self.memory.truncate(self.sequences, self.seen_tokens)
        else:
            self.reset()

    def layer_length(self, layer: int) -> int:
        """Tokens that `layer` has seen: those of an open step count once the layer has written them."""
        step = self._step
        return self.seen_tokens + (step.n_tokens if step and layer in step.written else 0)

    def view(self, layer: int) -> KVView:
        """The rows of one layer: during and after a step those that the step reads, else all that are stored."""
        spec = self.memory.spec
        step = self._step if self._step and layer in self._step.written else self._complete
        n_new = step.n_tokens if step else 0
        seen = self.layer_length(layer)
        parts = []
        for g, m in spec.locations[layer]:
            recent = spec.recents.get(g)
            parts.append(
                self._part(step, g, m, seen, None if recent is None else self._part(step, recent, m, seen, None))
            )
        shape = spec.layers_by_index[layer]
        sizes = (len(self.sequences), shape.n_kv_heads, shape.k_dim, shape.v_dim)
        return KVView(layer, *sizes, seen - n_new, n_new, tuple(parts))

    def _part(self, step: Step | None, g: int, m: int, seen: int, recent: KVPart | None) -> KVPart:
        spec = self.memory.spec
        group = spec.groups[g]
        limit = group if group.recent_of is None else spec.groups[group.recent_of]
        plan = self._plans.read(self.sequences, step, g, seen)
        retention = limit.retention if limit.imposed else None
        return KVPart(group.members[m].heads, self.memory.arenas[g], m, plan, retention, recent)

    @uninterrupted
    def evict(self) -> None:
        """Free the blocks that no coming query sees."""
        self._complete = None
        self.memory.compact(self._evictions())

    def _evictions(self) -> Changes:
        return evictions(self.memory.spec, self.policy, self.sequences, self.seen_tokens)

    @uninterrupted
    def compact(self, plan: KeepPlan) -> None:
        """Keep only the rows of `plan` in every group that has no window of the model's own, in every sequence.

        Raises:
            ConfigurationError: positions that are not stored. Nothing was changed.
        """
        self.check_between_steps()
        self._complete = None
        self.memory.compact(compactions(self.memory.spec, plan, self.sequences, self.seen_tokens))

    @uninterrupted
    def truncate(self, n_tokens: int) -> None:
        """Keep the first `n_tokens` tokens. An incomplete step is undone first. Cut to nothing it is as `reset`.

        Raises:
            StateError: the result would not be exact. Nothing was changed, the incomplete step apart.
        """
        n_tokens = whole("the number of tokens to keep", n_tokens)
        if self._step is not None:
            self.abort()
        if not 0 <= n_tokens <= self.seen_tokens:
            raise StateError(f"the cache has seen {self.seen_tokens} tokens and cannot be cut to {n_tokens}")
        if n_tokens == 0:
            self.reset()
            return
        self.memory.truncate(self.sequences, n_tokens)
        self.seen_tokens = n_tokens
        self._complete = None

    @uninterrupted
    def reset(self) -> None:
        """Forget everything, the number of sequences too."""
        self._step = self._complete = None
        self.memory.release(self.sequences)
        self.sequences = []
        self.seen_tokens = 0

    @uninterrupted
    def select(self, indices: Seq[int]) -> None:
        """Let sequence `indices[i]` become sequence i. One that is named twice is shared until either is written."""
        self.check_between_steps()
        indices = [whole("the index of a sequence", i) for i in indices]
        self._complete = None
        if any(not -len(self.sequences) <= i < len(self.sequences) for i in indices):
            raise ConfigurationError(f"there are {len(self.sequences)} sequences, got indices {indices}")
        if not indices:
            self.reset()  # without sequences there is nothing that the tokens seen could belong to
            return
        old = self.sequences
        used: set[int] = set()
        self.sequences = []
        for index in (i % len(old) for i in indices):
            self.sequences.append(self.memory.fork(old[index]) if index in used else old[index])
            used.add(index)
        self.memory.release([sequence for i, sequence in enumerate(old) if i not in used])

    @uninterrupted
    def fork(self) -> SequenceBatch:
        """A batch over the same memory that shares all blocks; either copies a block before it writes into it."""
        self.check_between_steps()
        twin = SequenceBatch(self.memory, self.policy)
        twin.sequences = [self.memory.fork(sequence) for sequence in self.sequences]
        twin.seen_tokens = self.seen_tokens
        twin.recording = self.recording
        return twin

    @uninterrupted
    def checkpoint(self) -> Checkpoint:
        """A state to come back to, at the cost of at most one block copied a sequence and group."""
        self.check_between_steps()
        return Checkpoint(self.memory, self.sequences, self.seen_tokens)

    @uninterrupted
    def rollback(self, mark: Checkpoint) -> None:
        """Return to `mark`, which stays good for more rollbacks. An incomplete step is undone with the rest.

        Raises:
            StateError: `mark` was released, or belongs to another cache. Nothing was changed.
        """
        if mark.memory is not self.memory:
            raise StateError("the checkpoint was made from another cache")
        if mark.released:
            raise StateError("the checkpoint was released")
        sequences = [self.memory.fork(sequence) for sequence in mark.sequences]
        self.reset()
        self.sequences, self.seen_tokens = sequences, mark.seen_tokens

    @uninterrupted
    def respec_layer(self, layer: LayerSpec) -> None:
        """Take on heads and head dims that the layer's first rows show.

        Raises:
            UnsupportedError: the layer holds rows of another shape already.
        """
        is_held = self.seen_tokens or (self._step and layer.index in self._step.written)
        if is_held or self.memory.holds_rows():  # of a fork or a checkpoint
            old = self.memory.spec.layers_by_index[layer.index]
            raise UnsupportedError(f"layer {layer.index} stored {old}, its new rows are {layer}")
        self.memory.respec_layer(layer)

    @uninterrupted
    def _commit(self, step: Step) -> None:
        self.seen_tokens += step.n_tokens
        for sequence in self.sequences:
            sequence.seen_tokens = self.seen_tokens
        self._step, self._complete = None, step

    def check_between_steps(self) -> None:
        """Raise StateError where a step is open."""
        if self._step is not None:
            raise StateError(
                "the last forward did not reach all layers; call "
                f"truncate({self.seen_tokens}) first to take back what it left"
            )

    def _check_shapes(self, layer: int, step: Step, keys: Tensor, values: Tensor) -> None:
        spec = self.memory.spec.layers_by_index[layer]
        expected = [(len(self.sequences), spec.n_kv_heads, step.n_tokens, dim) for dim in (spec.k_dim, spec.v_dim)]
        if [tuple(keys.shape), tuple(values.shape)] != expected:
            raise StateError(
                f"layer {layer} got keys {tuple(keys.shape)} and values {tuple(values.shape)} where the step has "
                f"{expected[0]} and {expected[1]} (sequences, KV heads, tokens, head dim)"
            )
        for rows in (keys, values):
            if not has_numbers(rows):
                raise ConfigurationError(f"layer {layer} got rows without numbers in memory: {described(rows)}")
