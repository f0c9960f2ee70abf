"""Link functions against plain arithmetic."""

import math

import pytest
import torch

from molora.errors import ConfigError
from molora.routing.links import identity, links, relu, sigmoid, softmax
from molora.routing.router import _component as component


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
    probs = component(links, name, 5)(scores, progress=0.0)
    (grad,) = torch.autograd.grad(probs.square().sum(), scores)
    assert torch.isfinite(probs).all() and torch.isfinite(grad).all()


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
@pytest.mark.parametrize("temperature", [0, -1.0, math.nan])
def test_temperature_must_be_positive(name, temperature):
    with pytest.raises(ConfigError, match="temperature must be positive"):
        links.get(name)(torch.zeros(2), temperature=temperature)


def test_relu_and_identity_are_their_definitions():
    scores = torch.tensor([[-1.5, 0.0, 2.0]])
    assert relu(scores).tolist() == [[0.0, 0.0, 2.0]]
    assert identity(scores) is scores


def test_l2_relu_sees_directions_only_and_is_finite_for_few_experts():
    scores = torch.randn(4, 6, 3, dtype=torch.float64)
    link = component(links, {"name": "l2_relu", "c": 2.0}, 3).double()
    link.log_kappa.data.fill_(math.log(1.5))
    got = link(scores, progress=0.0)
    for row, out in zip(scores.reshape(-1, 3).tolist(), got.reshape(-1, 3).tolist(), strict=True):
        length = math.sqrt(sum(v * v for v in row))
        assert out == pytest.approx([2.0 * 1.5 * max(v, 0) / length for v in row])
    torch.testing.assert_close(link(7.0 * scores, progress=0.0), got)
    zero = torch.zeros(2, 8, requires_grad=True)
    out = component(links, "l2_relu", 8)(zero, progress=0.0)
    out.sum().backward()
    assert out.eq(0).all() and torch.isfinite(zero.grad).all()
    with pytest.raises(ConfigError, match=r"positive finite c, got inf"):
        component(links, {"name": "l2_relu", "c": math.inf}, 3)


def test_relu_rms_splits_which_from_how_much():
    scores = torch.randn(40, 5, dtype=torch.float64)
    scores[0] = -1.0  # no positive score: stays zero
    link = component(links, "relu_rms", 5).double()
    link.weight.data = torch.randn(5, dtype=torch.float64)
    got = link(scores, progress=0.0)
    for row, out in zip(scores.tolist(), got.tolist(), strict=True):
        active = [max(v, 0.0) for v in row]
        rms = math.sqrt(sum(a * a for a in active) / 5 + 1e-6)
        assert out == pytest.approx([w * a / rms for w, a in zip(link.weight.tolist(), active, strict=True)])
    assert got[0].eq(0).all()
    far = component(links, "relu_rms", 5)(1e3 * scores[1:].float().abs(), progress=0.0)
    torch.testing.assert_close(far.square().mean(-1), torch.ones(39), atol=1e-4, rtol=0)
