"""`stratakv verify`: one model in several cuts, or tiny ones of many architectures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_runs import is_one_sentence, run

from stratakv.verification.architectures import ArchitectureReport, ArchitectureRow, markdown
from stratakv.verification.cuts import CUTS

pytestmark = pytest.mark.usefixtures("using_smollm2_cache")

ROW = {"name", "model_type", "gathered", "attached", "dynamic_cache", "reason"}


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
        ("--tokens 7", "--tokens"),
        ("--tokens 9000", "the model has 8,192 positions"),
        ("--architectures llama,nonsense", "no architecture 'nonsense'"),
        ("--architectures llama --attach", "leave --attach out"),
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


def test_ours_is_wrong_only_where_transformers_own_is_right() -> None:
    def report(gathered: str, attached: str, dynamic: str) -> ArchitectureReport:
        return ArchitectureReport((ArchitectureRow("A", "a", gathered, attached, dynamic, "x|y"),), "5", "2")

    assert report("pass", "refused", "pass").passed
    assert report("fail", "fail", "fail").passed
    assert not report("pass", "fail", "pass").passed
    assert not report("fail", "pass", "pass").passed
    assert not ArchitectureReport((ArchitectureRow("A", "a", None, None, None, "no KV cache"),), "5", "2").passed
    assert "x\\|y |" in markdown(report("pass", "pass", "pass"))
