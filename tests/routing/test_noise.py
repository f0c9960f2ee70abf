"""Noise in routers: what it is on average, that it acts in training only, and that it can be checkpointed."""

import math

import pytest
import torch
from torch.nn import functional as F

import molora
from molora.errors import ConfigError
from molora.routing.features import features
from molora.routing.router import Router
from molora.routing.types import Context
from tests.tiny import tiny_inputs, tiny_llama

TRAINING = Context(training=True)


@pytest.mark.parametrize("kind", ["jitter", "gaussian", "dropout"])
def test_noise_has_the_moments_it_says_and_rests_in_evaluation(kind):
    noise, x = features.build({"name": "noise", "kind": kind, "size": 0.25}, 4), torch.full((50, 400, 4), 2.0)
    assert noise(x, Context()) is x and noise.dim == 4
    y = noise(x, TRAINING)
    assert y.mean() == pytest.approx(2.0, abs=0.02)
    deviation = {"jitter": 2 * 0.25 / math.sqrt(3), "gaussian": 0.25, "dropout": 2 * math.sqrt(0.25 / 0.75)}[kind]
    assert y.std() == pytest.approx(deviation, rel=0.02)
    if kind == "jitter":
        assert y.min() >= 1.5 and y.max() <= 2.5
    if kind == "dropout":
        assert y.unique().tolist() == pytest.approx([0.0, 2 / 0.75])


def test_no_noise_of_size_zero():
    x = torch.randn(2, 3, 4)
    assert features.build({"name": "noise", "size": 0.0}, 4)(x, TRAINING) is x


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "pink"}, "noise kind 'pink' is unknown; known: jitter, gaussian, dropout"),
        ({"size": 1.0}, "noise of kind 'jitter' needs 0 <= size < 1, got 1.0"),
        ({"kind": "gaussian", "size": -1.0}, "noise of kind 'gaussian' needs 0 <= size, got -1.0"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        features.build({"name": "noise", **options}, 4)


def test_the_experts_see_no_noise_and_a_recompute_sees_the_same():
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = molora.wrap(tiny_llama(), {}, feature={"name": "noise", "size": 0.5}, experts={"num": 3, "rank": 2})
        for name, parameter in model.named_parameters():
            if "molora_" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        inputs = tiny_inputs(model)
        torch.manual_seed(1)
        model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-7, rtol=1e-5)


def test_noisy_scores_are_the_clean_ones_plus_noise_of_the_learned_size():
    router = Router(4, 3, scorer={"name": "noisy", "eps": 0.5})
    scorer = router.scorer
    torch.nn.init.normal_(scorer.size)
    x = torch.randn(1, 2, 4).expand(4000, -1, -1)
    clean = F.linear(x, scorer.clean.weight)
    assert torch.equal(router(x, Context()).scores, clean)  # evaluation
    routing = router(x, TRAINING)
    torch.testing.assert_close(routing.notes["clean"], clean)
    expected = torch.log1p(torch.exp(F.linear(x, scorer.size))) + 0.5
    torch.testing.assert_close(routing.notes["noise"], expected, atol=1e-5, rtol=1e-5)
    drawn = ((routing.scores - clean) / expected).detach()
    assert drawn.mean() == pytest.approx(0, abs=0.02) and drawn.std() == pytest.approx(1, abs=0.02)
    routing.gates[..., 0].sum().backward()
    assert scorer.size.grad.abs().max() > 0 and scorer.clean.weight.grad.abs().max() > 0


def test_noisy_refuses_scorers_that_it_cannot_call():
    with pytest.raises(ConfigError, match="cannot add its noise to the scores of 'table'"):
        Router(4, 3, scorer={"name": "noisy", "scorer": {"name": "table", "num_tasks": 2}})
