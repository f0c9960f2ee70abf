"""Link functions against plain arithmetic."""

import math

import pytest
import torch

from molora.errors import ConfigError
from molora.routing.links import links, sigmoid, softmax


def test_softmax_is_its_definition():
    scores = torch.randn(3, 4, 5, dtype=torch.float64)
    for temperature in (1.0, 0.3, 7.0):
        got = softmax(scores, temperature=temperature)
        for row, out in zip(scores.reshape(-1, 5), got.reshape(-1, 5), strict=True):
            powers = [math.exp(float(v) / temperature) for v in row]
            assert out.tolist() == pytest.approx([v / sum(powers) for v in powers])


def test_sigmoid_is_its_definition():
    scores = torch.randn(3, 4, 5, dtype=torch.float64)
    got = sigmoid(scores, temperature=0.5)
    for s, out in zip(scores.flatten().tolist(), got.flatten().tolist(), strict=True):
        assert out == pytest.approx(1 / (1 + math.exp(-s / 0.5)))


def test_one_expert_gets_everything():
    assert softmax(torch.randn(2, 3, 1)).eq(1).all()


def test_low_temperature_decides_and_high_temperature_levels():
    scores = torch.randn(10, 6)
    cold, hot = softmax(scores, temperature=1e-4), softmax(scores, temperature=1e4)
    assert (cold.argmax(-1) == scores.argmax(-1)).all() and (cold.max(-1).values > 0.999).all()
    torch.testing.assert_close(hot, torch.full_like(hot, 1 / 6), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", list(links))
@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_huge_scores_stay_finite(name, scale):
    scores = (scale * torch.randn(4, 5)).requires_grad_()
    probs = links.get(name)(scores)
    (grad,) = torch.autograd.grad(probs.square().sum(), scores)
    assert torch.isfinite(probs).all() and torch.isfinite(grad).all()


@pytest.mark.parametrize("name", list(links))
@pytest.mark.parametrize("temperature", [0, -1.0, math.nan])
def test_temperature_must_be_positive(name, temperature):
    with pytest.raises(ConfigError, match="temperature must be positive"):
        links.get(name)(torch.zeros(2), temperature=temperature)
