"""Models that are not what their class and config say: the native runner refuses them, with the place."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    AttentionMaskInterface,
    create_sliding_window_causal_mask,
    eager_mask,
    sdpa_mask,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import AttentionInterface
from transformers.models.llama import modeling_llama

from stratakv.errors import ConfigurationError, UnsupportedError
from stratakv.extension import is_built
from stratakv.integrations.transformers import attach
from stratakv.models.native import NativeRunner
from stratakv.testing.tiny import VOCABULARY, tiny_gemma2, tiny_gemma3, tiny_llama, tiny_mistral, tiny_qwen3

pytestmark = pytest.mark.skipif(not is_built(), reason="installed without the extension, on purpose or for want of g++")

TOKENS = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(5))


class Adapter(nn.Module):
    """As adapters are: the base's weight in its place, and something added to its product."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.added = nn.Linear(base.in_features, base.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = self.base(x) + self.added(x)
        return product


class ScaledLinear(nn.Linear):
    """As layers of 8 bits are: a Linear by its class, with a scale of its own."""


def with_adapter(model: Any) -> None:
    attention = model.model.layers[1].self_attn
    attention.q_proj = Adapter(attention.q_proj)


def with_scaled_linear(model: Any) -> None:
    down = model.model.layers[0].mlp.down_proj
    model.model.layers[0].mlp.down_proj = ScaledLinear(down.in_features, down.out_features, bias=False)


def with_packed_weight(model: Any) -> None:
    packed = torch.zeros(16, 1, dtype=torch.uint8)
    model.model.layers[0].mlp.down_proj.weight = nn.Parameter(packed, requires_grad=False)


def with_quantised_weight(model: Any) -> None:
    linear = model.model.layers[0].mlp.down_proj
    linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)


def pruned(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    mlp.gate_proj.weight.data, mlp.up_proj.weight.data = mlp.gate_proj.weight[:40], mlp.up_proj.weight[:40]
    mlp.down_proj.weight.data = mlp.down_proj.weight[:, :40].contiguous()


def with_short_head(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.data[:50])


def with_head_bias(model: Any) -> None:
    model.lm_head.bias = nn.Parameter(torch.ones(VOCABULARY))


def with_hook(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda module, given, found: 2 * found)


def with_another_forward(model: Any) -> None:
    model.model.layers[0].mlp.forward = lambda x: x


def with_another_scaling(model: Any) -> None:
    model.model.layers[0].self_attn.scaling = 1.0


def with_another_epsilon(model: Any) -> None:
    model.model.layers[0].input_layernorm.variance_epsilon = 0.5


def with_fewer_layers(model: Any) -> None:
    del model.model.layers[1]


def with_another_config(model: Any) -> None:
    model.config.num_attention_heads = 2


class Tripling(Tensor):
    """A tensor that computes in its own way, as quantised ones do."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is nn.functional.linear:
            return 3 * function(args[0], args[1].as_subclass(Tensor))
        return super().__torch_function__(function, types, args, kwargs or {})


def with_another_tensor(model: Any) -> None:
    linear = model.model.layers[0].mlp.down_proj
    linear.weight = nn.Parameter(linear.weight.as_subclass(Tripling), requires_grad=False)


def with_sparse_weight(model: Any) -> None:
    linear = model.model.layers[0].mlp.down_proj
    linear.weight = nn.Parameter(linear.weight.to_sparse(), requires_grad=False)


def with_another_attention(model: Any) -> None:
    AttentionInterface.register("doubled", lambda *_, **__: 1 / 0)
    model.config._attn_implementation = "doubled"


def with_a_wrapped_hook(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    mlp.register_forward_hook(functools.wraps(type(mlp).forward)(lambda module, given, found: 2 * found))


def with_a_compiled_call(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    mlp._compiled_call_impl = lambda x: 2 * type(mlp).forward(mlp, x)


def with_another_config_inside(model: Any) -> None:
    model.model.config = copy.deepcopy(model.config)
    model.model.config.num_hidden_layers = 1


def with_another_attention_in_one_layer(model: Any) -> None:
    AttentionInterface.register("doubled", lambda *_, **__: 1 / 0)
    attention = model.model.layers[0].self_attn
    attention.config = copy.deepcopy(model.config)
    attention.config._attn_implementation = "doubled"


def in_both_directions(model: Any) -> None:
    model.config.is_causal = False


def without_memory(model: Any) -> None:
    model.to("meta")


CHANGES: list[Callable[[Any], None]] = [
    with_adapter,
    with_scaled_linear,
    with_packed_weight,
    with_quantised_weight,
    pruned,
    with_short_head,
    with_head_bias,
    with_hook,
    with_another_forward,
    with_another_scaling,
    with_another_epsilon,
    with_fewer_layers,
    with_another_config,
    with_another_tensor,
    with_sparse_weight,
    with_another_attention,
    with_a_wrapped_hook,
    with_a_compiled_call,
    with_another_config_inside,
    with_another_attention_in_one_layer,
    in_both_directions,
    without_memory,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_model_is_refused(change: Callable[[Any], None]) -> None:
    model = tiny_llama(tie_word_embeddings=False)
    change(model)
    with pytest.raises(UnsupportedError):
        NativeRunner(model)


def test_a_class_of_the_same_name_is_refused() -> None:
    other = type("LlamaForCausalLM", (LlamaForCausalLM,), {})
    with pytest.raises(UnsupportedError, match="own LlamaForCausalLM"):
        NativeRunner(other(tiny_llama().config))


def test_what_does_not_change_the_model_is_served() -> None:
    model = tiny_qwen3()
    model(TOKENS, output_hidden_states=True, output_attentions=True)  # for which newer versions set hooks of their own
    model.train()
    model.gradient_checkpointing_enable()
    NativeRunner(model)
    model.resize_token_embeddings(140)
    model.config.pad_token_id = 2
    model.config.attention_dropout = 0.1
    attach(model)
    NativeRunner(model.eval())


def test_a_class_that_was_patched_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", lambda module, x: x)
    with pytest.raises(UnsupportedError, match="forward of LlamaMLP"):
        NativeRunner(model)


def doubled(function: Callable[..., Any]) -> Callable[..., Any]:
    """As a package would have it whose name begins like torch's, and which says that it is what it wraps."""
    source = "from functools import wraps\ndef double(f):\n    return wraps(f)(lambda *a, **k: 2 * f(*a, **k))"
    names: dict[str, Any] = {"__name__": "torch_tricks"}
    exec(source, names)
    return cast("Callable[..., Any]", names["double"](function))


@pytest.mark.parametrize("method", ["forward", "__call__", "_call_impl"])
def test_a_class_that_was_patched_by_a_wrapper_is_refused(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    mlp = type(model.model.layers[0].mlp)
    monkeypatch.setattr(mlp, method, doubled(getattr(mlp, method)))
    with pytest.raises(UnsupportedError, match=f"{method} of LlamaMLP is one of torch_tricks"):
        NativeRunner(model)


def test_hooks_on_all_modules_are_refused() -> None:
    model = tiny_llama()
    hook = nn.modules.module.register_module_forward_hook(lambda module, given, found: None)
    try:
        with pytest.raises(UnsupportedError, match="hooks for all modules"):
            NativeRunner(model)
    finally:
        hook.remove()
    NativeRunner(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_functions_replaced_within_torch_show_in_the_logits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama().train()
    monkeypatch.setattr(nn.functional, "silu", torch.zeros_like)
    with pytest.raises(UnsupportedError, match="computes something else"):
        NativeRunner(model, dtype=dtype)
    monkeypatch.undo()
    NativeRunner(model, dtype=dtype)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("name", ["create_causal_mask", "apply_rotary_pos_emb"])
@pytest.mark.parametrize(
    "replace", [doubled, lambda _: create_sliding_window_causal_mask, lambda own: functools.partial(own, beta=1)]
)
def test_functions_replaced_within_transformers_are_refused(
    name: str, replace: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama()
    monkeypatch.setattr(modeling_llama, name, replace(getattr(modeling_llama, name)))
    with pytest.raises(UnsupportedError, match=f"{name} in transformers.models.llama.modeling_llama"):
        NativeRunner(model)


def test_all_modules_patched_at_once_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    monkeypatch.setattr(nn.Module, "_call_impl", doubled(nn.Module._call_impl))
    with pytest.raises(UnsupportedError, match=r"_call_impl of \w+ is one of torch_tricks"):
        NativeRunner(model)


def as_kernels_has_it(function: Callable[..., Any]) -> nn.Module:
    """What the package `kernels` makes of a function of a model: a module that calls it."""

    def _create_func_module(func: Callable[..., Any]) -> type[nn.Module]:
        class Func(nn.Module):
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                return func(*args, **kwargs)

        Func.__module__ = "kernels.layer.layer"
        return Func

    return _create_func_module(function)()


def test_functions_behind_a_decorator_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    model, own = tiny_llama(), modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", as_kernels_has_it(own))
    NativeRunner(model)
    for other in (doubled(own), modeling_llama.rotate_half, lambda *given: own(*given)):  # noqa: PLW0108  (written elsewhere)
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", as_kernels_has_it(other))
        with pytest.raises(UnsupportedError, match="apply_rotary_pos_emb in transformers"):
            NativeRunner(model)


def test_another_method_of_a_class_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_gemma3(window=24)
    norm = type(model.model.norm)
    monkeypatch.setattr(norm, "_norm", doubled(norm._norm))
    with pytest.raises(UnsupportedError, match="_norm of Gemma3RMSNorm is one of torch_tricks"):
        NativeRunner(model)


@pytest.mark.parametrize("name", ["sdpa", "mine"])
@pytest.mark.parametrize("mask", [None, doubled(sdpa_mask), eager_mask])
def test_masks_of_others_are_refused(name: str, mask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_mistral(window=24)  # a window that a few tokens do not show
    monkeypatch.setitem(AttentionInterface._global_mapping, name, sdpa_attention_forward)
    if mask is None:
        monkeypatch.delitem(AttentionMaskInterface._global_mapping, name, raising=False)
    else:
        monkeypatch.setitem(AttentionMaskInterface._global_mapping, name, mask)
    model.set_attn_implementation(name)
    with pytest.raises(UnsupportedError, match=f"attends by '{name}'"):
        NativeRunner(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_softcap_of_logits_that_the_model_ignores_is_none(dtype: torch.dtype) -> None:
    model = tiny_llama()
    model.config.final_logit_softcapping = 0.1
    runner = NativeRunner(model, dtype=dtype)
    expected = model(TOKENS).logits
    found = runner.forward(runner.new_batch(), TOKENS, every=True)
    assert (found - expected).square().mean() <= 0.01 * expected.square().mean()


def test_rotations_that_are_not_known_to_stay_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROPE_INIT_FUNCTIONS, "my_dynamic", ROPE_INIT_FUNCTIONS["dynamic"])
    model = tiny_llama(rope_parameters={"rope_type": "my_dynamic", "rope_theta": 10000.0, "factor": 2.0})
    with pytest.raises(UnsupportedError, match="my_dynamic"):
        NativeRunner(model)


def test_logits_may_be_written_into() -> None:
    runner = NativeRunner(tiny_llama())
    logits = runner.forward(runner.new_batch(), TOKENS)
    logits[..., 0] = -torch.inf


def test_negated_tokens_are_read_as_what_they_are() -> None:
    runner = NativeRunner(tiny_llama())
    expected = runner.forward(runner.new_batch(), TOKENS)
    negated = torch._neg_view((-TOKENS).to(torch.int32))
    assert torch.equal(runner.forward(runner.new_batch(), negated), expected)


def test_what_is_done_to_the_model_later_does_not_reach_the_runner() -> None:
    model = tiny_llama()
    expected = model(TOKENS).logits
    runner = NativeRunner(model, dtype=torch.float32)
    model.to(torch.bfloat16).to("meta")
    torch.testing.assert_close(runner.forward(runner.new_batch(), TOKENS, every=True), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("make", [tiny_gemma2, tiny_gemma3], ids=lambda make: make.__name__)
def test_softcaps_and_scales_are_those_that_the_model_uses(make: Callable[..., Any]) -> None:
    model = make(attn_logit_softcapping=1.0, hidden_size=96).to(torch.bfloat16).float()
    runner = NativeRunner(model, dtype=torch.float32)
    found = runner.forward(runner.new_batch(), TOKENS, every=True)
    torch.testing.assert_close(found, model(TOKENS).logits, rtol=2e-5, atol=2e-5)


def test_weights_too_large_for_half_precision_are_refused() -> None:
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e5
    with pytest.raises(ConfigurationError, match="float16"):
        NativeRunner(model, dtype=torch.float16)
    NativeRunner(model, dtype=torch.bfloat16)


def test_the_config_is_left_alone() -> None:
    model = tiny_gemma3()
    before = copy.deepcopy(model.config.to_dict())
    NativeRunner(model)
    assert model.config.to_dict() == before
