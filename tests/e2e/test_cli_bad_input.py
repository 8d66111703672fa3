"""Whatever is wrong is said in one sentence on stderr, at once, and with an exit code that tells whose fault it is."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import typer
from cli_runs import is_one_sentence, run
from typer.testing import CliRunner

from stratakv.cli import options
from stratakv.cli.app import COMMANDS, build_app
from stratakv.cli.options import check_report, write_report
from stratakv.errors import CapacityError, ConfigurationError, InvariantError

pytestmark = pytest.mark.usefixtures("using_smollm2_cache")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "latin1.txt").write_bytes("naïve".encode("latin-1"))
    (folder / "long.txt").write_text("word " * 9000, encoding="utf-8")
    (folder / "good.txt").write_text("Good text", encoding="utf-8")
    (folder / "no-model").mkdir()
    return folder


BAD_INPUT = [
    ("", "no command was given"),
    ("bench", "no command was given"),
    ("nonsense", "nonsense"),
    ("generate --nonsense", "--nonsense"),
    ("generate", "--prompt TEXT or --file PATH"),
    ("generate --prompt x --file {files}/good.txt", "both given"),
    ("generate --prompt=", "the prompt is empty"),
    ("generate --file {files}/empty.txt", "empty.txt is empty"),
    ("generate --file {files}/absent.txt", "absent.txt does not exist"),
    ("generate --file {files}", "is a directory"),
    ("generate --file {files}/good.txt/x", "cannot be read"),
    ("generate --file {files}/latin1.txt", "not UTF-8 text: byte 2 is 0xef"),
    ("generate --prompt \udcff", "the prompt is not UTF-8"),
    ("generate --prompt x --format int3", "'int3' is not one of fp32, bf16, fp16"),
    ("generate --prompt x --residual -1", "--residual"),
    ("generate --prompt x --format int4 --residual 10", "residual must be at least 64, got 10"),
    ("generate --prompt x --residual 64", "residual is how many tokens are held in 16 bits beside fewer bits"),
    ("chat --format int2 --residual 1", "residual must be at least 64, got 1"),
    ("generate --prompt x --layout round", "'round' is not one of paged, contiguous, growing"),
    ("generate --prompt x --dtype fp64", "'fp64' is not one of fp32, bf16, fp16"),
    ("generate --prompt x --max-new-tokens 0", "--max-new-tokens"),
    ("generate --prompt x --max-new-tokens -3", "--max-new-tokens"),
    ("generate --prompt x --max-new-tokens many", "--max-new-tokens"),
    ("generate --prompt x --block-tokens 0", "--block-tokens"),
    ("generate --prompt x --temperature -1", "--temperature must be"),
    ("generate --prompt x --temperature nan", "--temperature must be"),
    ("generate --prompt x --top-p 0", "--top-p must be"),
    ("generate --prompt x --top-p 1.5", "--top-p must be"),
    ("generate --prompt x --top-p 0.9 --temperature 0", "give one of the two"),
    ("generate --prompt x --seed -1", "--seed"),
    ("generate --prompt x --model absent", "'absent' is not a known model"),
    ("generate --prompt x --model {files}/no-model", "no-model"),
    ("generate --prompt x --model {files}/good.txt", "good.txt is a file of another kind"),
    ("generate --prompt x --max-new-tokens 9000", "9,001; the model has 8,192 positions"),
    ("generate --file {files}/long.txt --layout contiguous", "the model has 8,192 positions"),
    ("generate --prompt x --max-new-tokens 9000 --json", "9,001; the model has 8,192 positions"),
    ("chat --format int3", "'int3' is not one of"),
    ("chat --dtype fp64", "'fp64' is not one of"),
    ("chat --model absent", "'absent' is not a known model"),
    ("chat --max-new-tokens 0", "--max-new-tokens"),
    ("bench scaling --lengths 1,two,3,4", "--lengths takes numbers"),
    ("bench scaling --lengths 8,16,32", "at least 4 different lengths"),
    ("bench scaling --lengths 0,8,16,32", "at least 1"),
    ("bench scaling --lengths 8,16,32,8192", "8,193 positions; the model has 8,192"),
    ("bench scaling --layout round", "'round' is not one of paged, contiguous, growing, all"),
    ("bench scaling --format int3", "'int3' is not one of"),
    ("bench scaling --repeats 0", "--repeats"),
    ("bench scaling --model absent", "'absent' is not a known model"),
]


@pytest.mark.parametrize(("line", "fragment"), BAD_INPUT, ids=[line.replace("\udcff", "?") for line, _ in BAD_INPUT])
def test_bad_input_is_one_sentence_and_exit_code_2(line: str, fragment: str, files: Path) -> None:
    result = run(*(part.format(files=files) for part in line.split()))
    assert fragment in result.stderr
    assert (result.exit_code, result.stdout) == (2, "")
    assert is_one_sentence(result.stderr)


def test_a_model_without_a_chat_template_cannot_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    from stratakv import models

    loaded = models.load()
    loaded.tokenizer.chat_template = None
    monkeypatch.setattr(models, "load", lambda *args, **kwargs: loaded)
    for args in (["generate", "--prompt", "x", "--chat"], ["chat"]):
        result = run(*args, stdin="hello\n")
        assert (result.exit_code, result.stdout) == (2, "")
        assert is_one_sentence(result.stderr)
        assert "no chat template" in result.stderr


def raising(error: BaseException) -> Any:
    def broken() -> None:
        raise error

    return CliRunner().invoke(build_app({**COMMANDS, "broken": broken, "some broken": broken}), ["some", "broken"])


def test_our_own_errors_never_show_a_traceback_and_others_do() -> None:
    for error in (CapacityError("full\nup"), InvariantError("books"), MemoryError(), OSError(28, "Full")):
        result = raising(error)
        assert (result.exit_code, result.stdout) == (1, "")
        assert is_one_sentence(result.stderr)
    result = raising(ZeroDivisionError("surprise"))
    assert (result.exit_code, result.stdout) == (1, "")
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("stratakv: internal error: ZeroDivisionError: surprise\n")
    assert (raising(KeyboardInterrupt()).exit_code, raising(KeyboardInterrupt()).stderr) == (130, "")
    assert (raising(BrokenPipeError()).exit_code, raising(BrokenPipeError()).stderr) == (141, "")
    assert raising(typer.Exit(7)).exit_code == 7


def test_help_version_and_argument_errors_need_no_torch() -> None:
    for args in (["--help"], ["generate", "--help"], ["--version"], ["generate", "--prompt", "x", "--format", "no"]):
        check = (
            "import sys, atexit\nfrom stratakv.cli import main\n"
            "atexit.register(lambda: print('torch' in sys.modules, 'transformers' in sys.modules))\n"
            f"sys.argv = ['stratakv', *{args}]\nmain()"
        )
        done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
        assert done.stdout.endswith("False False\n"), done


def test_every_command_is_in_the_help_and_documented() -> None:
    text = run("--help").stdout
    assert all(name.split()[0] in text for name in COMMANDS)
    assert all((function.__doc__ or "").strip() for function in COMMANDS.values())


def test_choices_are_those_of_the_library() -> None:
    from stratakv.bench.texts import TEXTS
    from stratakv.blocks.geometry import LAYOUTS
    from stratakv.codecs import codec_names

    assert codec_names() == options.FORMATS
    assert LAYOUTS == options.LAYOUTS
    assert tuple(TEXTS) == options.TEXTS


def test_looking_at_where_a_report_goes_changes_nothing(tmp_path: Path) -> None:
    link, pipe = tmp_path / "link.json", tmp_path / "pipe"
    link.symlink_to(tmp_path / "target.json")
    check_report(link)
    assert link.is_symlink() and not link.exists()
    os.mkfifo(pipe)
    check_report(pipe)  # opening it would wait for a reader
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    check_report(pipe)  # and here end its reading
    write_report(pipe, {"a": 1})
    reader.join(timeout=30)
    assert read == ['{\n  "a": 1\n}\n']
    kept = tmp_path / "kept.json"
    kept.write_text("old")
    check_report(kept)
    assert kept.read_text() == "old"
    with pytest.raises(ConfigurationError):
        check_report(tmp_path)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(ConfigurationError):
        check_report(loop)
