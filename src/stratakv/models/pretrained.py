"""Calls into transformers: silent, offline, without pickle or foreign code, and refused where a weight is absent."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stratakv.errors import FormatError, StrataKVError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def read_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Return the causal model in `folder`, on the CPU, in eval mode.

    Raises FormatError where transformers cannot read it or a weight is absent.
    """
    from transformers import AutoModelForCausalLM

    with library_calls(folder):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    refuse_absent_weights(folder, info)
    return model.eval()


def read_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer in `folder`. Raises FormatError where transformers cannot read it."""
    from transformers import AutoTokenizer

    with library_calls(folder):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def refuse_absent_weights(source: Path, info: Mapping[str, Any]) -> None:
    """Raise FormatError where transformers reports weights that it did not find.

    It fills those at random and only warns, so the model would run and be wrong.
    """
    for problem in ("missing_keys", "mismatched_keys", "error_msgs"):
        found = sorted(map(str, info.get(problem) or ()))
        if found:
            names = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
            raise FormatError(f"{source} is not whole: {len(found)} {problem.replace('_', ' ')} ({names})")


@contextmanager
def library_calls(source: Path) -> Iterator[None]:
    """Turn what transformers and its loaders raise into FormatError, and keep them silent meanwhile.

    Verbosity and warning filters are the process's: other threads share them while the block runs.
    """
    with quiet():
        try:
            yield
        except (StrataKVError, MemoryError):
            raise
        except Exception as error:  # a damaged file can raise nearly anything in a parser
            reason = str(error).strip().split("\n", maxsplit=1)[0]
            said = f"{type(error).__name__}: {reason}"
            if "ignore_mismatched_sizes" in reason:  # transformers' words for it speak of a report that nobody sees
                said = "its weights have other shapes than its configuration says"
            raise FormatError(f"{source} cannot be loaded as a model: {said}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' log, bars and warnings; as with `library_calls`, for the whole process."""
    from transformers.utils import logging as library_logging

    verbosity = library_logging.get_verbosity()
    had_bars = library_logging.is_progress_bar_enabled()
    library_logging.set_verbosity(logging.CRITICAL)
    library_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        library_logging.set_verbosity(verbosity)
        if had_bars:
            library_logging.enable_progress_bar()
