"""The model in the forms that peers read, made once from the GGUF file that an installed package holds.

    python -m benchmarks.peers.models FOLDER

`FOLDER` then has `smollm2-bf16/`, which transformers and vLLM load, and `smollm2-f16.gguf` for llama.cpp and OpenVINO.
Both hold what the 4-bit file says, rounded once. Run in StrataKV's own venv.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

FOLDER = "smollm2-bf16"
GGUF = "smollm2-f16.gguf"
MOSTLY_F16 = 1  # in the terms of `general.file_type`


def make_models(target: Path) -> None:
    """Make what is not there yet."""
    from stratakv.models import KNOWN_MODELS

    target.mkdir(parents=True, exist_ok=True)
    (source,) = KNOWN_MODELS["smollm2"].files()
    if not (target / FOLDER).is_dir():
        draft = target / f"{FOLDER}.draft"
        shutil.rmtree(draft, ignore_errors=True)
        make_folder(draft)
        draft.rename(target / FOLDER)
    if not (target / GGUF).is_file():
        part = target / f"{GGUF}.draft"
        make_gguf(source, part)
        part.rename(target / GGUF)


def make_folder(target: Path) -> None:
    """Write safetensors in bf16, the configuration and the tokenizer."""
    import torch

    from stratakv.models import load

    loaded = load("smollm2", dtype=torch.bfloat16)
    loaded.model.save_pretrained(target)
    loaded.tokenizer.save_pretrained(target)


def make_gguf(source: Path, target: Path) -> None:
    """Write a GGUF file with the metadata of `source` and its matrices in fp16; vectors stay in fp32."""
    import gguf
    import numpy as np

    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.quantization_version"):
            value: Any = MOSTLY_F16 if name == "general.file_type" else field.contents()
            element = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, value, field.types[0], sub_type=element)
    for tensor in reader.tensors:
        numbers = gguf.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, numbers.astype(np.float16 if numbers.ndim > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    make_models(Path(sys.argv[1]))
