"""`stratakv verify`: one model in several cuts, or tiny ones of many architectures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_runs import is_one_sentence, run

from stratakv.verification.architectures import COLUMNS, ArchitectureReport, architecture_row, markdown
from stratakv.verification.cuts import CUTS
from stratakv.verification.zoo.harness import FeedResult, Outcome
from stratakv.verification.zoo.survey import Row

pytestmark = pytest.mark.usefixtures("using_smollm2_cache")

ROW = {"name", "model_type", "gathered", "attached", "dynamic_cache", "reason", "is_wrong"}


def test_smollm2_passes_every_cut() -> None:
    result = run("verify", "--tokens", "24", "--layout", "paged", "--format", "fp32", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    report = json.loads(result.stdout)
    assert (report["passed"], report["first_divergence"], report["n_tokens"]) == (True, None, 24)
    assert (report["layout"], report["k_format"], report["attached"]) == ("paged", "fp32", False)
    assert {cut["name"]: (cut["passed"], cut["refused"]) for cut in report["cuts"]} == dict.fromkeys(CUTS, (True, None))


def test_without_json_it_is_a_table() -> None:
    result = run("verify", "--tokens", "8", "--layout", "contiguous", "--attach")
    assert (result.exit_code, result.stderr) == (0, "")
    assert all(name in result.stdout for name in CUTS)
    assert result.stdout.endswith("passed\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--format int3", "'int3' is not one of fp32, bf16, fp16"),
        ("--layout round", "'round' is not one of paged, contiguous, growing"),
        ("--tokens 0", "--tokens must be at least 1, got 0"),
        ("--tokens 9000", "more than the model's 8,192 positions"),
        ("--architectures llama,nonsense", "no architecture 'nonsense'"),
        ("--architectures llama --attach", "leave --attach out"),
        ("--architectures llama --layout contiguous", "leave --layout out"),
        ("--layout growing --block-tokens 8", "leave --block-tokens out"),
        ("--write-docs table.md", "needs --architectures"),
        ("--architectures llama --write-docs /nonsense/table.md", "not a file in a folder that exists"),
    ],
)
def test_bad_input_is_one_sentence(arguments: str, said: str) -> None:
    result = run("verify", *arguments.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr
    assert is_one_sentence(result.stderr)


def test_architectures_are_rows(tmp_path: Path) -> None:
    docs = tmp_path / "architectures.md"
    result = run("verify", "--architectures", "llama,t5,gemma3_text", "--json", "--write-docs", str(docs))
    assert (result.exit_code, result.stderr) == (0, "")
    report = json.loads(result.stdout)
    assert {row["model_type"] for row in report["rows"]} == {"llama", "t5", "gemma3_text"}
    for row in report["rows"]:
        assert set(row) == ROW
        assert (row["gathered"], row["attached"], row["dynamic_cache"]) == ("pass", "pass", "pass"), row["reason"]
    assert report["counts"]["gathered"] == {"pass": 3, "refused": 0, "fail": 0, "not run": 0}
    written = docs.read_text(encoding="utf-8")
    assert f"transformers {report['transformers']}" in written
    assert "| LlamaForCausalLM | llama | pass | pass | pass |  |" in written


def reported(**failed: tuple[str, ...]) -> ArchitectureReport:
    """The report on one architecture of which the columns failed in the named feeds, and passed the others."""
    results = {}
    for column in COLUMNS:
        wrong = failed.get(column, ())
        feeds = tuple(FeedResult(n, "fail" if n in wrong else "pass", 1.0, "x|y") for n in ("single", "chunks"))
        results[column] = Outcome("fail" if wrong else "pass", "x|y" if wrong else "", 1.0, 0.1, feeds)
    return ArchitectureReport((architecture_row(Row("A", "a", "causal-lm", True, results)),), "5", "2")


def test_ours_is_wrong_where_transformers_own_is_not_wrong_in_the_same_way() -> None:
    assert reported().passed
    assert reported(gathered=("single",), attached=("single",), dynamic_cache=("single",)).passed
    assert reported(gathered=("single",), dynamic_cache=("single", "chunks")).passed
    assert not reported(attached=("single",)).passed
    assert not reported(gathered=("single", "chunks"), dynamic_cache=("single",)).passed
    assert reported(gathered=("single",)).rows[0].is_wrong
    nothing = architecture_row(Row("A", "a", "causal-lm", False, {}, "no KV cache"))
    assert not ArchitectureReport((nothing,), "5", "2").passed
    assert "x\\|y |" in markdown(reported(gathered=("single",)))
