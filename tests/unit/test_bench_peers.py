"""The comparison with peers: real workers on a model of some thousand parameters, and workers that go wrong."""

from __future__ import annotations

import json
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.peers.catalog import ENVIRONMENTS, FOLLOWED, OWN, PEERS, Entry
from benchmarks.peers.client import Worker, WorkerError, WorkerLostError, WorkerTimeoutError, cpu_seconds
from benchmarks.peers.contestant import ROOT, Contestant, enlist
from benchmarks.peers.install import why_missing
from benchmarks.peers.models import FOLDER, make_gguf
from benchmarks.peers.report import markdown
from benchmarks.peers.run import Run
from benchmarks.peers.stages import Settings
from stratakv.extension import is_built

SMALL = Settings(
    lengths=(16, 20),
    rounds=2,
    decode_steps=3,
    batches=(2,),
    batch_prompt_tokens=6,
    batch_new_tokens=4,
    threads=1,
    timeout=120,
)
# Answers like a peer, in no time and with the least of imports. It dies in its third prefill.
BRITTLE = """
    import sys
    from benchmarks.peers.protocol import Peer, Unsupported, serve

    class Brittle(Peer):
        prefills = 0

        def load(self, model, threads, options):
            print("libraries print")
            return {"brittle": "1"}

        def prepare(self, n_tokens):
            pass

        def prefill(self, tokens):
            self.prefills += 1
            if self.prefills == 3:
                sys.stderr.write("the last words\\n")
                sys.stderr.flush()
                import os
                os.abort()
            return 0

        def step(self):
            return 1

    serve(Brittle())
"""
Script = Callable[[str], Worker]


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Script]:
    """Start workers from source, and end them after the test."""
    workers: list[Worker] = []

    def start(source: str) -> Worker:
        command = [sys.executable, "-c", textwrap.dedent(source)]
        workers.append(Worker(command, tmp_path / f"{len(workers)}.log", variables=os.environ, cwd=ROOT))
        return workers[-1]

    yield start
    for worker in workers:
        worker.close()


@pytest.fixture(scope="module")
def peers_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `install` leaves, with a tiny model in place of the real one and no venv."""
    folder = tmp_path_factory.mktemp("peers")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "models" / FOLDER)
    words = ["?", "the", "of", "a", "is", "and", ".", ","]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "models" / FOLDER)
    return folder


def _in_fp32(name: str) -> Entry:
    entry = PEERS[name]
    formats = {"format": "fp32"} if "format" in entry.options else {}
    return replace(entry, weights="fp32", kv="fp32", options={**entry.options, "dtype": "fp32", **formats})


OURS = ["stratakv-attached-bf16"]
if is_built():
    OURS += ["stratakv-attached-native-bf16", "stratakv-native-bf16"]
every_own = pytest.mark.parametrize("name", OURS)


@pytest.fixture(scope="module")
def document(peers_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A whole run: ours, one peer that is not installed, one whose worker cannot start."""
    absent = Entry("absent", "bf16", "bf16", "vllm_cpu", "vllm", FOLDER, {})
    broken = Entry("broken", "bf16", "bf16", "no_such_worker", OWN, FOLDER, {})
    entries = [_in_fp32(name) for name in OURS] + [absent, broken]
    out = tmp_path_factory.mktemp("results") / "peers.json"
    found = Run([enlist(entry, peers_dir, SMALL) for entry in entries], SMALL, peers_dir, out).measure()
    assert json.loads(out.read_text(encoding="utf-8")) == json.loads(json.dumps(found))
    return found


def test_a_run_has_the_documented_keys(document: dict[str, Any]) -> None:
    assert set(document) == {"schema", "machine", "commit", "settings", "bandwidth", "complete", "peers"}
    assert document["complete"]
    assert [(entry["stage"], entry["round"]) for entry in document["bandwidth"]] == [
        (stage, number) for stage in ("length 16", "length 20", "batch 2") for number in (0, 1)
    ]
    for peer in document["peers"].values():
        assert set(peer) == {
            "weights", "kv", "versions", "missing", "load_seconds", "peak_bytes", "idle_cpu", "lengths", "batches",
        }  # fmt: skip
        assert (list(peer["lengths"]), list(peer["batches"])) == (["16", "20"], ["2"])


@every_own
def test_our_workers_are_measured_in_every_round(name: str, document: dict[str, Any]) -> None:
    ours = document["peers"][name]
    assert ours["missing"] is None
    assert {"stratakv", "torch", "transformers"} <= set(ours["versions"])
    numbers = [cell[name] for cell in ours["lengths"].values() for name in cell if name.endswith(("second", "token"))]
    numbers.append(ours["batches"]["2"]["output_tokens_per_second"])
    for number in numbers:
        assert len(number["samples"]) == SMALL.rounds
        assert 0 < number["smallest"] <= number["median"] <= number["largest"]


@every_own
def test_our_workers_say_what_the_model_says_without_a_cache(
    name: str, document: dict[str, Any], peers_dir: Path
) -> None:
    model = LlamaForCausalLM.from_pretrained(peers_dir / "models" / FOLDER).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(peers_dir / "models" / FOLDER)
    from stratakv.bench.texts import topics_token_ids

    text = topics_token_ids(tokenizer, 20)
    ours = document["peers"][name]
    for length, cell in ours["lengths"].items():
        ids = text[: int(length)]
        for token in cell["first_tokens"]:
            with torch.no_grad():
                assert int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()) == token
            ids = [*ids, token]


def test_who_is_missing_is_reported_and_the_run_goes_on(document: dict[str, Any]) -> None:
    reasons = {name: peer["missing"] for name, peer in document["peers"].items()}
    assert "was not made" in reasons["absent"]
    assert "No module named" in reasons["broken"]
    table = markdown(document)
    assert "| stratakv-attached-bf16 | fp32 / fp32 |" in table
    assert f"- absent: {reasons['absent']}" in table
    assert f"- broken: {reasons['broken']}" in table


def test_a_worker_that_dies_loses_its_stage_and_is_started_again(script: Script, peers_dir: Path) -> None:
    from benchmarks.peers.stages import stages

    entry = Entry("brittle", "none", "none", "", OWN, FOLDER, {})
    contestant = Contestant(entry, lambda: script(BRITTLE), peers_dir, SMALL)
    for key, stage in stages(SMALL, list(range(32))).items():
        contestant.begin(key, stage)
        for _ in range(SMALL.rounds):
            contestant.round(key, stage)
        contestant.finish()
    found = contestant.to_dict()
    assert found["missing"] is None
    for cell in found["lengths"].values():  # each has a prefill to warm up, one that counts, and the third
        assert len(cell["prefill_tokens_per_second"]["samples"]) == 1
        assert cell["reason"] == "it was ended by SIGABRT in prefill: the last words"
    assert found["batches"]["2"]["reason"] == "it runs one sequence at a time"


def test_an_error_is_an_answer_and_the_worker_goes_on(script: Script) -> None:
    worker = script(BRITTLE)
    with pytest.raises(WorkerError, match="KeyError: 'sing'"):
        worker.ask("sing", 30)
    assert worker.ask("load", 30, model="", threads=1)["versions"] == {"brittle": "1"}  # its print is not in the way
    assert worker.ask("rss", 30)["peak"] > 1 << 20


def test_a_worker_that_does_not_answer_is_ended_with_all_that_it_started(script: Script, tmp_path: Path) -> None:
    started = tmp_path / "started"
    child = "import sys, time; open(sys.argv[1], 'w'); time.sleep(600)"
    command = f"[sys.executable, '-c', {child!r}, {str(started)!r}]"
    worker = script(f"import subprocess, sys; subprocess.run({command}, process_group=0)")
    while not started.exists():
        time.sleep(0.01)
    with pytest.raises(WorkerTimeoutError, match="no answer to load in 0 s"):
        worker.ask("load", 0.1)
    assert not worker.is_open
    assert worker.session not in cpu_seconds()


def test_a_worker_that_ends_early_is_lost_with_its_status(script: Script) -> None:
    worker = script("raise SystemExit(3)")
    with pytest.raises(WorkerLostError, match="ended with status 3 in load"):
        worker.ask("load", 30)


def test_reasons_name_no_folder_of_this_machine(script: Script, peers_dir: Path) -> None:
    source = f"import sys; sys.exit('cannot open {ROOT}/x, /opt/some-thing/lib/y.so; see https://example.org/help')"
    contestant = Contestant(Entry("x", "", "", "", OWN, "", {}), lambda: script(source), peers_dir, SMALL)
    contestant.start()
    assert contestant.missing is not None
    assert contestant.missing.endswith("cannot open ./x, .../y.so; see (an address)")


def test_every_peer_has_a_worker_and_a_venv() -> None:
    for entry in (*PEERS.values(), *FOLLOWED.values()):
        assert (ROOT / "benchmarks" / "peers" / f"{entry.worker}.py").is_file()
        assert entry.environment == OWN or entry.environment in ENVIRONMENTS


def test_a_venv_that_could_not_be_made_says_why(tmp_path: Path) -> None:
    environment = ENVIRONMENTS["openvino"]
    assert "was not made" in str(why_missing(environment, tmp_path))
    (tmp_path / "openvino").mkdir()
    (tmp_path / "openvino" / "failed.txt").write_text("no wheel\n", encoding="utf-8")
    assert why_missing(environment, tmp_path) == "no wheel"


def test_the_f16_file_holds_the_numbers_and_the_metadata_of_the_quantised_one(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "q8.gguf", "llama")
    writer.add_block_count(3)
    writer.add_file_type(7)
    writer.add_token_list(["a", "b"])
    packed = gguf.quantize(numbers, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("matrix", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("vector", numbers[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    make_gguf(tmp_path / "q8.gguf", tmp_path / "f16.gguf", "float16")
    found = gguf.GGUFReader(tmp_path / "f16.gguf")
    matrix, vector = found.tensors
    expected = gguf.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
    assert (matrix.data.dtype, vector.data.dtype) == (np.float16, np.float32)
    assert np.array_equal(matrix.data, expected.astype(np.float16))
    assert np.array_equal(vector.data, numbers[0])
    fields = {name: field.contents() for name, field in found.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert (fields["llama.block_count"], fields["general.file_type"]) == (3, 1)
    assert fields["tokenizer.ggml.tokens"] == ["a", "b"]
