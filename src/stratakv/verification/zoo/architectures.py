"""Which architectures the installed transformers has: read from its own mappings, never from a list of ours."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

Kind = Literal["causal-lm", "encoder-decoder"]

_CAUSAL_MAPPING = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
# Everything in the first mapping is taken; from the others, only what its config calls an encoder-decoder, because
# they also list decoders with an image or audio tower in front, whose text decoder is in the causal mapping already.
_SEQ2SEQ_MAPPING = "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"
_OTHER_SEQ2SEQ_MAPPINGS = (
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
)


@dataclass(frozen=True)
class Architecture:
    """One model class of transformers, with the ``model_type`` of the config it is built from."""

    name: str
    model_type: str
    kind: Kind


def architectures() -> tuple[Architecture, ...]:
    """Every causal language model and encoder-decoder, in the order of transformers' mappings.

    A class that several model types share appears once for each, because their configs may differ.
    """
    found: dict[tuple[str, str], Architecture] = {}
    for model_type, name in _entries(_CAUSAL_MAPPING):
        found.setdefault((name, model_type), Architecture(name, model_type, "causal-lm"))
    for model_type, name in _entries(_SEQ2SEQ_MAPPING):
        kind: Kind = "encoder-decoder" if is_encoder_decoder_type(model_type) else "causal-lm"
        found.setdefault((name, model_type), Architecture(name, model_type, kind))
    for mapping in _OTHER_SEQ2SEQ_MAPPINGS:
        for model_type, name in _entries(mapping):
            if is_encoder_decoder_type(model_type):
                found.setdefault((name, model_type), Architecture(name, model_type, "encoder-decoder"))
    return tuple(found.values())


def config_class(architecture: Architecture) -> type[Any]:
    """The config class of an architecture; KeyError when transformers has none under its model type."""
    found: type[Any] = CONFIG_MAPPING[architecture.model_type]
    return found


def model_class(architecture: Architecture) -> type[Any]:
    """The model class of an architecture; AttributeError when the installed transformers cannot import it."""
    found: type[Any] = getattr(transformers, architecture.name)
    return found


def declared_defaults(config_type: type[Any]) -> dict[str, Any]:
    """What a config class says it takes: field name -> declared default, before ``__post_init__`` derives the rest.

    transformers 5.0 writes ``__init__``, later versions dataclass fields; ``inspect`` reads both where the generated
    ``__init__`` shows its parameters, and the fields are read otherwise.
    """
    fields: Mapping[str, Any] = getattr(config_type, "__dataclass_fields__", {})
    declared: dict[str, Any] = {}
    for name, field in fields.items():
        if not field.init or "ClassVar" in str(field.type):
            continue
        if isinstance(field.default, type(inspect.Parameter.empty)) or repr(field.default).startswith("<dataclasses."):
            continue
        declared[name] = field.default
    for name, parameter in inspect.signature(config_type.__init__).parameters.items():
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and name != "self":
            declared.setdefault(name, None if parameter.default is parameter.empty else parameter.default)
    return declared


def is_encoder_decoder_type(model_type: str) -> bool:
    """Whether the default config of a model type says that it is an encoder-decoder."""
    if model_type not in CONFIG_MAPPING:
        return False
    config_type = CONFIG_MAPPING[model_type]
    declared = getattr(config_type, "is_encoder_decoder", None)
    if isinstance(declared, bool):
        return declared
    return bool(declared_defaults(config_type).get("is_encoder_decoder", False))


def _entries(mapping_name: str) -> Iterator[tuple[str, str]]:
    mapping: Mapping[str, str | tuple[str, ...] | list[str]] = getattr(modeling_auto, mapping_name, {})
    for model_type, names in mapping.items():
        for name in (names,) if isinstance(names, str) else tuple(names):
            if name is not None:
                yield model_type, name
