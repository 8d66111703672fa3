"""Peers' fidelity: workers feed given tokens through caches of their own, on a model of some thousand parameters."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks.peers.catalog import FOLLOWED, OWN, OWN_FORMATS, REFERENCES, Entry
from benchmarks.peers.fidelity import ROWS, Followers, Row, Settings, own_row, score, with_references
from benchmarks.peers.fidelity_report import markdown
from benchmarks.peers.models import FOLDER
from stratakv.testing.running import random_ids
from stratakv.testing.tiny import tiny_llama
from stratakv.testing.ways import model_for
from stratakv.verification import Scorer

SMALL = Settings(tokens=24, windows=2, prefilled=16, threads=1, timeout=120)


@pytest.fixture
def peers_dir(tmp_path: Path) -> Path:
    """What `install` leaves, with a tiny model in place of the real one and no venv."""
    tiny_llama().save_pretrained(tmp_path / "models" / FOLDER)
    return tmp_path


def transformers_entry(name: str, **options: Any) -> Entry:
    """transformers' own cache in the venv of the tests."""
    return Entry(name, "fp32", name, "transformers_cache", OWN, FOLDER, {"dtype": "fp32", **options})


def test_a_peer_is_judged_by_its_reference(peers_dir: Path, tmp_path: Path) -> None:
    windows = random_ids(2, 24)
    exact = transformers_entry("exact", cache="dynamic")
    rounding = transformers_entry("rounding", cache="dynamic", dtype="bf16")
    followers = Followers(windows, SMALL, peers_dir, tmp_path, {OWN: "exact"})
    early, first, second = (followers.row(entry) for entry in (rounding, exact, rounding))
    assert early.missing == "exact, by which it is judged, was not measured"
    assert first.missing is second.missing is None
    assert first.scores is not None and second.scores is not None
    assert (first.scores.n_scored, first.scores.kl, first.scores.top1) == (16, 0, 1)
    assert 0 < second.scores.kl < 0.1
    model = LlamaForCausalLM.from_pretrained(peers_dir / "models" / FOLDER).eval()
    config = model.config
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert first.bytes_per_token == 4 * numbers * 23 / 24  # the last token is not fed
    assert second.bytes_per_token == 2 * numbers * 23 / 24
    with torch.no_grad():
        expected = model(input_ids=windows, use_cache=False).logits[:, 15:-1]
    for i in range(2):
        logits = np.fromfile(tmp_path / f"{OWN}-{i}.f32", dtype=np.float32).reshape(8, -1)
        assert torch.allclose(torch.from_numpy(logits), expected[i], atol=1e-5)


def test_who_fails_is_reported(peers_dir: Path, tmp_path: Path) -> None:
    followers = Followers(random_ids(1, 24), SMALL, peers_dir, tmp_path, {OWN: "exact", "vllm": "vllm"})
    unknown = followers.row(transformers_entry("exact", cache="none", bits=4))
    assert unknown.missing is not None and "none" in unknown.missing
    silent = followers.row(Entry("exact", "", "", "stratakv_attached", OWN, FOLDER, {"dtype": "fp32"}))
    assert silent.missing is not None and "does not say how many bytes" in silent.missing
    absent = followers.row(Entry("vllm", "", "", "vllm_cpu", "vllm", FOLDER, {}))
    assert absent.missing is not None and "was not made" in absent.missing


def test_our_own_row_is_what_fidelity_says() -> None:
    row = own_row("stratakv-int4-int2", model_for("attached", tiny_llama), random_ids(2, 24), SMALL)
    assert row.scores is not None
    assert (row.kv, row.scores.n_scored) == ("int4 / int2", 16)


def test_logits_that_are_not_as_many_as_tokens_are_refused(tmp_path: Path) -> None:
    for name in ("found", "exact"):
        np.zeros(7, dtype=np.float32).tofile(tmp_path / name)
    with pytest.raises(ValueError, match="reshape"):
        score(Scorer(), tmp_path / "found", tmp_path / "exact", torch.zeros(2, dtype=torch.int64))


def test_references_come_before_those_that_they_judge() -> None:
    assert with_references(["llama.cpp-q4_0", "stratakv-int4"]) == ["stratakv-int4", "llama.cpp-f32", "llama.cpp-q4_0"]
    assert {*OWN_FORMATS, *FOLLOWED} == set(ROWS)
    for entry in FOLLOWED.values():
        assert ROWS.index(REFERENCES[entry.environment]) <= ROWS.index(entry.name)


def test_the_table_has_what_was_measured_and_says_what_was_not() -> None:
    row = own_row("stratakv-int4", model_for("attached", tiny_llama), random_ids(1, 24), SMALL)
    rows = [asdict(row), asdict(Row("absent", "q4_0", {}, "no compiler"))]
    machine = {"cpu": "a processor", "cores": 2}
    document = {"machine": machine, "commit": "abc", "settings": asdict(SMALL), "complete": True}
    document |= {"texts": [{"name": "prose", "source": "a book", "rows": rows}]}
    table = markdown(json.loads(json.dumps(document, allow_nan=False)))
    assert "| stratakv-int4 | int4 |" in table
    assert "- absent: no compiler" in table
    assert "Prose (a book):" in table
