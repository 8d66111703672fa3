"""The container of a cache file: a header that describes it, sections of bytes, and digests over both.

    magic      8 bytes    "STRATAKV"
    version    u32 LE
    length     u64 LE     bytes of the header
    header     JSON, UTF-8; `sections` lists the length in bytes of each section, in order
    digest     32 bytes   BLAKE3 of all of the above
    sections   the bytes, one after the other
    digests    32 bytes for each section, and 32 for these digests themselves

Nothing in a file is trusted: `read_snapshot` hands out a header only after its digest was right and the file has
exactly the length that the header implies, and a section only after that section's digest was right.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from blake3 import blake3
from torch import Tensor

from stratakv.errors import FormatError

MAGIC = b"STRATAKV"
VERSION = 3
_PREFIX = struct.Struct("<8sIQ")
_DIGEST = 32


def write_snapshot(path: Path, header: dict[str, Any], sections: Iterable[Tensor]) -> None:
    """Write a file whole or not at all.

    Args:
        path: the file; its folder must exist. One that is there already is replaced at the last moment.
        header: plain data; its `sections` are the lengths of what `sections` will yield.
        sections: uint8 tensors, taken one at a time.
    """
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    start = _PREFIX.pack(MAGIC, VERSION, len(text)) + text
    with _replacing(path) as file:
        file.write(start + blake3(start).digest())
        digests = b""
        for length, section in zip(header["sections"], sections, strict=True):
            content = section.contiguous().cpu().numpy().data
            assert content.nbytes == length, "a section has another length than the header says"
            file.write(content)
            digests += blake3(content).digest()
        file.write(digests + blake3(digests).digest())


@dataclass(frozen=True)
class Snapshot:
    """A file whose header was verified. `sections` reads and verifies the rest."""

    path: Path
    header: dict[str, Any]
    data_start: int

    def sections(self) -> Iterator[Tensor]:
        """Each section as a uint8 tensor `[length]`.

        Raises:
            FormatError: a section is damaged.
        """
        lengths = self.header["sections"]
        with self.path.open("rb") as file:
            file.seek(self.data_start + sum(lengths))
            digests = file.read(_DIGEST * len(lengths))
            if blake3(digests).digest() != file.read(_DIGEST):
                raise FormatError(f"{self.path} is damaged: the table of section digests is wrong")
            file.seek(self.data_start)
            for i, length in enumerate(lengths):
                content = bytearray(length)
                if file.readinto(content) != length or (
                    blake3(content).digest() != digests[i * _DIGEST : (i + 1) * _DIGEST]
                ):
                    raise FormatError(f"{self.path} is damaged: section {i} has the wrong digest")
                empty = torch.empty(0, dtype=torch.uint8, device="cpu")
                yield torch.frombuffer(content, dtype=torch.uint8) if length else empty


def read_snapshot(path: Path) -> Snapshot:
    """Open a file and verify all but its sections.

    Raises:
        FileNotFoundError: there is none.
        FormatError: it is not such a file, of another version, truncated or damaged.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(_PREFIX.size)
        if len(prefix) < _PREFIX.size or not prefix.startswith(MAGIC):
            raise FormatError(f"{path} is not a StrataKV cache file: it does not start with {MAGIC.decode()}")
        _, version, length = _PREFIX.unpack(prefix)
        if version != VERSION:
            raise FormatError(f"{path} has format version {version}, this build reads version {VERSION}")
        if length > size:
            raise FormatError(f"{path} is truncated: its header alone would be {length} bytes, the file has {size}")
        text = file.read(length)
        if blake3(prefix + text).digest() != file.read(_DIGEST):
            raise FormatError(f"{path} is damaged: its header has the wrong digest")
    try:
        header = json.loads(text)
        lengths = header["sections"]
        n_sections, n_bytes = len(lengths), sum(lengths)
        well_formed = all(isinstance(n, int) and n >= 0 for n in lengths)
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{path} has a header that this build cannot read: {error}") from error
    start = _PREFIX.size + length + _DIGEST
    expected = start + n_bytes + _DIGEST * (n_sections + 1)
    if not well_formed or size != expected:
        raise FormatError(f"{path} is truncated or has bytes added: {size} bytes where its header says {expected}")
    return Snapshot(path, header, start)


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the block ends well, and leaves no trace when it does not."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the new name itself durable, where the system lets a folder be opened."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
