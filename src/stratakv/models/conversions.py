"""The cache of converted models: written whole or not at all, and verified before it is used.

<cache>/models/<digest of the source>-v<version>/   config.json, model.safetensors, tokenizer.json, ..., manifest.json
<cache>/models/.<key>.<random>/                     a conversion under way, or what a killed one left
<cache>/models/.<key>.lock                          held while one is under way
<cache>/digests/                                    see `digests`
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import mkdtemp

from filelock import FileLock, Timeout

from stratakv.errors import ConfigurationError
from stratakv.models.digests import FileDigests, digest_of
from stratakv.models.progress import Progress

CONVERTER_VERSION = 1  # raise it when the same source would be written differently
_MANIFEST = "manifest.json"


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Return where converted models are kept: STRATAKV_CACHE_DIR, or `stratakv` in the user's cache folder."""
    chosen = environment.get("STRATAKV_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser()
    base = environment.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "stratakv"


class ConversionCache:
    """Converted models by the digest of what they were made from."""

    def __init__(self, root: Path, digests: FileDigests) -> None:
        self._folder = root / "models"
        self._digests = digests

    def get_or_make(self, source_digest: str, make: Callable[[Path], None], progress: Progress) -> Path:
        """Return the folder of a verified conversion; `make(folder)` fills an empty one where there is none.

        Processes that want the same conversion wait for the one that makes it. What `make` raises passes through and
        leaves nothing behind. Raises ConfigurationError where the cache cannot be written.
        """
        target = self._folder / f"{source_digest}-v{CONVERTER_VERSION}"
        if self._is_whole(target, progress):
            return target
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self._folder / f".{target.name}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                progress.stage("Waiting for another process that converts this model")
                lock.acquire()
            try:
                if not self._is_whole(target, progress):
                    self._make(target, make, progress)
            finally:
                lock.release()
        except OSError as error:
            raise ConfigurationError(
                f"the model cannot be converted into {self._folder} ({error}): STRATAKV_CACHE_DIR chooses another"
            ) from error
        return target

    def _make(self, target: Path, make: Callable[[Path], None], progress: Progress) -> None:
        # Nobody else is converting this source while we hold its lock: what is left over is a killed process's.
        for leftover in self._folder.glob(f".{target.name}.*"):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
        draft = Path(mkdtemp(prefix=f".{target.name}.", dir=self._folder))
        try:
            make(draft)
            self._seal(draft, progress)
            # A rename cannot replace a folder that has something in it. Whoever has the old files open keeps them.
            shutil.rmtree(target, ignore_errors=True)
            draft.rename(target)
            _sync(self._folder)
            if not self._is_whole(target, progress):  # also reads the files once, so that the next load need not
                raise OSError(f"{target} does not hold what was written to it")
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _seal(self, draft: Path, progress: Progress) -> None:
        files = sorted(file for file in draft.iterdir() if file.is_file())
        for file in files:
            _sync(file)
        manifest = {"version": CONVERTER_VERSION, "files": {file.name: digest_of([file], progress) for file in files}}
        (draft / _MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        _sync(draft / _MANIFEST)
        _sync(draft)

    def _is_whole(self, target: Path, progress: Progress) -> bool:
        """Say whether every file has the bytes that were sealed. Cheap: unchanged files are not read again."""
        try:
            manifest = json.loads((target / _MANIFEST).read_text(encoding="utf-8"))
            sealed = manifest["files"]
            present = {file.name for file in target.iterdir()} - {_MANIFEST}
            return (
                manifest["version"] == CONVERTER_VERSION
                and bool(sealed)
                and present == sealed.keys()
                and all(self._digests.of([target / name], progress) == digest for name, digest in sealed.items())
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
