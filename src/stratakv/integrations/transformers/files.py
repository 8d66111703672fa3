"""Cache files: what `KVCache.save` writes and `KVCache.load` reads. The container is in `blocks/snapshot.py`."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stratakv.blocks.batch import SequenceBatch
from stratakv.blocks.memory import Memory
from stratakv.blocks.sequence import GroupTable
from stratakv.blocks.snapshot import Snapshot, read_snapshot, write_snapshot
from stratakv.codecs import get_codecs
from stratakv.errors import (
    CapacityError,
    ConfigurationError,
    FingerprintError,
    FormatError,
    StateError,
    UnsupportedError,
)
from stratakv.integrations.transformers import recurrent
from stratakv.integrations.transformers.arguments import check_model, whole_numbers
from stratakv.integrations.transformers.cache import KVCache
from stratakv.integrations.transformers.compat import PreTrainedModel
from stratakv.integrations.transformers.fingerprint import model_identity
from stratakv.integrations.transformers.geometry import template_layers
from stratakv.plan import run_length
from stratakv.policies import policy_from_dict
from stratakv.spec import CacheSpec

POSITIONS = "original"
"""Keys are stored after RoPE at the positions that their tokens had when they were fed."""


def save_cache(cache: KVCache, path: Path, token_ids: Any) -> None:
    """Write all rows of `cache`, what they are, and whose.

    Raises:
        UnsupportedError: the model keeps recurrent states, which files do not hold.
        FileNotFoundError: the folder does not exist.
        StateError: a forward stopped half way. ConfigurationError: the token ids do not fit what was seen.
    """
    if any(recurrent.has_states(layer) for layer in cache.layers):
        raise UnsupportedError("the model keeps recurrent or convolution states, which cache files do not hold")
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder", str(path.parent))
    batch = cache.batch
    if batch.open_step is not None:
        raise StateError(f"the last forward stopped half way; call truncate({batch.seen_tokens}) first")
    ids = cache.token_ids if token_ids is None else _checked_ids(token_ids, len(batch.sequences), batch.seen_tokens)
    spec = batch.memory.spec
    tables = [[(table, group) for table, group in zip(s.tables, spec.groups, strict=True)] for s in batch.sequences]
    header = {
        "spec": spec.to_dict(),
        "spec_fingerprint": spec.fingerprint(),
        "model": model_identity(cache.model),
        "policy": None if batch.policy is None else batch.policy.to_dict(),
        "positions": POSITIONS,
        "seen_tokens": batch.seen_tokens,
        "dtypes": {str(layer): str(dtype).removeprefix("torch.") for layer, dtype in cache.dtypes.items()},
        "token_ids": ids,
        "sequences": [
            [{"runs": table.runs, "floor": table.floor, "blocks": len(table.block_ids)} for table, _ in sequence]
            for sequence in tables
        ],
        "sections": [
            len(table.block_ids) * member.nbytes
            for sequence in tables
            for table, group in sequence
            for member in group.members
        ],
    }

    def sections() -> Iterator[Tensor]:
        for sequence in batch.sequences:
            for arena, table in zip(batch.memory.arenas, sequence.tables, strict=True):
                for dumped in arena.dump(table.block_ids, table.n_rows):
                    yield dumped.flatten()

    write_snapshot(path, header, sections())


def load_cache(path: Path, model: PreTrainedModel) -> KVCache:
    """A new cache with what `save_cache` wrote. Nothing that lives is touched.

    Raises:
        FileNotFoundError, FormatError, FingerprintError, ConfigurationError.
    """
    check_model(model)
    snapshot = read_snapshot(path)
    _check_identity(snapshot, model)
    try:
        return _rebuilt(snapshot, model)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{path} describes a cache that this build cannot rebuild: {error}") from error


def restore_cache(cache: KVCache, path: Path) -> None:
    """Replace what `cache` holds by what `save_cache` wrote; see `KVCache.restore`."""
    loaded = load_cache(path, cache.model)
    theirs, own = _settings(loaded), _settings(cache)
    if differing := [f"{key}: {theirs[key]!r} there, {own[key]!r} here" for key in own if theirs[key] != own[key]]:
        raise FingerprintError(f"{path} holds a cache of another kind ({'; '.join(differing)})")
    old, new = cache.batch.memory, loaded.batch.memory
    if old.max_bytes is not None and new.nbytes > old.max_bytes:
        raise CapacityError(f"{path} takes {new.nbytes:,} bytes, this cache may hold {old.max_bytes:,}")
    cache.reset()
    new.budget, new.poison = old.budget, old.poison
    loaded.batch.recording = cache.batch.recording
    cache.batch, cache.dtypes, cache.token_ids = loaded.batch, loaded.dtypes, loaded.token_ids


def _settings(cache: KVCache) -> dict[str, Any]:
    """What `for_model` was told, as far as it decides what is stored."""
    spec, policy = cache.spec, cache.batch.policy
    return {
        "k_format": spec.k_format,
        "v_format": spec.v_format,
        "layout": spec.layout,
        "capacity": spec.capacity,
        "block_tokens": spec.groups[0].block_tokens if spec.layout == "paged" else None,
        "policy": None if policy is None else policy.to_dict(),
        "residual": max((spec.groups[g].retention.window or 0 for g in spec.recents.values()), default=0),
    }


def _rebuilt(snapshot: Snapshot, model: PreTrainedModel) -> KVCache:
    header = snapshot.header
    spec = CacheSpec.from_dict(header["spec"])
    if spec.fingerprint() != header["spec_fingerprint"]:
        raise FormatError(f"{snapshot.path} has a layout that does not match its own fingerprint")
    _check_layouts(spec, snapshot)
    policy = None if header["policy"] is None else policy_from_dict(header["policy"])
    memory = Memory(spec, device=model.device)
    batch = SequenceBatch(memory, policy)
    batch.seen_tokens = int(header["seen_tokens"])
    sections = snapshot.sections()
    for tables in header["sequences"]:
        sequence = memory.new_sequence()
        sequence.seen_tokens = batch.seen_tokens
        batch.sequences.append(sequence)
        for g, described in enumerate(tables):
            runs = tuple((int(first), int(count)) for first, count in described["runs"])
            _check_runs(runs, batch.seen_tokens, snapshot)
            group, arena = spec.groups[g], memory.arenas[g]
            n_blocks = group.blocks_for(run_length(runs))
            if n_blocks != described["blocks"]:
                raise FormatError(f"{snapshot.path} says {described['blocks']} blocks where its rows take {n_blocks}")
            loaded = [next(sections).view(n_blocks, member.nbytes) for member in group.members]
            blocks = memory.claim(g, n_blocks)
            arena.load(blocks, loaded)
            sequence.adopt(g, GroupTable(blocks, runs, int(described["floor"])))
    cache = KVCache(model, batch, template_layers(model.config), attachable=True)
    if policy is not None and not cache.is_attached:
        raise UnsupportedError(
            f"{snapshot.path} was written under policy {policy.name!r}; call stratakv.attach(model) first"
        )
    cache.dtypes = {int(layer): getattr(torch, name) for layer, name in header["dtypes"].items()}
    if header["token_ids"] is not None:
        cache.token_ids = _checked_ids(header["token_ids"], len(batch.sequences), batch.seen_tokens)
    cache.check()
    return cache


def _check_identity(snapshot: Snapshot, model: PreTrainedModel) -> None:
    written, present = snapshot.header.get("model"), model_identity(model)
    if not isinstance(written, dict):
        raise FormatError(f"{snapshot.path} does not say which model it belongs to")
    differing = [key for key in present if written.get(key) != present[key]]
    if differing:
        told = "; ".join(f"{key}: {written.get(key)!r} in the file, {present[key]!r} here" for key in differing)
        raise FingerprintError(f"{snapshot.path} belongs to another model ({told})")
    if snapshot.header.get("positions") != POSITIONS:
        raise FingerprintError(
            f"{snapshot.path} stores keys at {snapshot.header.get('positions')!r} positions, this build at "
            f"{POSITIONS!r}"
        )


def _check_layouts(spec: CacheSpec, snapshot: Snapshot) -> None:
    """See that this build's codecs lay pages out as the file says."""
    for group in spec.groups:
        k_codec, v_codec = get_codecs(group.k_format, group.v_format)
        for member in group.members:
            layer = spec.layers_by_index[member.layer]
            layouts = (k_codec.layout(layer.k_dim, group.block_tokens), v_codec.layout(layer.v_dim, group.block_tokens))
            if layouts != (member.k_layout, member.v_layout):
                raise FingerprintError(f"{snapshot.path} lays out pages of layer {layer.index} in another way")


def _check_runs(runs: tuple[tuple[int, int], ...], seen_tokens: int, snapshot: Snapshot) -> None:
    end = 0
    for first, count in runs:
        if first < end or count < 1:
            raise FormatError(f"{snapshot.path} lists positions that do not rise: {runs}")
        end = first + count
    if end > seen_tokens:
        raise FormatError(f"{snapshot.path} lists positions up to {end} of {seen_tokens} tokens")


def _checked_ids(token_ids: Any, n_sequences: int, seen_tokens: int) -> tuple[tuple[int, ...], ...]:
    ids = whole_numbers("token_ids", token_ids)
    ids = ids.reshape(1, -1) if ids.dim() == 1 else ids
    if tuple(ids.shape) != (n_sequences, seen_tokens):
        raise ConfigurationError(
            f"token_ids must be one id for each of {seen_tokens} tokens of {n_sequences} sequences, "
            f"got {tuple(ids.shape)}"
        )
    return tuple(tuple(int(i) for i in row) for row in ids.tolist())
