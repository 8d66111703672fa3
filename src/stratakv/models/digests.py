"""Content digests (BLAKE3) of model files, remembered for as long as the files are unchanged.

Reading 100 MB takes 0.05 s, a model of 16 GB ten seconds: too much for every start. A file counts as unchanged while
its path, inode, size, modification time and *status-change* time are. The last is what makes the memory safe: a program
can set a file's modification time back, but not its status-change time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile

from blake3 import blake3

from stratakv.models.progress import Progress

_CHUNK_BYTES = 32 << 20


class FileDigests:
    """Digests of files, with a memory in `folder`; without a writable folder they are computed each time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def of(self, files: Sequence[Path], progress: Progress) -> str:
        """Return the hex digest of the bytes of `files`, joined in their order.

        Raises OSError where a file cannot be read.
        """
        identity = [_identity(file) for file in files]
        memory = self._folder / f"{blake3(json.dumps([str(file) for file in files]).encode()).hexdigest()}.json"
        known = _recall(memory, identity)
        if known is not None:
            return known
        digest = digest_of(files, progress)
        # A file that was written to while it was read is not remembered under either of its states.
        if [_identity(file) for file in files] == identity:
            _remember(memory, identity, digest)
        return digest


def digest_of(files: Sequence[Path], progress: Progress) -> str:
    """Return the hex digest of the bytes of `files`, joined in their order, by reading them.

    Raises OSError where a file cannot be read.
    """
    total = sum(file.stat().st_size for file in files)
    progress.stage(f"Reading {files[0].name}")
    hasher = blake3(max_threads=blake3.AUTO)
    done = 0
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                hasher.update(chunk)
                done += len(chunk)
                progress.advance(done, total)
    return hasher.hexdigest()


def _identity(file: Path) -> list[int | str]:
    status = file.stat()
    return [str(file.absolute()), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _recall(memory: Path, identity: list[list[int | str]]) -> str | None:
    try:
        record = json.loads(memory.read_text(encoding="utf-8"))
        if record["files"] != identity:
            return None
        digest = record["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a memory that is absent or damaged costs one reading, nothing else
    return digest if isinstance(digest, str) and len(digest) == blake3.digest_size * 2 else None


def _remember(memory: Path, identity: list[list[int | str]], digest: str) -> None:
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile("w", dir=memory.parent, suffix=".tmp", delete=False, encoding="utf-8") as stream:
            json.dump({"files": identity, "digest": digest}, stream)
        os.replace(stream.name, memory)  # noqa: PTH105  (a name, not a Path)
    except OSError:
        return  # a read-only cache only costs time: see the class
