"""`load`: a name or a path in, a model with its tokenizer and its digest out."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

from stratakv.errors import ConfigurationError, FormatError, ModelNotFoundError
from stratakv.models.checkpoint import folder_digest, model_files
from stratakv.models.conversions import ConversionCache, cache_folder
from stratakv.models.digests import FileDigests
from stratakv.models.gguf_file import convert
from stratakv.models.pretrained import read_model, read_tokenizer
from stratakv.models.progress import Progress, SilentProgress
from stratakv.models.registry import KNOWN_MODELS, NamedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

_ACCEPTED = (
    f"a known model ({', '.join(KNOWN_MODELS)}), a folder with config.json, *.safetensors and a tokenizer, "
    f"or a .gguf file"
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, and what it was made from."""

    model: PreTrainedModel  # a causal language model, on the CPU, in eval mode
    tokenizer: PreTrainedTokenizerFast
    name: str  # the known name, or the folder's or file's own
    path: Path  # the folder or the file it came from; of a file in parts, the first
    digest: str  # hex, of the configuration and the weights as they are on disk: it does not depend on dtype


def load(
    name_or_path: str | Path = "smollm2",
    *,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> LoadedModel:
    """Load a causal language model from this machine; no network is ever tried.

    Takes a name in `KNOWN_MODELS`, a folder with config.json, safetensors and a tokenizer, or a .gguf file. A name wins
    over a folder of that name: write `./smollm2` for the folder. A GGUF is converted the first time (20 s for smollm2)
    and kept in `cache_folder()`; from then on it loads as fast as a folder does.

    Raises:
        ModelNotFoundError: nothing is there under this name or path, or what is there is no model.
        FormatError: a model is there and is damaged, incomplete, pickled, or of an architecture that is not served.
        ConfigurationError: dtype is not a floating-point type for models, or the cache cannot be written.
    """
    if dtype not in _DTYPES:
        raise ConfigurationError(f"dtype {dtype} is not one of {', '.join(map(str, _DTYPES))}")
    reporter = progress if progress is not None else SilentProgress()
    loader = _Loader(cache_folder(), reporter)
    if isinstance(name_or_path, str) and name_or_path in KNOWN_MODELS:
        return loader.named(KNOWN_MODELS[name_or_path], dtype)
    path = _existing(name_or_path)
    try:
        return loader.folder(path, dtype) if path.is_dir() else loader.gguf(path, dtype)
    except OSError as error:
        raise ModelNotFoundError(f"{path} cannot be read: {error}") from error


def _existing(name_or_path: str | Path) -> Path:
    refusal = f"{str(name_or_path)!r} is not {_ACCEPTED}, and nothing is fetched from a hub"
    if not str(name_or_path):
        raise ModelNotFoundError(refusal)
    try:
        path = Path(name_or_path).expanduser()
        if path.is_dir() or path.is_file():
            return path
    except (OSError, RuntimeError) as error:  # no path at all: too long, or the home of a user who does not exist
        raise ModelNotFoundError(refusal) from error
    raise ModelNotFoundError(refusal)


class _Loader:
    """One load: the cache it uses and whom it tells."""

    def __init__(self, cache: Path, progress: Progress) -> None:
        self._progress = progress
        self._digests = FileDigests(cache / "digests")
        self._conversions = ConversionCache(cache, self._digests)

    def named(self, known: NamedModel, dtype: torch.dtype) -> LoadedModel:
        parts = known.files()

        def make(folder: Path) -> None:
            self._progress.stage(f"Checking the package of {known.name}")
            known.check()
            if len(parts) == 1:
                convert(parts[0], folder, self._progress)
                return
            # Joined beside the draft: the file is only needed for as long as it is read.
            with TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as scratch:
                whole = Path(scratch) / f"{known.name}.gguf"
                _join(parts, whole)
                convert(whole, folder, self._progress)

        digest = self._digests.of(parts, self._progress)
        return self._read(
            self._conversions.get_or_make(digest, make, self._progress), dtype, known.name, parts[0], digest
        )

    def gguf(self, file: Path, dtype: torch.dtype) -> LoadedModel:
        if file.suffix.lower() != ".gguf":
            raise FormatError(f"{file} is a file of another kind than .gguf; accepted is {_ACCEPTED}")
        digest = self._digests.of([file], self._progress)
        converted = self._conversions.get_or_make(
            digest, lambda folder: convert(file, folder, self._progress), self._progress
        )
        return self._read(converted, dtype, file.stem, file, digest)

    def folder(self, folder: Path, dtype: torch.dtype) -> LoadedModel:
        digest = folder_digest(model_files(folder), self._digests, self._progress)
        return self._read(folder, dtype, folder.resolve().name, folder, digest)

    def _read(self, folder: Path, dtype: torch.dtype, name: str, path: Path, digest: str) -> LoadedModel:
        self._progress.stage(f"Loading {name}")
        return LoadedModel(read_model(folder, dtype), read_tokenizer(folder), name, path, digest)


def _join(parts: tuple[Path, ...], target: Path) -> None:
    with target.open("wb") as output:
        for part in parts:
            with part.open("rb") as stream:
                shutil.copyfileobj(stream, output)
