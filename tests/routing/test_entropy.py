"""Entropies against scipy, closed forms, their limits, and their gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy as scipy_entropy

from molora.errors import ConfigError
from molora.routing.entropy import entropies, renyi, shannon, tsallis

ORDERS = (0.3, 0.5, 0.95, 1.05, 1.1, 1.5, 2.0, 3.0, 5.0)


def some_probs(rows=50, experts=6, sharpness=2.0):
    return torch.softmax(sharpness * torch.randn(rows, experts, dtype=torch.float64), -1)


def with_order(name, q):
    return lambda p: entropies.get(name)(p) if name == "shannon" else entropies.get(name)(p, q=q)


@pytest.mark.parametrize("q", ORDERS)
@pytest.mark.parametrize("experts", [2, 3, 8, 64])
@pytest.mark.parametrize("name", list(entropies))
def test_one_at_uniform_and_zero_at_one_hot(name, experts, q):
    measure = with_order(name, q)
    uniform = torch.full((experts,), 1 / experts)
    assert measure(uniform).item() == pytest.approx(1, abs=1e-5)
    one_hot = torch.zeros(experts)
    one_hot[experts // 2] = 1
    assert measure(one_hot).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", list(entropies))
def test_one_expert_has_no_entropy(name):
    assert entropies.get(name)(torch.ones(3, 1)).tolist() == [0, 0, 0]


def test_shannon_is_scipys():
    p = some_probs()
    expected = scipy_entropy(p.numpy(), axis=-1) / math.log(6)
    torch.testing.assert_close(shannon(p), torch.from_numpy(expected))


@pytest.mark.parametrize("q", ORDERS)
def test_tsallis_is_its_definition(q):
    p = some_probs()
    for row in p:
        raw = (1 - sum(float(v) ** q for v in row)) / (q - 1)
        top = (1 - 6 * (1 / 6) ** q) / (q - 1)
        assert tsallis(row, q=q).item() == pytest.approx(raw / top, rel=1e-9)


@pytest.mark.parametrize("q", ORDERS)
def test_renyi_is_its_definition(q):
    for row in some_probs():
        expected = math.log(sum(float(v) ** q for v in row)) / (1 - q) / math.log(6)
        assert renyi(row, q=q).item() == pytest.approx(expected, rel=1e-9)


def test_order_two_is_gini():
    p = some_probs()
    torch.testing.assert_close(tsallis(p, q=2.0), (1 - (p**2).sum(-1)) / (1 - 1 / 6))


@pytest.mark.parametrize("measure", [tsallis, renyi])
def test_order_near_one_approaches_shannon_linearly(measure):
    p = some_probs()
    gaps = [float((measure(p, q=1 + d) - shannon(p)).abs().max()) for d in (1e-1, 1e-2, 1e-3)]
    assert gaps[0] > gaps[1] > gaps[2] > 0
    assert gaps[1] / gaps[2] == pytest.approx(10, rel=0.1)  # O(q - 1)
    torch.testing.assert_close(measure(p, q=1.0), shannon(p), rtol=0, atol=0)


@pytest.mark.parametrize("measure", [tsallis, renyi])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_jump_where_the_limit_takes_over(measure, dtype):
    p = some_probs().to(dtype)
    inside, outside = measure(p, q=1 + 0.99e-4), measure(p, q=1 + 1.01e-4)
    assert (inside - outside).abs().max() < 1e-4


@pytest.mark.parametrize("q", [1.1, 1.5, 2.0])
def test_float32_keeps_its_digits_near_order_one(q):
    p = some_probs(rows=500, sharpness=5.0)
    assert (tsallis(p.float(), q=q).double() - tsallis(p, q=q)).abs().max() < 2e-6
    for order in (1.0002, 1.001, 1.05, 0.95, q):
        assert (renyi(p.float(), q=order).double() - renyi(p, q=order)).abs().max() < 2e-6
        assert (tsallis(p.float(), q=order).double() - tsallis(p, q=order)).abs().max() < 2e-6


@pytest.mark.parametrize("q", [0.5, 1.1, 2.0, 3.0])
def test_tsallis_gradient(q):
    """dS/dp_i = -q p_i^(q-1) / (q-1), over the value at uniform; up to a constant that no softmax can see."""
    p = some_probs().requires_grad_()
    (grad,) = torch.autograd.grad(tsallis(p, q=q).sum(), p)
    expected = -q * p.detach() ** (q - 1) / (q - 1) / ((1 - 6 ** (1 - q)) / (q - 1))
    torch.testing.assert_close(grad - grad.mean(-1, True), expected - expected.mean(-1, True))


@pytest.mark.parametrize("q", [0.5, 1.0, 1.1, 2.0])
@pytest.mark.parametrize("name", list(entropies))
def test_zero_and_one_hot_are_safe(name, q):
    measure = with_order(name, q)
    p = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 0, 1.0]], requires_grad=True)
    value = measure(p)
    (grad,) = torch.autograd.grad(value.sum(), p)
    assert torch.isfinite(value).all() and torch.isfinite(grad).all()
    # through a softmax that underflows to exact zeros
    scores = torch.tensor([[0.0, 500.0, -500.0]], requires_grad=True)
    (grad,) = torch.autograd.grad(measure(torch.softmax(scores, -1)).sum(), scores)
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("name", list(entropies))
@settings(max_examples=50, deadline=None)
@given(
    weights=st.lists(st.floats(0, 1), min_size=2, max_size=8).filter(lambda w: sum(w) > 0.01),
    q=st.floats(0.2, 4),
    data=st.data(),
)
def test_bounded_and_blind_to_order(name, weights, q, data):
    measure = with_order(name, q)
    p = torch.tensor(weights, dtype=torch.float64)
    p = p / p.sum()
    value = measure(p).item()
    assert -1e-9 <= value <= 1 + 1e-9
    order = data.draw(st.permutations(range(len(weights))))
    assert measure(p[list(order)]).item() == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("name", ["tsallis", "renyi"])
@pytest.mark.parametrize("q", [0, -1.0, math.inf, math.nan])
def test_order_must_be_positive(name, q):
    with pytest.raises(ConfigError, match="order q of an entropy must be a positive number"):
        entropies.get(name)(torch.full((4,), 0.25), q=q)
