"""Texts are the same whenever they are asked for, and say what they are part of; what is not there is refused."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stratakv.bench.fidelity import run_fidelity, text_windows
from stratakv.bench.report import fidelity_table
from stratakv.bench.texts import Text, catalog_messages, get_text, topics_token_ids
from stratakv.errors import ConfigurationError
from stratakv.testing.tiny import tiny_llama
from stratakv.testing.ways import model_for


def letters(text: str, **_: Any) -> Any:
    """A tokenizer: one small id a letter."""
    return SimpleNamespace(input_ids=[ord(letter) % 32 for letter in text])


def catalog(messages: dict[str, str]) -> bytes:
    """As GNU gettext compiles it, without a hash table."""
    pairs = [(key.encode(), value.encode()) for key, value in sorted(messages.items())]
    n, at = len(pairs), 28 + 16 * len(pairs)
    tables, strings = b"", b""
    for column in (0, 1):
        for pair in pairs:
            tables += struct.pack("<2I", len(pair[column]), at + len(strings))
            strings += pair[column] + b"\0"
    return struct.pack("<7I", 0x950412DE, 0, n, 28, 28 + 8 * n, 0, at) + tables + strings


def install_sphinx(folder: Path, data: bytes | None) -> None:
    """What of the package is read: a folder, a version and a catalog."""
    place = folder / "sphinx" / "locale" / "fr" / "LC_MESSAGES"
    place.mkdir(parents=True)
    (folder / "sphinx" / "__init__.py").touch()
    if data is not None:
        (place / "sphinx.mo").write_bytes(data)
    (folder / "sphinx-1.2.dist-info").mkdir()
    (folder / "sphinx-1.2.dist-info" / "METADATA").write_text("Name: sphinx\nVersion: 1.2\n", encoding="utf-8")


@pytest.mark.parametrize("name", ["prose", "code"])
def test_what_comes_with_python_is_always_there(name: str) -> None:
    text = get_text(name)
    assert text == get_text(name)
    assert text.name == name
    assert "Python" in text.source
    assert len(text.content) > 100_000


def test_texts_differ() -> None:
    assert "def " in get_text("code").content[:20_000]
    assert topics_token_ids(letters, 500) == get_text("prose").token_ids(letters, 500)
    assert topics_token_ids(letters, 500) != get_text("code").token_ids(letters, 500)


def test_windows_follow_each_other() -> None:
    text = Text("letters", "a test", "abcdefghij")
    assert text_windows(text, letters, 2, 4).tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_a_text_that_is_too_short_says_how_long_it_is() -> None:
    with pytest.raises(ConfigurationError, match=r"'letters' \(a test\) has 3 tokens, 4 are needed"):
        Text("letters", "a test", "abc").token_ids(letters, 4)


def test_french_is_read_from_the_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sentence, other = (
        "Ceci est une phrase, assez longue pour compter ici.",
        "Une autre phrase, au pluriel, qui compte aussi.",
    )
    install_sphinx(tmp_path, catalog({"": "Language: fr\n" * 9, "a": sentence, "b": "mot", "c\0cs": f"mot\0{other}"}))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "sphinx", raising=False)
    text = get_text("french")
    assert text.content == f"{sentence}\n{other}"
    assert text.source == "the messages of sphinx 1.2"


@pytest.mark.parametrize(
    "data", [None, b"", b"no catalog, but long enough to have a beginning", catalog({"a": "b"})[:-20]]
)
def test_a_package_without_its_messages_is_refused(
    data: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_sphinx(tmp_path, data)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(ConfigurationError, match=r"messages|catalog"):
        get_text("french")


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ConfigurationError, match="pip install --no-deps sphinx"):
        get_text("french")


def test_an_unknown_text_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="prose, code, french"):
        get_text("latin")


def test_a_catalog_gives_its_messages_in_order() -> None:
    assert catalog_messages(catalog({"b": "deux", "a": "un", "c": "é\0è"})) == ["un", "deux", "é", "è"]


def test_each_text_has_its_reports() -> None:
    settings: dict[str, Any] = {"n_tokens": 12, "n_windows": 2, "prefilled": 8, "is_attached": True}
    formats = ["bf16", "int8"]
    table = run_fidelity(
        model_for("attached", tiny_llama), letters, formats, name="tiny", texts=["prose", "code"], **settings
    )
    found = json.loads(json.dumps(table.to_dict()))
    assert found["schema"] == "stratakv.bench.fidelity/2"
    assert [text["name"] for text in found["texts"]] == ["prose", "code"]
    for text in found["texts"]:
        assert [report["k_format"] for report in text["formats"]] == formats
        assert {report["n_scored"] for report in text["formats"]} == {8}
    first, second = ([report["kl"] for report in text["formats"]] for text in found["texts"])
    assert first != second
    assert fidelity_table(table).row_count == 4
