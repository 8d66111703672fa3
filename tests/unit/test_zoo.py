"""The zoo builds every kind of architecture small, and its harness tells a right cache from a wrong one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from stratakv.errors import StateError, UnsupportedError
from stratakv.verification.zoo import (
    Architecture,
    BuildError,
    Outcome,
    TinyModel,
    architectures,
    build_tiny,
    context_visible,
    dynamic_cache_factory,
    has_kv_cache,
    run,
    survey,
)
from stratakv.verification.zoo.architectures import config_class

# transformers warns about its own deprecations while models are built; they are not what these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore")


def tiny(model_type: str, kind: str = "causal-lm") -> TinyModel:
    return build_tiny(next(a for a in architectures() if a.model_type == model_type and a.kind == kind))


class TestArchitectures:
    def test_come_from_transformers_in_a_fixed_order(self) -> None:
        found = architectures()
        assert found == architectures()
        assert len(found) == len(set(found)) > 200
        assert Architecture("LlamaForCausalLM", "llama", "causal-lm") in found
        assert Architecture("T5ForConditionalGeneration", "t5", "encoder-decoder") in found
        assert Architecture("WhisperForConditionalGeneration", "whisper", "encoder-decoder") in found

    def test_decoders_in_the_seq2seq_mapping_are_not_called_encoder_decoders(self) -> None:
        kinds = {a.model_type: a.kind for a in architectures()}
        assert kinds["voxtral"] == "causal-lm"


class TestBuilding:
    def test_is_deterministic(self) -> None:
        first, second, other = (
            tiny("llama"),
            tiny("llama"),
            build_tiny(Architecture("LlamaForCausalLM", "llama", "causal-lm"), 1),
        )
        weights = [
            dict(t.model.named_parameters())["model.layers.0.self_attn.q_proj.weight"] for t in (first, second, other)
        ]
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])

    def test_keeps_grouped_queries_and_unequal_k_and_v(self) -> None:
        config = tiny("mistral").model.config
        assert config.num_attention_heads > config.num_key_value_heads > 1
        latent = tiny("deepseek_v3").model.config
        assert latent.qk_nope_head_dim + latent.qk_rope_head_dim != latent.v_head_dim

    def test_unknown_architectures_are_refused_with_the_reason(self) -> None:
        with pytest.raises(BuildError, match="NoSuchModel"):
            build_tiny(Architecture("NoSuchModel", "llama", "causal-lm"))

    def test_too_many_parameters_are_refused_before_anything_is_allocated(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("stratakv.verification.zoo.tiny.MOST_PARAMETERS", 10)
        with pytest.raises(BuildError, match="more than 10"):
            tiny("llama")

    def test_inputs_avoid_special_tokens(self) -> None:
        model = tiny("gemma3")
        ids = model.inputs(200, batch=2)["input_ids"]
        assert ids.shape == (2, 200)
        assert not set(ids.flatten().tolist()) & model.special_ids
        assert int(ids.max()) < model.vocab_size

    @pytest.mark.parametrize(
        "model_type",
        [
            "gemma3_text",
            "gemma3n_text",
            "qwen3_next",
            "jamba",
            "gpt_oss",
            "llama4_text",
            "lfm2",
            "zamba",
            "olmo_hybrid",
        ],
    )
    def test_every_kind_of_layer_occurs(self, model_type: str) -> None:
        model = tiny(model_type)
        default = config_class(model.architecture)()
        for name in ("layer_types", "layers_block_type", "mlp_layer_types"):
            assert set(getattr(default, name, None) or []) <= set(getattr(model.model.config, name, None) or [])
        assert set(default.layer_types) <= set(model.model.config.layer_types)

    def test_layers_that_share_kv_occur(self) -> None:
        config = tiny("gemma4_text").model.config
        assert 0 < config.num_kv_shared_layers < config.num_hidden_layers
        assert len(set(config.layer_types[-config.num_kv_shared_layers :])) == 2


@pytest.mark.parametrize(
    ("model_type", "kind"),
    [
        ("llama", "causal-lm"),
        ("gemma3_text", "causal-lm"),
        ("gpt2", "causal-lm"),
        ("bloom", "causal-lm"),
        ("opt", "causal-lm"),
        ("mixtral", "causal-lm"),
        ("deepseek_v3", "causal-lm"),
        ("qwen3_next", "causal-lm"),
        ("gpt_oss", "causal-lm"),
        ("bert", "causal-lm"),
        ("gemma4_text", "causal-lm"),
        ("t5", "encoder-decoder"),
        ("bart", "encoder-decoder"),
        ("whisper", "encoder-decoder"),
    ],
)
def test_transformers_own_cache_passes(model_type: str, kind: str) -> None:
    model = tiny(model_type, kind)
    assert has_kv_cache(model)
    outcome = run(model, dynamic_cache_factory)
    assert outcome.status == "pass", outcome.reason
    assert {feed.name for feed in outcome.feeds} >= {"prefill-then-single", "single", "chunks"}
    assert outcome.max_abs <= outcome.tolerance


@pytest.mark.parametrize("model_type", ["mamba", "rwkv", "openai-gpt", "xlnet"])
def test_models_without_keys_and_values_are_told_apart(model_type: str) -> None:
    assert not has_kv_cache(tiny(model_type))


class LosesOneRow(DynamicCache):  # type: ignore[misc]  # transformers ships no types
    """Zeroes the values of the fourth row from the end in every layer, once there is a past."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if keys.shape[-2] > key_states.shape[-2]:
            values = values.clone()
            values[..., -4, :] = 0
        return keys, values


class ShiftsRows(DynamicCache):  # type: ignore[misc]  # transformers ships no types
    """Returns the keys one position late."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return (keys.roll(1, dims=-2) if keys.shape[-2] > key_states.shape[-2] else keys), values


class MiscountsTokens(DynamicCache):  # type: ignore[misc]  # transformers ships no types
    """Says that it holds one token less than it does: masks and positions go wrong, the rows are right."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(int(super().get_seq_length(layer_idx)) - 1, 0)


class ForgetsTheMask(DynamicCache):  # type: ignore[misc]  # transformers ships no types
    """Tells the mask of a longer past than there is, so that a query sees what comes after it."""

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return int(super().get_query_offset(layer_idx)) + 2


class ReturnsNotANumber(DynamicCache):  # type: ignore[misc]  # transformers ships no types
    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return keys, values * float("nan")


def make(cache_type: type[DynamicCache], model: Any) -> Any:
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        return EncoderDecoderCache(cache_type(config=config), DynamicCache(config=config))
    return cache_type(config=config)


@pytest.mark.parametrize("fault", [LosesOneRow, ShiftsRows, MiscountsTokens, ForgetsTheMask, ReturnsNotANumber])
@pytest.mark.parametrize(
    ("model_type", "kind"), [("llama", "causal-lm"), ("gemma3_text", "causal-lm"), ("t5", "encoder-decoder")]
)
def test_a_wrong_cache_is_caught(model_type: str, kind: str, fault: type[DynamicCache]) -> None:
    outcome = run(tiny(model_type, kind), lambda model: make(fault, model))
    assert outcome.status == "fail"
    assert outcome.reason


def test_a_wrong_cross_attention_cache_is_caught() -> None:
    def cross_fault(model: Any) -> EncoderDecoderCache:
        config = model.config
        cache = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
        cache.cross_attention_cache.update = lambda k, v, *args, **kwargs: (k * 0.5, v)
        return cache

    assert run(tiny("t5", "encoder-decoder"), cross_fault).status == "fail"


def test_a_model_whose_context_does_not_matter_proves_nothing() -> None:
    model = tiny("llama")
    assert context_visible(model) > 100
    with torch.no_grad():
        for layer in model.model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    outcome = run(model, dynamic_cache_factory)
    assert outcome.status == "fail"
    assert "hardly depend" in outcome.reason


class TestRefusals:
    @pytest.mark.parametrize("error", [UnsupportedError, StateError])
    def test_of_the_factory_are_refusals_with_the_reason(self, error: type[Exception]) -> None:
        def refuse(model: Any) -> Any:
            raise error("no MLA here")

        outcome = run(tiny("llama"), refuse)
        assert outcome.status == "refused"
        assert "no MLA here" in outcome.reason

    def test_of_one_feed_do_not_hide_that_another_was_wrong(self) -> None:
        made: list[Any] = []

        def wrong_then_refusing(model: Any) -> Any:
            made.append(model)
            if len(made) > 1:
                raise StateError("no more")
            return make(ShiftsRows, model)

        outcome = run(tiny("llama"), wrong_then_refusing)
        assert outcome.status == "fail"
        assert outcome.failed_feeds == {"prefill-then-single"}

    def test_of_attend_are_refusals_too(self) -> None:
        def attend(model: Any) -> None:
            raise UnsupportedError("not this attention")

        assert run(tiny("llama"), dynamic_cache_factory, attend=attend).status == "refused"

    def test_other_errors_are_failures(self) -> None:
        def broken(model: Any) -> Any:
            raise RuntimeError("out of pages")

        outcome = run(tiny("llama"), broken)
        assert (outcome.status, "out of pages" in outcome.reason) == ("fail", True)

    def test_attend_changes_what_the_cached_runs_see(self) -> None:
        def spoil(model: Any) -> None:
            with torch.no_grad():
                model.model.layers[0].self_attn.o_proj.weight.mul_(2)

        assert run(tiny("llama"), dynamic_cache_factory, attend=spoil).status == "fail"


def test_a_survey_gives_each_column_a_model_of_its_own_and_never_stops() -> None:
    def spoil(model: Any) -> Any:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        raise RuntimeError("spoilt")

    seen: list[str] = []
    rows = survey(
        {"spoilt": spoil, "dynamic": dynamic_cache_factory}, ["llama", "mamba"], lambda row: seen.append(row.name)
    )
    assert seen == [row.name for row in rows] == ["LlamaForCausalLM", "MambaForCausalLM"]
    llama, mamba = rows
    assert {column: outcome.status for column, outcome in llama.results.items()} == {
        "spoilt": "fail",
        "dynamic": "pass",
    }
    assert (mamba.has_cache, mamba.note, mamba.results) == (False, "no KV cache", {})


def test_outcomes_are_values() -> None:
    assert Outcome("pass", max_abs=0.0, tolerance=1.0) == Outcome("pass", max_abs=0.0, tolerance=1.0)
