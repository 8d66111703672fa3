"""A real hybrid from packages that hold it in parts. Its conversion takes a minute, so the user's cache keeps it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import pytest

from stratakv.models import KNOWN_MODELS, LoadedModel, load


@pytest.fixture(scope="session")
def gemma() -> LoadedModel:
    for name in KNOWN_MODELS["gemma3-270m"].distributions:
        try:
            version(name)
        except PackageNotFoundError:
            pytest.skip(f"the test-only package {name} is not installed")
    return load("gemma3-270m")


def test_parts_become_the_hybrid_model(gemma: LoadedModel) -> None:
    config = gemma.model.config
    assert config.layer_types.count("sliding_attention") == 15
    assert (config.num_hidden_layers, config.sliding_window) == (18, 512)
    assert gemma.model.lm_head.weight is gemma.model.model.embed_tokens.weight
    assert gemma.path.name.endswith(".part00")


def test_continues_a_text_sensibly(gemma: LoadedModel) -> None:
    inputs = gemma.tokenizer("The capital of France is", return_tensors="pt")
    assert inputs["input_ids"][0, 0] == gemma.tokenizer.bos_token_id
    output = gemma.model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
    text = gemma.tokenizer.decode(output, skip_special_tokens=True)
    assert text.startswith("The capital of France is the capital of the country"), text


def test_has_no_chat_template(gemma: LoadedModel) -> None:
    assert gemma.tokenizer.chat_template is None
