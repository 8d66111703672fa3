"""What a cache costs is measured: nothing where it is exact, and more with fewer bits."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import stratakv as sk
from stratakv.errors import ConfigurationError, UnsupportedError
from stratakv.policies import Window
from stratakv.testing.running import cache_argument, random_ids
from stratakv.testing.tiny import tiny_gemma3, tiny_llama, tiny_t5
from stratakv.testing.ways import WAYS, model_for
from stratakv.verification import Scorer

every_way = pytest.mark.parametrize("way", WAYS)


@every_way
@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma3])
def test_an_exact_cache_costs_nothing(way: str, make: Any) -> None:
    report = sk.fidelity(model_for(way, make), random_ids(2, 40), prefilled=10)
    assert (report.n_sequences, report.n_tokens, report.n_scored) == (2, 40, 60)
    assert report.kl <= 1e-8
    assert report.top1 == 1
    assert abs(report.perplexity_change) <= 1e-5
    assert max(max(layer) for layer in report.output_errors) <= 1e-4
    json.dumps(report.to_dict(), allow_nan=False)


@every_way
def test_fewer_bits_cost_more(way: str) -> None:
    model, ids = model_for(way, tiny_llama), random_ids(2, 200)
    found = [sk.fidelity(model, ids, prefilled=130, format=name) for name in ("bf16", "int8", "int4", "int2")]
    costs = [report.kl for report in found]
    assert costs == sorted(costs)
    assert costs[0] > 0
    held = [report.marginal_bytes_per_token for report in found]
    assert held == sorted(held, reverse=True)
    for report in found:
        assert len(report.output_errors) == model.config.num_hidden_layers
        assert {len(layer) for layer in report.output_errors} == {model.config.num_attention_heads}
    errors = torch.tensor([report.output_errors for report in found]).mean(dim=(1, 2))
    assert bool((errors.diff() > 0).all())


def test_a_policy_that_hides_tokens_shows() -> None:
    model, ids = model_for("attached", tiny_llama), random_ids(1, 60)
    narrow, wide = (sk.fidelity(model, ids, prefilled=20, policy=Window(size)) for size in (4, 60))
    assert wide.kl <= 1e-8
    assert narrow.kl > 1e-3
    assert narrow.policy == "window"


def test_the_figures_are_those_of_a_plain_computation() -> None:
    model, ids = tiny_llama(), random_ids(1, 30)
    cache = sk.KVCache.for_model(model, format="int8")
    exact = model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
    kl, losses = [], []
    with torch.no_grad():
        for start, stop in [(0, 10), *((i, i + 1) for i in range(10, 29))]:
            logits = model(input_ids=ids[:, start:stop], **cache_argument(model, cache)).logits
            found = logits[0, -1].double().log_softmax(-1)
            kl.append(float((exact[0, stop - 1].exp() * (exact[0, stop - 1] - found)).sum()))
            losses.append(-float(found[ids[0, stop]]))
    report = sk.fidelity(model, ids, prefilled=10, format="int8")
    assert report.kl == pytest.approx(sum(kl) / len(kl), rel=1e-3)
    assert report.perplexity == pytest.approx(float(torch.tensor(losses).double().mean().exp()), rel=1e-6)


def test_scores_are_those_of_each_prediction_however_they_came() -> None:
    generator = torch.Generator().manual_seed(0)
    found, exact = torch.randn(2, 50, 8, generator=generator)
    next_ids = torch.randint(8, (50,), generator=generator)
    once, by_part = Scorer(), Scorer()
    once.add(found, exact, next_ids)
    for part in (slice(0, 1), slice(1, 30), slice(30, 50)):
        by_part.add(found[part], exact[part], next_ids[part])
    scores = once.scores()
    assert scores == by_part.scores()
    log_found, log_exact = found.double().log_softmax(-1), exact.double().log_softmax(-1)
    kl = [float((b.exp() * (b - a)).sum()) for a, b in zip(log_found, log_exact, strict=True)]
    assert scores.n_scored == 50
    assert scores.kl == pytest.approx(sum(kl) / 50)
    assert sorted(kl)[-2] <= scores.kl_p99 <= max(kl)
    assert scores.top1 == sum(int(a.argmax()) == int(b.argmax()) for a, b in zip(found, exact, strict=True)) / 50
    for perplexity, log in ((scores.perplexity, log_found), (scores.exact_perplexity, log_exact)):
        assert perplexity == pytest.approx(float((-log[torch.arange(50), next_ids].mean()).exp()))


def test_predictions_that_do_not_fit_together_are_refused() -> None:
    scorer, next_ids = Scorer(), torch.zeros(2, dtype=torch.int64)
    for found, exact, ids in (
        (torch.ones(2, 4), torch.ones(2, 5), next_ids),
        (torch.ones(2, 4), torch.ones(2, 4), next_ids[:1]),
        (torch.ones(2, 1, 4), torch.ones(2, 1, 4), next_ids),
    ):
        with pytest.raises(ConfigurationError):
            scorer.add(found, exact, ids)
    with pytest.raises(ConfigurationError):
        scorer.scores()


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ([1, 2, 3], {"prefilled": 3}),
        ([1, 2, 3], {"prefilled": 0}),
        ([1, 2, 3], {"prefilled": 1.5}),
        ([], {}),
        ("text", {}),
        ([[1, 2], [3]], {"prefilled": 1}),
    ],
)
def test_what_cannot_be_scored_is_refused(given: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        sk.fidelity(tiny_llama(), given, **options)


def test_an_encoder_decoder_is_refused() -> None:
    with pytest.raises(UnsupportedError):
        sk.fidelity(tiny_t5(), random_ids(1, 20), prefilled=5)
