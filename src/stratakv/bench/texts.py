"""Texts to measure with, from what is installed: prose and code that come with Python, and French messages."""

from __future__ import annotations

import importlib
import inspect
import platform
import struct
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stratakv.errors import ConfigurationError

CODE_MODULES = ("ast", "tarfile", "argparse", "typing", "inspect")
"""Modules of the standard library whose source is the text `code`, in this order."""
SENTENCE = 40
"""Characters that a message needs to be part of a text: shorter ones are words and labels."""
_CATALOG_MAGIC = 0x950412DE  # of a compiled message catalog of GNU gettext, little-endian


@dataclass(frozen=True)
class Text:
    """A text, and where it is from.

    Attributes:
        name: as in `TEXTS`.
        source: what it is part of, with its version: another version may have another text.
        content: all of it.
    """

    name: str
    source: str
    content: str

    def token_ids(self, tokenizer: Any, n_tokens: int) -> list[int]:
        """Its first tokens.

        Raises:
            ConfigurationError: it has fewer than `n_tokens`.
        """
        part = self.content[: 16 * n_tokens]
        ids: list[int] = tokenizer(part, add_special_tokens=False, verbose=False).input_ids
        if len(ids) < n_tokens:
            raise ConfigurationError(
                f"the text {self.name!r} ({self.source}) has {len(ids):,} tokens, {n_tokens:,} are needed"
            )
        return ids[:n_tokens]


def get_text(name: str) -> Text:
    """The text called `name`.

    Raises:
        ConfigurationError: there is none of that name, or what it is part of is not installed.
    """
    if name not in TEXTS:
        raise ConfigurationError(f"no text is called {name!r}; there are {', '.join(TEXTS)}")
    return TEXTS[name]()


def topics_token_ids(tokenizer: Any, n_tokens: int) -> list[int]:
    """The first tokens of the text `prose`.

    Raises:
        ConfigurationError: it has fewer than `n_tokens`.
    """
    return get_text("prose").token_ids(tokenizer, n_tokens)


def catalog_messages(data: bytes) -> list[str]:
    """The translated messages of a compiled catalog (`.mo`), in its order, which is that of the originals.

    Raises:
        ConfigurationError: `data` is no such catalog.
    """
    try:
        magic, _, n, _, at = struct.unpack_from("<5I", data)
        if magic != _CATALOG_MAGIC:
            raise ValueError(f"it begins with {magic:#x}")
        entries = [struct.unpack_from("<2I", data, at + 8 * i) for i in range(n)]
        if any(start + length >= len(data) for length, start in entries):  # a zero follows each
            raise ValueError("it ends too early")
        found = [data[start : start + length].decode() for length, start in entries]
    except (struct.error, ValueError) as error:
        raise ConfigurationError(f"this is no message catalog: {error}") from error
    return [form for message in found for form in message.split("\0")]  # of plurals each form


def _prose() -> Text:
    from pydoc_data.topics import topics

    return Text("prose", f"the language reference of Python {platform.python_version()}", "\n".join(topics.values()))


def _code() -> Text:
    try:
        content = "\n".join(inspect.getsource(importlib.import_module(name)) for name in CODE_MODULES)
    except OSError as error:
        raise ConfigurationError(f"this Python comes without the source of its library: {error}") from error
    return Text("code", f"{', '.join(CODE_MODULES)} of Python {platform.python_version()}", content)


def _french() -> Text:
    spec = find_spec("sphinx")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigurationError(
            "the text 'french' is in the package sphinx, which is not installed: pip install --no-deps sphinx==8.2.3"
        )
    path = Path(spec.submodule_search_locations[0], "locale", "fr", "LC_MESSAGES", "sphinx.mo")
    try:
        messages = catalog_messages(path.read_bytes())[1:]  # the first describes the catalog
    except OSError as error:
        raise ConfigurationError(f"the installed package sphinx has no French messages: {error}") from error
    content = "\n".join(message for message in messages if len(message) >= SENTENCE)
    return Text("french", f"the messages of sphinx {version('sphinx')}", content)


TEXTS: dict[str, Callable[[], Text]] = {"prose": _prose, "code": _code, "french": _french}
"""By name."""
