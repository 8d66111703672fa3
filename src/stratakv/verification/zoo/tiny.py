"""A tiny random model of any architecture of transformers, with inputs for it."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from stratakv.errors import StrataKVError
from stratakv.verification.zoo.adjustments import ADJUSTMENTS, NO_ADJUSTMENT, Adjustment
from stratakv.verification.zoo.architectures import Architecture, config_class, model_class
from stratakv.verification.zoo.shrink import tiny_config
from stratakv.verification.zoo.sizes import HIDDEN, VOCABULARY
from stratakv.verification.zoo.weights import redraw

MOST_PARAMETERS = 20_000_000
ENCODER_TOKENS = 11


class BuildError(StrataKVError):
    """No tiny model of an architecture could be made; says why."""


@dataclass(frozen=True)
class TinyModel:
    """A tiny model in evaluation mode, float32, on the CPU, and what is needed to call it.

    ``max_positions``: positions it can take; ``whole_ids``: each forward
    takes all tokens so far and leaves out the cached ones itself; ``needs_positions``:
    it does not count positions right from a cache; ``special_ids``: ids that ``inputs`` never draws.
    """

    architecture: Architecture
    model: PreTrainedModel
    vocab_size: int
    max_positions: int
    n_parameters: int
    whole_ids: bool = False
    needs_positions: bool = False
    special_ids: frozenset[int] = field(default_factory=frozenset)

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the forward takes ``decoder_input_ids`` beside the encoder's side."""
        return bool(getattr(self.model.config, "is_encoder_decoder", False))

    @property
    def token_name(self) -> str:
        """The argument of the forward that takes the tokens which the cache is about."""
        return "decoder_input_ids" if self.is_encoder_decoder else "input_ids"

    @property
    def mask_name(self) -> str:
        """The argument of the forward that masks the tokens which the cache is about."""
        return "decoder_attention_mask" if self.is_encoder_decoder else "attention_mask"

    def inputs(self, n_tokens: int, batch: int = 1, seed: int = 0) -> dict[str, Any]:
        """Random token ids [batch, n_tokens] under ``token_name``, and the encoder's output for an encoder-decoder."""
        generator = torch.Generator().manual_seed(seed)
        given: dict[str, Any] = {self.token_name: self.draw_ids(n_tokens, batch, generator)}
        if self.is_encoder_decoder:
            given["encoder_outputs"] = encoder_states(self._encoded(batch, generator))
        return given

    def draw_ids(self, n_tokens: int, batch: int, generator: torch.Generator) -> Tensor:
        """Token ids [batch, n_tokens] that mean nothing special to the model; no token twice in a row if it can be.

        Twice the same token gives the same value in a first layer, hence equal scores in models that attend to the
        top k (Doge), and which of the equal ones they take is arbitrary.
        """
        plain = torch.tensor([token for token in range(1, self.vocab_size) if token not in self.special_ids])
        if n_tokens > len(plain):
            return plain[torch.randint(len(plain), (batch, n_tokens), generator=generator)]
        return torch.stack([plain[torch.randperm(len(plain), generator=generator)[:n_tokens]] for _ in range(batch)])

    def _encoded(self, batch: int, generator: torch.Generator) -> Tensor:
        """[batch, tokens, width]: the encoder's own output for text, random states for sound and pictures.

        A cache holds what the decoder makes of these states; how they came about is nothing to it.
        """
        ids = self.draw_ids(ENCODER_TOKENS, batch, generator)
        if getattr(self.model, "main_input_name", "input_ids") == "input_ids":
            with torch.no_grad(), contextlib.suppress(Exception):
                encoded = self.model.get_encoder()(input_ids=ids)
                return encoded[0] if not isinstance(encoded, Tensor) else encoded
        return torch.randn((batch, ENCODER_TOKENS, self._encoder_width()), generator=generator)

    def _encoder_width(self) -> int:
        config = self.model.config
        for part in (getattr(config, "encoder", None), getattr(config, "encoder_config", None), config):
            for name in ("hidden_size", "d_model"):
                value = getattr(part, name, None)
                if isinstance(value, int):
                    return value
        return HIDDEN


def encoder_states(states: Tensor) -> Any:
    """Encoder output around ``states`` [batch, tokens, width], with the further fields that some decoders read."""
    output = BaseModelOutput(last_hidden_state=states)
    for name in ("attention_mask", "router_logits", "router_probs"):
        setattr(output, name, None)
    return output


def build_tiny(architecture: Architecture, seed: int = 0) -> TinyModel:
    """Build a tiny model of ``architecture``, with every kind of layer that its default config has.

    Parameters are counted on the meta device first. Raises BuildError, with the reason, where transformers cannot
    make the config or the model, or where it would have more than ``MOST_PARAMETERS`` parameters.
    """
    adjustment = ADJUSTMENTS.get(architecture.model_type, NO_ADJUSTMENT)
    with quiet():
        config, build = _recipe(architecture, adjustment)
        n_parameters = _count(build)
        if n_parameters > MOST_PARAMETERS:
            raise BuildError(f"{n_parameters:,} parameters, more than {MOST_PARAMETERS:,}: the size-down failed")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                model = build().float().eval()
            except Exception as error:
                raise BuildError(f"building failed: {one_line(error)}") from error
        redraw(model, seed)
    return TinyModel(
        architecture=architecture,
        model=model,
        vocab_size=_vocab_size(model),
        max_positions=int(getattr(text_config(config), "max_position_embeddings", 0) or 0),
        n_parameters=n_parameters,
        whole_ids=adjustment.whole_ids,
        needs_positions=adjustment.needs_positions,
        special_ids=frozenset(_special_ids(config)),
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what transformers warns about default and tiny configs; it says nothing about a cache."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


def one_line(error: BaseException) -> str:
    """Type and message of an error, on one line and cut short."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"


def text_config(config: Any) -> Any:
    """The decoder's config within ``config``."""
    return config.get_text_config(decoder=True)


def _recipe(architecture: Architecture, adjustment: Adjustment) -> tuple[Any, Callable[[], Any]]:
    try:
        model_type = model_class(architecture)
        default = _part_for(model_type, config_class(architecture)(**adjustment.start))
        config = tiny_config(default, adjustment.values)
        if architecture.kind == "causal-lm" and getattr(config, "is_decoder", None) is False:
            config.is_decoder = True  # BERT-like encoders are causal, and cache, only as decoders
    except Exception as error:
        raise BuildError(f"no tiny config: {one_line(error)}") from error
    return config, lambda: model_type(config)


def _part_for(model_type: type[Any], config: Any) -> Any:
    """The part of ``config`` that the model class takes: as AutoModel does, a text model gets the text config."""
    wanted = getattr(model_type, "config_class", None)
    if wanted is None or isinstance(config, wanted):
        return config
    for value in vars(config).values():
        if isinstance(value, wanted):
            return value
    return config


def _count(build: Callable[[], Any]) -> int:
    try:
        with torch.device("meta"):
            model = build()
    except Exception as error:
        raise BuildError(f"building on the meta device failed: {one_line(error)}") from error
    return sum(parameter.numel() for parameter in model.parameters())


def _vocab_size(model: Any) -> int:
    config = text_config(model.config)
    size = getattr(config, "vocab_size", None)
    embedding = None
    with contextlib.suppress(Exception):
        embedding = model.get_input_embeddings()
    rows = getattr(embedding, "num_embeddings", None)
    sizes = [value for value in (size, rows) if isinstance(value, int) and value > 0]
    return min([*sizes, VOCABULARY])


def _special_ids(config: Any) -> Iterator[int]:
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _special_ids(value)
        elif name.endswith(("token_id", "token_index", "token_ids")):
            for token in value if isinstance(value, list | tuple) else (value,):
                if isinstance(token, int):
                    yield token


def forward_parameters(model: Any) -> frozenset[str]:
    """Names of the arguments that the model's forward takes by name."""
    return frozenset(inspect.signature(model.forward).parameters)
