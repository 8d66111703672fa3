"""The documents tell the truth: their Python runs, and their relative links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from stratakv.extension import is_built
from stratakv.integrations.transformers.compat import cache_keyword
from stratakv.testing.running import random_ids
from stratakv.testing.tiny import tiny_llama

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
WITH_CODE = [page for page in PAGES if page.name == "README.md" or page.parent != ROOT]

_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def _anchors(text: str) -> set[str]:
    """The anchors that a Markdown renderer gives the headings of `text`."""
    headings = re.findall(r"^#+ (.+)$", _FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", WITH_CODE, ids=_name)
@pytest.mark.usefixtures("using_smollm2_cache")
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a page run in order in one namespace; the README's is empty, others hold a model and a path."""
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    blocks = list(_BLOCK.finditer(text))
    model = tiny_llama()
    if cache_keyword(model) != "cache":
        pytest.skip("the documents are written for the versions of transformers that call the argument `cache`")
    ids = random_ids(1, 12)
    namespace: dict[str, Any] = {"__name__": "documented"}
    if page.name != "README.md":
        inputs = {"input_ids": ids, "attention_mask": ids.new_ones(ids.shape)}
        namespace.update(model=model, inputs=inputs, path=tmp_path / "conversation.kv")
    for block in blocks:
        if not is_built() and (page.name == "native.md" or "native=True" in block.group(1)):
            continue  # it is about the extension, which was not installed
        first_line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * first_line + block.group(1), _name(page), "exec"), namespace)


def test_the_readme_shows_python() -> None:
    assert _BLOCK.search((ROOT / "README.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_relative_links_resolve(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    broken = []
    for link in _LINK.findall(_FENCED.sub("", text)):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        found = target.exists() and target.is_relative_to(ROOT)
        if not found or (anchor and anchor not in _anchors(target.read_text(encoding="utf-8"))):
            broken.append(link)
    assert not broken, f"{_name(page)} links to {broken}"
