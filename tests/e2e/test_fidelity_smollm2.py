"""What few bits cost on the real model, also where one channel of the keys is far larger than the others."""

from __future__ import annotations

import pytest
import torch

import stratakv as sk
from stratakv.bench.texts import get_text
from stratakv.models import load

FACTOR = 50


@pytest.mark.usefixtures("using_smollm2_cache")
def test_a_heavy_channel_of_the_keys_costs_int4_nothing() -> None:
    loaded = load("smollm2")
    model = loaded.model.float()
    sk.attach(model)
    ids = torch.tensor([get_text("prose").token_ids(loaded.tokenizer, 340)])

    usual = sk.fidelity(model, ids, format="int4")
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
        for layer in model.model.layers:
            attention, dim = layer.self_attn, layer.self_attn.head_dim
            for channel in (5, 5 + dim // 2):  # which RoPE turns into each other
                attention.k_proj.weight.view(-1, dim, model.config.hidden_size)[:, channel] *= FACTOR
                attention.q_proj.weight.view(-1, dim, model.config.hidden_size)[:, channel] /= FACTOR
        after = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(after, before, rtol=0, atol=1e-3 * float(before.abs().max()))

    heavy = sk.fidelity(model, ids, format="int4")
    assert 0 < usual.kl <= 0.012
    assert heavy.kl <= 2 * usual.kl
