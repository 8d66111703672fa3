"""A model folder in transformers' format: what it must hold to be loaded, and its digest."""

from __future__ import annotations

import json
from pathlib import Path

from blake3 import blake3

from stratakv.errors import FormatError, ModelNotFoundError
from stratakv.models.digests import FileDigests
from stratakv.models.progress import Progress

CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# transformers builds a tokenizer with an empty vocabulary where it finds none of these, and says nothing.
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


def model_files(folder: Path) -> tuple[Path, ...]:
    """Return the files that decide what the model computes: its configuration and its weights.

    Raises ModelNotFoundError where the folder holds no model, and FormatError where it holds one that cannot or must
    not be read: pickled weights, a shard that is missing or lies elsewhere, no tokenizer.
    """
    if not (folder / CONFIG).is_file():
        raise ModelNotFoundError(f"{folder} is not a model folder: it has no {CONFIG}{_hint(folder)}")
    weights = _weight_files(folder)
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise FormatError(f"{folder} has no tokenizer: one of {', '.join(_TOKENIZERS)} is needed")
    return (folder / CONFIG, *weights)


def folder_digest(files: tuple[Path, ...], digests: FileDigests, progress: Progress) -> str:
    """Return one hex digest for the named files: it depends on their names and bytes, not on where they lie."""
    entries = sorted((file.name, digests.of([file], progress)) for file in files)
    return blake3(json.dumps(entries).encode()).hexdigest()


def _weight_files(folder: Path) -> tuple[Path, ...]:
    if (folder / _WEIGHTS).is_file():
        return (folder / _WEIGHTS,)
    if (folder / _INDEX).is_file():
        return (folder / _INDEX, *_shards(folder))
    pickled = sorted(file.name for pattern in _PICKLED for file in folder.glob(pattern))
    if pickled:
        raise FormatError(
            f"{folder} holds its weights as pickle ({', '.join(pickled)}), which is never read because reading it runs "
            f"what is inside: convert it to safetensors"
        )
    raise ModelNotFoundError(f"{folder} has a {CONFIG} but neither {_WEIGHTS} nor {_INDEX}{_hint(folder)}")


def _shards(folder: Path) -> list[Path]:
    index = folder / _INDEX
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        inside = all(Path(name).name == name for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{index} is not an index of weights: {error}") from error
    if not inside or not names:
        raise FormatError(f"{index} must name files of its own folder, and names {sorted(names)}")
    absent = sorted(name for name in names if not (folder / name).is_file())
    if absent:
        raise FormatError(f"{folder} is incomplete: {', '.join(absent)} named in {_INDEX} but absent")
    return [folder / name for name in sorted(names)]


def _hint(folder: Path) -> str:
    files = sorted(file.name for file in folder.glob("*.gguf"))
    return f"; to load {files[0]}, give the path of the file" if files else ""
