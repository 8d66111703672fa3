"""What the C++ decoder is told: once of the weights, again where a cache's memory changed, and of each step."""

from __future__ import annotations

from array import array
from typing import Any

import torch
from torch import Tensor

from stratakv.attention.cpu import MOST_POSITIONS, PREFILL_QUERIES
from stratakv.blocks.batch import SequenceBatch
from stratakv.blocks.memory import Memory
from stratakv.blocks.ram import zeros
from stratakv.errors import CapacityError, ConfigurationError
from stratakv.extension import FLOAT_FORMATS, FORMATS, MOST_PACKED_DIM, NUMBER_TYPES
from stratakv.models.native.architecture import Architecture
from stratakv.models.native.rotation import Rotations
from stratakv.models.native.weights import LayerWeights, Linear, Weights
from stratakv.plan import ReadPlan, WritePlan
from stratakv.spec import CacheSpec


class Binding:
    """A decoder over one memory, which it does not hold: a cache that is dropped frees its memory.

    Args:
        kernels: the extension.
        isa: the instruction set.
        architecture, weights, rotations: of the model.
        memory: of the caches that it is going to read and write.
        exact: whether activations keep more than bf16 where the processor multiplies bf16, and queries and weights of
            rows 14 bits rather than 8 beside rows of 4 and 2 (as beside fp32 matrices and in wide heads in any case).

    Raises:
        ConfigurationError: the memory is not one for this model, or not one that the kernels read.
    """

    def __init__(
        self,
        kernels: Any,
        isa: str,
        architecture: Architecture,
        weights: Weights,
        rotations: Rotations,
        memory: Memory,
        *,
        exact: bool,
    ) -> None:
        self._architecture = architecture
        self.spec: CacheSpec | None = None
        """The last one that was checked."""
        self.check(memory)
        self._kernels = kernels
        self._weights = weights
        self._rotations = rotations
        self._rounds_activations = not exact
        self._tables_of_slabs: list[array[int]] = []  # of the layers; held, since the decoder has where they lie
        self._tables: list[tuple[Tensor, Tensor]] = []  # likewise
        self._of_step: list[Any] = []  # likewise
        self._room: dict[str, Tensor] = {}
        self._decoder = self._make(isa, len(memory.spec.groups))

    def check(self, memory: Memory) -> None:
        """Raise ConfigurationError where the memory has become one for another model: its first rows can show that."""
        if self.spec is not memory.spec:
            if reason := reason_against(self._architecture, memory):
                raise ConfigurationError(reason)
            self.spec = memory.spec

    def prepare(self, n_rows: int, n_positions: int) -> None:
        """Have room for passes of `n_rows` (sequences times new tokens), and angles up to `n_positions`.

        Raises:
            CapacityError: the system has no memory for them.
        """
        try:
            self._use_rotations(n_positions)
            self._make_room(n_rows)
        except (MemoryError, RuntimeError) as error:  # the latter is how torch reports a failed allocation
            raise CapacityError(f"the system has no room to compute with {n_rows} rows; nothing was changed") from error

    def run(self, batch: SequenceBatch, tokens: Tensor, start: int, stop: int, n_wanted: int, logits: Tensor) -> None:
        """Feed new tokens `[start, stop)` of the batch's open step.

        Args:
            batch: a batch over the memory, whose step has begun after `prepare`.
            tokens: int32 `[n_sequences, n_new]`, all of the step.
            start, stop: which of them.
            n_wanted: the last so many tokens of each sequence are those whose logits are written.
            logits: fp32 `[n_sequences, n_wanted, vocabulary]`.
        """
        n_sequences, n_new = tokens.shape
        seen = batch.seen_tokens
        _slabs = self._use_slabs(batch.memory)  # held until the forward is done, and not longer
        positions = array("i", [seen + start]) * n_sequences
        fed = tokens[:, start:stop].contiguous()
        wanted_positions = array("i", [seen + stop - n_wanted]) * n_sequences
        self._of_step = [positions, wanted_positions, fed]
        for g, (reading, writing) in enumerate(batch.plans()):
            self._use_group(g, batch.memory.spec, reading, writing, start, n_new - stop)
        self._decoder.forward(
            fed.data_ptr(),
            positions.buffer_info()[0],
            n_sequences,
            stop - start,
            n_wanted,
            wanted_positions.buffer_info()[0],
            logits.data_ptr(),
            torch.get_num_threads(),
            PREFILL_QUERIES,
        )

    def _use_group(
        self, g: int, spec: CacheSpec, reading: ReadPlan, writing: WritePlan, start: int, n_later: int
    ) -> None:
        """Tell where group g's rows are, and where those from the step's token `start` on go; `n_later` come later."""
        group = spec.groups[g]
        seen_by = (group if group.recent_of is None else spec.groups[group.recent_of]).retention
        first = reading.runs[0][0] - reading.skip if reading.runs else 0
        n_rows = reading.skip + reading.n_rows - (0 if g in spec.recents else n_later)
        each = [array("i", [x]) * reading.n_sequences for x in (n_rows, reading.skip, first)]
        row_positions = None if reading.is_one_run else reading.row_positions
        self._decoder.set_group(
            g,
            reading.table.data_ptr(),
            reading.table.stride(0),
            *(numbers.buffer_info()[0] for numbers in each),
            0 if row_positions is None else row_positions.data_ptr(),
            reading.block_tokens,
            min(seen_by.window or 0, MOST_POSITIONS),
            min(seen_by.sinks, MOST_POSITIONS),
            writing.table.buffer_info()[0],
            len(writing.table) // len(writing.tables),
            writing.row % writing.block_tokens + start,
        )
        self._of_step += [reading, writing, each, row_positions]

    def _make(self, isa: str, n_groups: int) -> Any:
        facts, weights = self._architecture, self._weights
        decoder = self._kernels.Decoder(
            isa,
            hidden=facts.hidden,
            intermediate=facts.intermediate,
            head_dim=facts.head_dim,
            n_query_heads=facts.n_query_heads,
            n_kv_heads=facts.n_kv_heads,
            norm_epsilon=facts.norm_epsilon,
            embedding_scale=facts.embedding_scale,
            attention_scale=facts.attention_scale,
            attention_softcap=facts.attention_softcap,
            logit_softcap=facts.logit_softcap,
            activation=facts.activation,
            rounds_activations=self._rounds_activations,
            embedding=self._matrix(weights.embedding),
            head=self._matrix(weights.head),
            norm=weights.norm.data_ptr(),
            n_groups=n_groups,
        )
        for layer, rotation in zip(weights.layers, self._rotations.of_layer, strict=True):
            self._add(decoder, layer, rotation)
        return decoder

    def _add(self, decoder: Any, layer: LayerWeights, rotation: int) -> None:
        matrices = {name: self._matrix(getattr(layer, name)) for name in ("qkv", "output", "gate_up", "down")}
        norms = {
            name: 0 if (norm := getattr(layer, name)) is None else norm.data_ptr()
            for name in (
                "attention_norm",
                "query_norm",
                "key_norm",
                "after_attention_norm",
                "mlp_norm",
                "after_mlp_norm",
            )
        }
        decoder.add_layer(**matrices, **norms, rotation=rotation)

    def _matrix(self, linear: Linear) -> Any:
        weight, bias = linear.weight, linear.bias
        return self._kernels.Matrix(
            weight.data_ptr(),
            linear.n_rows,
            linear.n_columns,
            NUMBER_TYPES[weight.dtype],
            0 if bias is None else bias.data_ptr(),
            linear.is_tiled,
        )

    def _use_slabs(self, memory: Memory) -> list[list[Tensor]]:
        """Tell where the slabs are, if that changed. Returns them."""
        places = []  # of each layer's strands: layer, which of the two, group, member
        for index, ((g, m),) in enumerate(memory.spec.locations.values()):
            held = (g, memory.spec.recents.get(g))
            places += [(index, i, group, m) for i, group in enumerate(held) if group is not None]
        found = [memory.arenas[g].addresses(m) for _, _, g, m in places]
        slabs = [addresses.slabs for addresses in found]
        if self._tables_of_slabs and all(t is a.table for t, a in zip(self._tables_of_slabs, found, strict=True)):
            return slabs
        for (index, strand, g, m), addresses in zip(places, found, strict=True):
            arena, member = memory.arenas[g], memory.spec.groups[g].members[m]
            self._decoder.set_pages(
                index,
                strand,
                g,
                addresses.at,
                member.nbytes,
                member.k_layout.nbytes,
                member.v_layout.nbytes,
                FORMATS[arena.k_codec.name],
                FORMATS[arena.v_codec.name],
            )
        self._tables_of_slabs = [addresses.table for addresses in found]
        return slabs

    def _use_rotations(self, n_positions: int) -> None:
        """Have the angles of so many positions."""
        tables = self._rotations.reach(n_positions)
        if tables is not self._tables:
            self._tables = tables
            for index, (cosines, sines) in enumerate(tables):
                self._decoder.set_rotation(index, cosines.data_ptr(), sines.data_ptr(), cosines.shape[1])

    def _make_room(self, n_rows: int) -> None:
        facts = self._architecture
        heads = facts.n_query_heads * facts.head_dim
        qkv = heads + 2 * facts.n_kv_heads * facts.head_dim
        widest_input = -(-max(facts.hidden, heads, facts.intermediate) // 32) * 32  # whole steps, for tiles
        sizes = {
            "stream": n_rows * facts.hidden,
            "normed": n_rows * widest_input,
            "produced": n_rows * max(qkv, 2 * facts.intermediate, widest_input),
            "lse": n_rows * facts.n_query_heads,
        }
        if all(name in self._room and self._room[name].numel() >= size for name, size in sizes.items()):
            return
        self._room = {name: zeros(4 * size).view(torch.float32) for name, size in sizes.items()}
        self._decoder.set_room(*(self._room[name].data_ptr() for name in ("stream", "normed", "produced", "lse")))


def reason_against(architecture: Architecture, memory: Memory) -> str | None:
    """Why a model of this shape cannot be run over the memory, or None."""
    spec = memory.spec
    if list(spec.layers) != architecture.layer_specs():
        return "the cache was made for a model of another shape"
    if spec.k_format not in FORMATS or spec.v_format not in FORMATS:
        return f"the native runner reads {', '.join(FORMATS)}, not {spec.k_format} and {spec.v_format}"
    if architecture.head_dim > MOST_PACKED_DIM and not set(FLOAT_FORMATS) >= {spec.k_format, spec.v_format}:
        return f"rows of few bits have head dims of at most {MOST_PACKED_DIM}, this model's are {architecture.head_dim}"
    if any(len(places) > 1 for places in spec.locations.values()):
        return "the native runner reads caches whose layers keep the same rows for all heads"
    if memory.device.type != "cpu":
        return f"the native runner reads pages in RAM, not on {memory.device}"
    return None
