"""A GGUF file is converted once, whole or not at all, and refused where its model would come out different."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stratakv.errors import ConfigurationError, FormatError
from stratakv.models import SilentProgress, load
from stratakv.models.conversions import ConversionCache
from stratakv.models.digests import FileDigests

N_LAYERS, WIDTH, N_HEADS, N_KV_HEADS, HEAD_DIM, INNER = 2, 64, 4, 2, 16, 128
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
Edit = Callable[[gguf.GGUFWriter], None]


def tiny_tensors() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(7)
    shapes = {"token_embd.weight": (259, WIDTH), "output_norm.weight": (WIDTH,)}
    for layer in range(N_LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm.weight": (WIDTH,),
            f"blk.{layer}.ffn_norm.weight": (WIDTH,),
            f"blk.{layer}.attn_q.weight": (N_HEADS * HEAD_DIM, WIDTH),
            f"blk.{layer}.attn_k.weight": (N_KV_HEADS * HEAD_DIM, WIDTH),
            f"blk.{layer}.attn_v.weight": (N_KV_HEADS * HEAD_DIM, WIDTH),
            f"blk.{layer}.attn_output.weight": (WIDTH, N_HEADS * HEAD_DIM),
            f"blk.{layer}.ffn_gate.weight": (INNER, WIDTH),
            f"blk.{layer}.ffn_up.weight": (INNER, WIDTH),
            f"blk.{layer}.ffn_down.weight": (WIDTH, INNER),
        }
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write_gguf(path: Path, *, architecture: str = "llama", edit: Edit | None = None) -> Path:
    """Write a model of two layers, its matrices in 8 bits; `edit` adds to it before it is closed."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(N_LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(N_HEADS)
    writer.add_head_count_kv(N_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(259)
    # The 256 letters of byte-level BPE, one merge and two control tokens.
    letters = [chr(code) for code in [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*letters, "th", "<s>", "</s>"])
    writer.add_token_types([gguf.TokenType.NORMAL] * 257 + [gguf.TokenType.CONTROL] * 2)
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    writer.add_chat_template(TEMPLATE)
    for name, values in tiny_tensors().items():
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    if edit is not None:
        edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="session")
def converted_once(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache that holds the conversion of `tiny`; tests that damage it copy it first."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STRATAKV_CACHE_DIR", str(cache))
        load(tiny)
    yield cache


@pytest.fixture
def cache(converted_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy = tmp_path / "cache"
    shutil.copytree(converted_once, copy)
    monkeypatch.setenv("STRATAKV_CACHE_DIR", str(copy))
    return copy


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STRATAKV_CACHE_DIR", str(tmp_path / "empty"))
    return tmp_path / "empty"


def conversion_in(cache: Path) -> Path:
    (folder,) = [path for path in (cache / "models").iterdir() if not path.name.startswith(".")]
    return folder


def no_conversion(file: Path, folder: Path, progress: object) -> None:
    raise AssertionError(f"{file} was converted again")


def test_weights_equal_those_of_transformers_own_loader(tiny: Path, cache: Path) -> None:
    loaded = load(tiny)
    expected = AutoModelForCausalLM.from_pretrained(tiny.parent, gguf_file=tiny.name, dtype=torch.float32).state_dict()
    actual = loaded.model.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    values = gguf.quants.dequantize(
        gguf.quantize(tiny_tensors()["blk.1.ffn_up.weight"], gguf.GGMLQuantizationType.Q8_0),
        gguf.GGMLQuantizationType.Q8_0,
    )
    assert torch.equal(loaded.model.model.layers[1].mlp.up_proj.weight, torch.from_numpy(values))


def test_tokenizer_template_and_end_of_text_survive(tiny: Path, cache: Path) -> None:
    loaded = load(tiny)
    direct = AutoTokenizer.from_pretrained(tiny.parent, gguf_file=tiny.name)
    text = "the <s>path</s> 7"
    assert loaded.tokenizer(text)["input_ids"] == direct(text)["input_ids"]
    assert loaded.tokenizer.chat_template == TEMPLATE
    assert loaded.tokenizer.eos_token_id == loaded.model.generation_config.eos_token_id == 258
    assert loaded.tokenizer.decode(loaded.tokenizer("the path")["input_ids"]) == "the path"


def test_dtype_is_applied_to_the_exact_weights(tiny: Path, cache: Path) -> None:
    exact, rounded = load(tiny), load(tiny, dtype=torch.bfloat16)
    assert rounded.model.dtype == torch.bfloat16
    assert torch.equal(rounded.model.lm_head.weight, exact.model.lm_head.weight.bfloat16())
    assert rounded.digest == exact.digest


def test_first_load_is_silent(tiny: Path, empty_cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(tiny)
    assert capfd.readouterr() == ("", "")


def test_second_load_converts_nothing(tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stratakv.models.loading.convert", no_conversion)
    loaded = load(tiny)
    assert (loaded.name, loaded.path) == ("tiny", tiny)
    assert not loaded.model.training


def test_same_bytes_elsewhere_share_the_conversion(
    tiny: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stratakv.models.loading.convert", no_conversion)
    copy = Path(shutil.copy(tiny, tmp_path / "other.GGUF"))
    assert load(copy).digest == load(str(tiny)).digest


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest", "empty manifest"])
def test_damaged_conversion_is_made_anew(tiny: Path, cache: Path, damage: str) -> None:
    folder = conversion_in(cache)
    load(tiny)  # so that the digests of the sound files are remembered
    weights = folder / "model.safetensors"
    sound = weights.read_bytes()
    if damage == "flip":
        weights.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    elif damage == "truncate":
        weights.write_bytes(sound[:-100])
    elif damage == "delete":
        weights.unlink()
    else:
        (folder / "manifest.json").write_text("{" if damage == "manifest" else '{"version": 1, "files": {}}')
    load(tiny)
    assert weights.read_bytes() == sound
    assert len(json.loads((folder / "manifest.json").read_text())["files"]) > 3


def test_what_a_killed_conversion_left_is_ignored_and_swept(tiny: Path, cache: Path) -> None:
    folder = conversion_in(cache)
    sound = (folder / "model.safetensors").read_bytes()
    leftover = folder.rename(folder.parent / f".{folder.name}.abcd")  # complete but for the rename
    (leftover / "model.safetensors").write_bytes(sound[:1000])
    load(tiny)
    assert (folder / "model.safetensors").read_bytes() == sound
    assert not leftover.exists()


def test_unreadable_memory_of_digests_costs_only_time(tiny: Path, cache: Path) -> None:
    shutil.rmtree(cache / "digests")
    digest = load(tiny).digest
    memories = list((cache / "digests").iterdir())
    for memory in memories:
        memory.write_text("[]")
    assert load(tiny).digest == digest
    assert all(json.loads(memory.read_text())["digest"] for memory in memories)


def test_concurrent_conversions_are_made_once(tmp_path: Path) -> None:
    made: list[Path] = []
    both_here = threading.Barrier(2, timeout=30)

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "model").write_text("whole")

    def convert() -> None:
        cache = ConversionCache(tmp_path, FileDigests(tmp_path / "digests"))
        both_here.wait()
        folders.append(cache.get_or_make("d1", make, SilentProgress()))

    folders: list[Path] = []
    threads = [threading.Thread(target=convert) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(made) == 1
    assert folders[0] == folders[1]
    assert (folders[0] / "model").read_text() == "whole"


def test_failed_conversion_leaves_nothing(tmp_path: Path) -> None:
    cache = ConversionCache(tmp_path, FileDigests(tmp_path / "digests"))

    def make(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise FormatError("no good")

    with pytest.raises(FormatError, match="no good"):
        cache.get_or_make("d1", make, SilentProgress())
    assert [path for path in (tmp_path / "models").iterdir() if path.is_dir()] == []


def test_cache_that_cannot_be_written_is_named(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("STRATAKV_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(ConfigurationError, match="STRATAKV_CACHE_DIR"):
        load(tiny)


def scale_rope(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)


def add_rope_factors(writer: gguf.GGUFWriter) -> None:
    writer.add_tensor("rope_freqs.weight", np.ones(HEAD_DIM // 2, dtype=np.float32))


def add_bias(writer: gguf.GGUFWriter) -> None:
    writer.add_tensor("blk.0.attn_q.bias", np.ones(N_HEADS * HEAD_DIM, dtype=np.float32))


@pytest.mark.parametrize(
    ("edit", "message"), [(scale_rope, "rotary"), (add_rope_factors, "21 tensors"), (add_bias, "21 tensors")]
)
def test_what_the_loader_would_leave_out_is_refused(
    empty_cache: Path, tmp_path: Path, edit: Edit, message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        load(write_gguf(tmp_path / "more.gguf", edit=edit))


def test_unsupported_architecture_is_refused_with_its_name(empty_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="rwkv9") as caught:
        load(write_gguf(tmp_path / "rwkv.gguf", architecture="rwkv9"))
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    "content", [b"", b"not a model at all", b"GGUF", b"GGUF" + b"\xff" * 400], ids=["empty", "text", "magic", "garbage"]
)
def test_file_that_is_no_gguf_is_refused(empty_cache: Path, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "bad.gguf"
    file.write_bytes(content)
    with pytest.raises(FormatError, match=r"bad\.gguf"):
        load(file)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.999])
def test_truncated_gguf_is_refused(tiny: Path, empty_cache: Path, tmp_path: Path, share: float) -> None:
    file = tmp_path / "short.gguf"
    content = tiny.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(FormatError, match=rf"short\.gguf is truncated or damaged: its {file.stat().st_size:,} bytes"):
        load(file)
    assert [path for path in (empty_cache / "models").iterdir() if path.is_dir()] == []
