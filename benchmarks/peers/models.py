"""The model in the forms that peers read, made once from the GGUF file that an installed package holds.

    python -m benchmarks.peers.models FOLDER [NAME ...]

`FOLDER` then has `smollm2-bf16/`, which transformers and vLLM load, and `smollm2-f16.gguf` for llama.cpp and OpenVINO:
what the 4-bit file says, rounded once. `smollm2-fp32` and `smollm2-f32.gguf` are made where they are named, and have it
exactly. Run in StrataKV's own venv.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER, EXACT_FOLDER = "smollm2-bf16", "smollm2-fp32"
GGUF, EXACT_GGUF = "smollm2-f16.gguf", "smollm2-f32.gguf"
FOLDER_DTYPES = {FOLDER: "bfloat16", EXACT_FOLDER: "float32"}  # of torch
GGUF_DTYPES = {GGUF: "float16", EXACT_GGUF: "float32"}  # of numpy
FILE_TYPES = {"float32": 0, "float16": 1}  # in the terms of `general.file_type`


def make_models(target: Path, names: Sequence[str] = (FOLDER, GGUF)) -> None:
    """Make those of `names` that are not there yet."""
    from stratakv.models import KNOWN_MODELS

    target.mkdir(parents=True, exist_ok=True)
    (source,) = KNOWN_MODELS["smollm2"].files()
    for name in names:
        if (target / name).exists():
            continue
        draft = target / f"{name}.draft"
        if name in FOLDER_DTYPES:
            shutil.rmtree(draft, ignore_errors=True)
            make_folder(draft, FOLDER_DTYPES[name])
        else:
            make_gguf(source, draft, GGUF_DTYPES[name])
        draft.rename(target / name)


def make_folder(target: Path, dtype: str) -> None:
    """Write safetensors in a dtype of torch, the configuration and the tokenizer."""
    import torch

    from stratakv.models import load

    loaded = load("smollm2", dtype=getattr(torch, dtype))
    loaded.model.save_pretrained(target)
    loaded.tokenizer.save_pretrained(target)


def make_gguf(source: Path, target: Path, dtype: str) -> None:
    """Write a GGUF file with the metadata of `source` and its matrices in a dtype of numpy; vectors stay in fp32."""
    import gguf
    import numpy as np

    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.quantization_version"):
            value: Any = FILE_TYPES[dtype] if name == "general.file_type" else field.contents()
            element = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, value, field.types[0], sub_type=element)
    for tensor in reader.tensors:
        numbers = gguf.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, numbers.astype(dtype if numbers.ndim > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    make_models(Path(sys.argv[1]), *([sys.argv[2:]] if sys.argv[2:] else []))
