"""GGUF files: checked, dequantised by transformers' own loader, and saved as safetensors.

transformers reads the parts of a file that it knows and passes over the rest in silence. A rest that changes what the
model computes (rotary scaling, biases, experts) would make it plausible and wrong, so a file is refused unless every
one of its tensors became a weight.
"""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from stratakv.errors import FormatError
from stratakv.models.pretrained import library_calls, quiet, refuse_absent_weights
from stratakv.models.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of itself."""

    architecture: str
    n_tensors: int
    rope_scaling: str | None


def convert(file: Path, folder: Path, progress: Progress) -> None:
    """Write the model and tokenizer of a GGUF file into `folder`, in transformers' format and float32.

    float32 because neither half format keeps the products of 4-bit codes and fp16 scales exactly.
    Raises FormatError where the file is no GGUF, is damaged, or holds what transformers would leave out, and OSError
    where the folder cannot be written.
    """
    from transformers import AutoTokenizer

    progress.stage(f"Checking {file.name}")
    header = read_header(file)
    progress.stage(f"Dequantising {file.name} (once)")
    model = _dequantised(file, header)
    progress.stage(f"Converting the tokenizer of {file.name} (once)")
    with library_calls(file):
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    progress.stage(f"Saving the converted {file.name}")
    with library_calls(file):
        plain = _detached(model)
    with quiet():
        try:
            plain.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OSError(str(error)) from error


def read_header(file: Path) -> GgufHeader:
    """Return what a GGUF file says of itself.

    Raises FormatError where it is no GGUF, is truncated, or scales its rotary embedding, which is not loaded.
    """
    from gguf import GGUFReader

    with file.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise FormatError(f"{file} is not a GGUF file: it begins with {magic!r} where b'GGUF' belongs")
    try:
        reader = GGUFReader(file)
    except Exception as error:  # the reader checks nothing, so a short file can raise nearly anything
        n_bytes = file.stat().st_size
        raise FormatError(f"{file} is truncated or damaged: its {n_bytes:,} bytes do not hold what it lists") from error
    architecture = _text(reader, "general.architecture")
    if architecture is None:
        raise FormatError(f"{file} does not name its architecture")
    header = GgufHeader(architecture, len(reader.tensors), _text(reader, f"{architecture}.rope.scaling.type"))
    if header.rope_scaling not in (None, "none"):
        raise FormatError(
            f"{file} scales its rotary embedding ({header.rope_scaling!r}), which transformers' GGUF loader leaves "
            f"out: use the safetensors of this model"
        )
    return header


def _text(reader: Any, key: str) -> str | None:
    field = reader.get_field(key)
    return None if field is None else str(field.contents())


def _dequantised(file: Path, header: GgufHeader) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    # The dequantiser's tqdm bar obeys no setting of transformers; what it writes is dropped.
    with library_calls(file), redirect_stderr(io.StringIO()):
        model, info = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.float32,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
            **_dequantise_option(),
        )
    refuse_absent_weights(file, info)
    n_weights = sum(1 for _ in model.parameters())  # tied weights count once, as they do in the file
    if n_weights != header.n_tensors:
        raise FormatError(
            f"{file} ({header.architecture}) has {header.n_tensors} tensors, of which transformers' GGUF loader makes "
            f"{n_weights} weights: what it leaves out would change the model, so use the safetensors of this model"
        )
    return model


def _dequantise_option() -> dict[str, Any]:
    """Ask for plain weights where transformers could also keep them packed (5.24 with the `kernels` package)."""
    try:
        from transformers import GgufConfig
    except ImportError:  # older versions only know plain weights
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _detached(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model with the same tensors that does not remember the GGUF.

    transformers refuses to save one that does.
    """
    from transformers import AutoModelForCausalLM

    described = model.config.to_dict()
    described.pop("quantization_config", None)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(type(model.config).from_dict(described), dtype=torch.float32)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()  # assignment gave each name a parameter of its own
    plain.generation_config = model.generation_config
    return plain
