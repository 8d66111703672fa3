"""`stratakv generate` and `stratakv bench`: what they print and how they end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_runs import FIELDS, is_one_sentence, run, start

from stratakv.cli import options

pytestmark = pytest.mark.usefixtures("using_smollm2_cache")

PROMPT = "The three primary colours are"
KV_BYTES_A_TOKEN = 30 * 2 * 3 * 64 * 4  # layers, K and V, heads, head dim, fp32


def test_generate_streams_text_and_sums_up_on_stderr() -> None:
    done = start("generate", "--prompt", PROMPT, "--max-new-tokens", "8")
    out, err = done.communicate(timeout=120)
    assert done.returncode == 0
    assert len(out.split()) >= 4
    assert err.count("\n") == 1
    for part in ("8 tokens, ", " tokens/s", "KV ", "(fp32, paged)", "12 tokens seen, 12 stored", "waste "):
        assert part in err


def generated(*args: str) -> dict[str, Any]:
    result = run("generate", "--json", *args)
    assert (result.exit_code, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


def test_generate_json_adds_up_and_every_layout_says_the_same() -> None:
    found = {x: generated("--prompt", PROMPT, "--max-new-tokens", "6", "--layout", x) for x in options.LAYOUTS}
    for layout, each in found.items():
        assert set(each) == FIELDS
        assert (each["layout"], each["format"], each["model"]) == (layout, "fp32", "smollm2")
        assert (each["generated_tokens"], each["stop_reason"]) == (6, "length")
        # The last token was never fed.
        assert each["seen_tokens"] == each["stored_tokens"] == each["prompt_tokens"] + 5
        assert each["kv_bytes"] * (1 - each["waste"]) == pytest.approx(each["seen_tokens"] * KV_BYTES_A_TOKEN)
        assert each["seconds"]["prefill"] > 0
        assert each["tokens_per_second"] == pytest.approx(5 / each["seconds"]["decode"])
    assert len({each["text"] for each in found.values()}) == 1
    assert found["contiguous"]["kv_bytes"] == (found["paged"]["prompt_tokens"] + 6) * KV_BYTES_A_TOKEN


def test_generate_continues_a_file_and_standard_input_alike(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text(PROMPT, encoding="utf-8")
    options_ = ["--json", "--max-new-tokens", "4", "--format", "bf16", "--block-tokens", "8"]
    by_file = json.loads(run("generate", "--file", str(tmp_path / "prompt.txt"), *options_).stdout)
    by_stdin = json.loads(run("generate", "--file", "-", *options_, stdin=PROMPT).stdout)
    assert by_file["text"] == by_stdin["text"]
    assert by_file["kv_bytes"] == 8 * KV_BYTES_A_TOKEN // 2
    assert by_file["format"] == "bf16"


def test_generate_answers_with_the_template_and_stops_by_itself() -> None:
    found = generated("--prompt", "What is the capital of France?", "--chat", "--max-new-tokens", "24")
    assert "Paris" in found["text"]
    assert "<|im_end|>" not in found["text"]
    assert found["stop_reason"] == "eos"


def test_sampling_is_repeatable_by_its_seed_and_differs_from_greedy() -> None:
    args = ("--prompt", PROMPT, "--max-new-tokens", "8")
    first, again, other = (generated(*args, "--temperature", "1.5", "--seed", seed)["text"] for seed in ("1", "1", "2"))
    assert first == again
    assert len({first, other, generated(*args)["text"]}) == 3


def test_a_single_token_has_no_rate() -> None:
    result = run("generate", "--prompt", PROMPT, "--max-new-tokens", "1")
    assert "1 tokens, - tokens/s" in result.stderr
    assert generated("--prompt", PROMPT, "--max-new-tokens", "1")["tokens_per_second"] is None


def test_a_reader_that_goes_away_is_met_quietly() -> None:
    process = start("generate", "--prompt", PROMPT, "--max-new-tokens", "200")
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(1)
    process.stdout.close()
    assert (process.stderr.read(), process.wait(timeout=60)) == ("", 141)
    process.stderr.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no device that is always full")
def test_output_that_cannot_be_written_is_one_sentence() -> None:
    command = str(Path(sys.executable).with_name("stratakv"))
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([command, "--version"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert is_one_sentence(done.stderr)


def test_ctrl_c_ends_generate_with_130() -> None:
    process = start("generate", "--prompt", PROMPT, "--max-new-tokens", "2000")
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")


def test_bench_fidelity_measures_the_real_model_briefly(tmp_path: Path) -> None:
    options = ("--formats", "bf16,int4", "--tokens", "110", "--windows", "1", "--prefilled", "100")
    result = run("bench", "fidelity", "--texts", "prose,code", *options, "--json", str(tmp_path / "f.json"))
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "f.json").read_text(encoding="utf-8"))
    assert found["schema"] == "stratakv.bench.fidelity/2"
    assert [text["name"] for text in found["texts"]] == ["prose", "code"]
    for text in found["texts"]:
        exact, coarse = text["formats"]
        assert [exact["k_format"], coarse["k_format"]] == ["bf16", "int4"]
        assert exact["n_scored"] == coarse["n_scored"] == 10
        assert exact["kl"] < coarse["kl"] < 0.1
        assert text["name"] in result.output
    assert "KL" in result.output
    for refused in (["--tokens", "50", "--prefilled", "50"], ["--texts", "prose,latin"]):
        assert run("bench", "fidelity", *refused).exit_code != 0


def test_bench_scaling_measures_the_real_model_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    from stratakv.bench import scaling

    reports: list[Any] = []
    run_scaling = scaling.run_scaling

    def keep(*args: Any, **kwargs: Any) -> Any:
        reports.append(run_scaling(*args, **kwargs))
        return reports[-1]

    monkeypatch.setattr(scaling, "run_scaling", keep)
    result = run("bench", "scaling", "--lengths", "4,5,6,7", "--repeats", "1", "--json")
    found = json.loads(result.stdout)
    # Four lengths within three tokens of one another say nothing of growth; what they seem to say is in the exit code.
    assert (result.exit_code, result.stderr) == (int("missed" in found["targets"].values()), "")
    assert (found["model"]["name"], found["model"]["layers"]) == ("smollm2", 30)
    assert [point["samples"] for point in found["cached"]["paged"]["points"]] == [2 * scaling.STEPS_A_ROUND] * 4
    monkeypatch.setattr(scaling, "run_scaling", lambda *args, **kwargs: reports[0])
    table = run("bench", "scaling", "--lengths", "4,5,6,7")
    assert (table.exit_code, table.stderr) == (result.exit_code, "")
    assert "exponent" in table.stdout
