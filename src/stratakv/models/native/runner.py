"""Forwards of the Llama family by the C++ kernels: no tensor is made and no mask is built from token to logits."""

from __future__ import annotations

from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from stratakv.blocks.batch import SequenceBatch
from stratakv.blocks.geometry import build_spec
from stratakv.blocks.memory import Memory
from stratakv.codecs.floats import FORMAT_OF_DTYPE
from stratakv.errors import CapacityError, ConfigurationError
from stratakv.extension import NUMBER_TYPES, load_kernels
from stratakv.models.native.architecture import Architecture, architecture_of
from stratakv.models.native.binding import Binding, reason_against
from stratakv.models.native.inspection import check_logits
from stratakv.models.native.rotation import Rotations
from stratakv.models.native.weights import Weights
from stratakv.policies import RetentionPolicy
from stratakv.tensors import INTEGERS, described, has_numbers
from stratakv.units import whole

MOST_ROWS = 512
"""Rows (sequences times new tokens) that one pass through the layers takes."""


class NativeRunner:
    """Runs one model over caches of its own shape. Threads may share it, and take turns then.

    Args:
        model: one of transformers' models, of a class in `architecture.FAMILIES`, as it was made: adapters and
            quantised layers are refused. It is run once on a few tokens, to be compared, and copied: what is done to it
            later does not reach the runner. It runs as in evaluation mode.
        dtype: of the matrices: torch.bfloat16, torch.float16 or torch.float32. All sums are in fp32.
        exact: keep 16 bits of activations that meet bf16 matrices, where the processor would multiply their rounding to
            bf16 (AMX and AVX-512 with bf16 do): a prompt takes 1.5 to 1.8 times as long. Others multiply in fp32 in
            either case. On every processor, queries and weights of rows then keep 14 bits beside rows of 4 and 2 bits
            in a step, rather than 8; beside fp32 matrices, and in heads of more than 128 channels, they do so anyway.
        isa: as for `CpuBackend`.

    Raises:
        UnsupportedError: the model is of another kind, or the extension was not built.
        ConfigurationError: a dtype that is not one of the three, or too small for a weight.
        CapacityError: no room for the weights.
    """

    def __init__(
        self, model: Any, *, dtype: torch.dtype = torch.bfloat16, exact: bool = False, isa: str | None = None
    ) -> None:
        if dtype not in NUMBER_TYPES:
            raise ConfigurationError(f"dtype {dtype} is not one of {', '.join(map(str, NUMBER_TYPES))}")
        self.architecture: Architecture = architecture_of(model)
        self._kernels, self.isa = load_kernels(isa)
        in_tiles = dtype == torch.bfloat16 and self._kernels.tiles_bf16(self.isa)
        try:
            self.weights = Weights.of(model, self.architecture, dtype, in_tiles=in_tiles)
        except MemoryError as error:
            raise CapacityError(f"the system has no room for the model's weights in {dtype}") from error
        self._rotations = Rotations(model.model.rotary_emb, self.architecture.layer_types, self.architecture.head_dim)
        self._bindings: WeakKeyDictionary[Memory, Binding] = WeakKeyDictionary()
        self._exact = exact
        self._lock = Lock()
        self._logits: Tensor | None = None  # of `next_tokens`
        check_logits(model, lambda tokens: self.forward(self.new_batch(), tokens, every=True), dtype)

    def new_batch(
        self,
        *,
        format: str | None = None,
        block_tokens: int = 64,
        policy: RetentionPolicy | None = None,
        residual: int | None = None,
    ) -> SequenceBatch:
        """An empty paged cache for this model.

        Args:
            format: of the pages; None: that of the weights.
            block_tokens: rows in a block.
            policy: which rows stay; None: all.
            residual: how many of the last rows are held in 16 bits beside fewer; None: as many as the format asks for.

        Raises:
            ConfigurationError: an unknown format, a block of no tokens, or a residual that the format cannot have.
        """
        format = FORMAT_OF_DTYPE[self.weights.dtype] if format is None else format
        spec = build_spec(
            self.architecture.layer_specs(),
            k_format=format,
            v_format=format,
            block_tokens=block_tokens,
            policy=policy,
            residual=residual,
            recent_format="fp16" if self.weights.dtype == torch.float16 else "bf16",
        )
        return SequenceBatch(Memory(spec, device=torch.device("cpu")), policy)

    def refuses(self, batch: SequenceBatch) -> str | None:
        """Why `forward` would not feed this batch, or None."""
        binding = self._bindings.get(batch.memory)
        is_known = binding is not None and binding.spec is batch.memory.spec
        return None if is_known else reason_against(self.architecture, batch.memory)

    @torch.inference_mode()
    def forward(
        self,
        batch: SequenceBatch,
        tokens: Tensor,
        *,
        every: bool = False,
        last: int = 1,
        out: Tensor | None = None,
    ) -> Tensor:
        """Feed new tokens, whose keys and values go into the cache.

        Args:
            batch: the cache. It holds the new tokens afterwards, or is as it was where anything is refused. Where
                something else stops it half way, it has the tokens that it had, less those that left its windows.
            tokens: integers `[n_sequences, n_new]`.
            every: give logits of all new tokens of each sequence.
            last: where not of all, of so many last ones.
            out: where the logits go, fp32 `[n_sequences, n_new or last, vocabulary]`; None: a new tensor.

        Returns:
            The logits.

        Raises:
            ConfigurationError: no tokens, or fewer than `last`; ids beyond the vocabulary; a cache of another shape.
            CapacityError: no room, in the cache or for the logits.
        """
        _check_batch(batch)
        tokens = self._checked(tokens)
        n_sequences, n_new = tokens.shape
        n_wanted = n_new if every else whole("last", last)
        if not 0 < n_wanted <= n_new:
            raise ConfigurationError(f"of {n_new} new tokens there are no logits of the last {n_wanted}")
        shape = (n_sequences, n_wanted, self.architecture.vocabulary)
        if out is None:
            out = _floats(*shape)
        else:
            _check_place(out, shape)
        with self._lock:  # the decoder has room for one forward
            self._feed(batch, tokens, out)
        return out

    @torch.inference_mode()
    def next_tokens(self, batch: SequenceBatch, tokens: Tensor) -> Tensor:
        """Feed new tokens as `forward` does, and give each sequence's likeliest next one, int64 `[n_sequences, 1]`.

        The logits stay in memory that the runner keeps: with many sequences new memory for each step costs as much as
        a layer, and so does torch's argmax.

        Raises:
            As `forward`.
        """
        _check_batch(batch)
        tokens = self._checked(tokens)
        shape = (len(tokens), 1, self.architecture.vocabulary)
        with self._lock:
            if self._logits is None or self._logits.shape != shape:
                self._logits = _floats(*shape)
            self._feed(batch, tokens, self._logits)
            likeliest = self._logits.numpy().argmax(-1)
        with torch.inference_mode(mode=False):
            return torch.from_numpy(likeliest)

    def _feed(self, batch: SequenceBatch, tokens: Tensor, out: Tensor) -> None:
        """A step of `batch`, or nothing; `out` is for the logits of as many last tokens as it has room for."""
        n_sequences, n_new = tokens.shape
        binding = self._bind(batch.memory)
        span = max(MOST_ROWS // n_sequences, 1)
        binding.prepare(n_sequences * min(span, n_new), batch.seen_tokens + n_new)
        batch.check_between_steps()
        try:
            batch.begin(n_sequences, n_new)
            for start in range(0, n_new, span):
                stop = min(start + span, n_new)
                self._pass(binding, batch, tokens, start, stop, out)
            batch.write_groups()
        except BaseException:
            if batch.open_step is not None:
                batch.abort()
            raise
        batch.complete()

    def _pass(self, binding: Binding, batch: SequenceBatch, tokens: Tensor, start: int, stop: int, out: Tensor) -> None:
        """New tokens `[start, stop)` through all layers, and the logits that are wanted of them."""
        n_sequences, n_wanted, vocabulary = out.shape
        first = tokens.shape[1] - n_wanted
        own = max(stop - max(start, first), 0)
        if own in (0, n_wanted):
            binding.run(batch, tokens, start, stop, own, out)
            return
        logits = _floats(n_sequences, own, vocabulary)
        binding.run(batch, tokens, start, stop, own, logits)
        out[:, stop - own - first : stop - first] = logits

    def _bind(self, memory: Memory) -> Binding:
        binding = self._bindings.get(memory)
        if binding is None:
            facts = self._kernels, self.isa, self.architecture, self.weights, self._rotations
            binding = Binding(*facts, memory, exact=self._exact)
            self._bindings[memory] = binding
        binding.check(memory)
        return binding

    def _checked(self, tokens: Tensor) -> Tensor:
        is_fit = isinstance(tokens, Tensor) and has_numbers(tokens) and tokens.dtype in INTEGERS
        if not is_fit or tokens.dim() != 2 or not tokens.numel():
            given = described(tokens) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise ConfigurationError(f"tokens are a tensor of integers [n_sequences, n_new], got {given}")
        ids = tokens.flatten().tolist()  # no tensor is made for a step
        low, high = min(ids), max(ids)
        if low < 0 or high >= self.architecture.vocabulary:
            raise ConfigurationError(f"token ids go from 0 to {self.architecture.vocabulary - 1}, got {low} to {high}")
        return tokens.resolve_neg().to("cpu", torch.int32).contiguous()


def _check_batch(batch: object) -> None:
    if not isinstance(batch, SequenceBatch):
        raise ConfigurationError(f"a native runner writes into what its new_batch gives, not {type(batch)}")


def _floats(*shape: int) -> Tensor:
    try:
        with torch.inference_mode(mode=False):  # what users may write into
            return torch.empty(shape, dtype=torch.float32, device="cpu")
    except RuntimeError as error:  # as torch reports a failed allocation
        raise CapacityError(f"the system has no room for logits {shape}; nothing was changed") from error


def _check_place(out: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ConfigurationError where logits of `shape` cannot be written into `out`."""
    is_fit = (
        isinstance(out, Tensor)
        and (out.shape, out.dtype, out.device.type) == (shape, torch.float32, "cpu")
        and has_numbers(out)
        and out.is_contiguous()
        and not (out.requires_grad or out.is_neg())
    )
    if not is_fit:
        given = described(out) if isinstance(out, Tensor) else type(out).__name__
        raise ConfigurationError(f"logits go into dense fp32 {shape} in RAM without gradient, not into {given}")
