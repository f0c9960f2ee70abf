"""Sampled selections: the draws follow Q, their log-probability is exact, and the estimator made of it is unbiased."""

import itertools

import pytest
import torch
from scipy.stats import chisquare

from molora.errors import ConfigError
from molora.routing.objectives import build_objective, leave_one_out
from molora.routing.policy import gumbel, log_prob_in_order, log_shares, sample
from molora.routing.router import Router
from molora.routing.types import Context, Memory

N, K = 4, 2
DRAWS = list(itertools.permutations(range(N), K))


def probability(q, draw):
    """Q of an ordered draw, as the paper writes it."""
    left, product = 1.0, 1.0
    for expert in draw:
        product = product * q[expert] / left
        left = left - q[expert]
    return product


def order_of(draw):
    return torch.tensor([*draw, *(e for e in range(N) if e not in draw)])


@pytest.mark.proves("remix")
def test_log_probabilities_are_those_of_drawing_without_replacement():
    q = torch.softmax(torch.randn(N, dtype=torch.float64), -1)
    found = torch.stack([log_prob_in_order(q.log(), order_of(draw), K) for draw in DRAWS])
    expected = torch.stack([probability(q, draw).log() for draw in DRAWS])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.exp().sum(), torch.tensor(1.0, dtype=torch.float64))
    # all of them, in any order
    whole = [log_prob_in_order(q.log(), torch.tensor(order), N).exp() for order in itertools.permutations(range(N))]
    torch.testing.assert_close(sum(whole), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.proves("remix")
def test_the_estimator_is_unbiased_by_enumeration():
    """E over all pairs of draws of G equals the gradient of E[L], for a loss that depends on the set alone."""
    scores = torch.randn(N, dtype=torch.float64, requires_grad=True)
    loss_of_set = {frozenset(pair): torch.randn((), dtype=torch.float64) for pair in DRAWS}
    losses = [loss_of_set[frozenset(draw)] for draw in DRAWS]
    q = torch.softmax(scores, -1)
    expected = sum(probability(q, draw) * loss for draw, loss in zip(DRAWS, losses, strict=True))
    (exact,) = torch.autograd.grad(expected, scores, retain_graph=True)
    log_qs = [log_prob_in_order(torch.log_softmax(scores, -1), order_of(draw), K) for draw in DRAWS]
    mean = torch.zeros(N, dtype=torch.float64)
    for first, second in itertools.product(range(len(DRAWS)), repeat=2):
        surrogate = leave_one_out(
            torch.stack([losses[first], losses[second]]), torch.stack([log_qs[first], log_qs[second]])
        )
        assert surrogate.item() == 0
        (estimate,) = torch.autograd.grad(surrogate, scores, retain_graph=True)
        mean += (log_qs[first] + log_qs[second]).exp().detach() * estimate
        # M = 2, in closed form
        (one,) = torch.autograd.grad(log_qs[first], scores, retain_graph=True)
        (two,) = torch.autograd.grad(log_qs[second], scores, retain_graph=True)
        torch.testing.assert_close(estimate, 0.5 * (losses[first] - losses[second]) * (one - two))
    torch.testing.assert_close(mean, exact)


@pytest.mark.proves("remix")
def test_constants_in_the_loss_change_nothing():
    losses, scores = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    log_q = torch.nn.functional.logsigmoid(scores)
    (plain,) = torch.autograd.grad(leave_one_out(losses, log_q), scores, retain_graph=True)
    shift = torch.tensor([10.0, -3.0, 100.0], dtype=torch.float64)  # of each row
    (shifted,) = torch.autograd.grad(leave_one_out(losses + shift, log_q), scores, retain_graph=True)
    torch.testing.assert_close(shifted, plain)
    (equal,) = torch.autograd.grad(leave_one_out(shift.expand(5, 3), log_q), scores)
    assert equal.abs().max() == 0 and plain.abs().max() > 0


@pytest.mark.proves("remix")
def test_draws_follow_their_probability():
    exact = torch.softmax(torch.tensor([0.3, -1.0, 1.2, 0.0], dtype=torch.float64), -1)
    probs = exact.float()
    amount, notes = 40_000, {}
    generator = torch.Generator().manual_seed(1)
    ctx = Context(training=True)
    gates = sample(probs.expand(1, amount, N), ctx, k=K, notes=notes, generator=generator)
    sets = [frozenset(row.nonzero()[:, 0].tolist()) for row in gates[0]]
    expected = {}
    for draw in DRAWS:
        expected[frozenset(draw)] = expected.get(frozenset(draw), 0.0) + float(probability(exact, draw))
    counts = [sets.count(pair) for pair in expected]
    assert chisquare(counts, [amount * share for share in expected.values()]).pvalue > 1e-3
    # the ordered draws too: each ordered draw has its own log-probability
    keys = {round(float(probability(exact, draw).log()), 4): draw for draw in DRAWS}
    assert len(keys) == len(DRAWS)
    seen = [keys[round(float(value), 4)] for value in notes["log_prob"][0, :8000].double()]
    counts = [seen.count(draw) for draw in DRAWS]
    assert chisquare(counts, [8000 * float(probability(exact, draw)) for draw in DRAWS]).pvalue > 1e-3


@pytest.mark.proves("remix")
def test_gates_are_k_times_the_same_constant():
    router = Router(8, 6, selector={"name": "sample", "k": 3, "omega": 0.25})
    x = torch.randn(2, 5, 8)
    for training in (True, False):
        routing = router(x, Context(training=training))
        assert routing.gates.unique().tolist() == [0.0, 0.25] and (routing.gates != 0).sum(-1).eq(3).all()
        assert not routing.gates.requires_grad
        effective = routing.gates.sum(-1) ** 2 / (routing.gates**2).sum(-1)
        torch.testing.assert_close(effective, torch.full((2, 5), 3.0))
    best = router(x, Context()).probs.topk(3, -1).indices
    assert router(x, Context()).gates.gather(-1, best).eq(0.25).all() and router(x, Context()).notes is None


def test_draws_follow_from_the_seed_of_the_forward_alone():
    router, x = Router(8, 6, selector="sample"), torch.randn(2, 5, 8)
    memory, other = Memory(), Memory()
    memory.seed, other.seed = 3, 4
    first = router(x, Context(training=True, memory=memory))
    torch.rand(7)  # torch's own generator has no part in it
    again = router(x, Context(training=True, memory=memory))
    assert torch.equal(first.gates, again.gates) and torch.equal(first.notes["log_prob"], again.notes["log_prob"])
    assert not torch.equal(router(x, Context(training=True, memory=other)).gates, first.gates)
    assert memory.generator("a", x.device).initial_seed() != memory.generator("b", x.device).initial_seed()
    assert Memory().generator("a", x.device) is None


def test_a_prompt_draws_once():
    router = Router(8, 6, selector="sample", granularity="prompt")
    routing = router(torch.randn(3, 5, 8), Context(training=True))
    assert routing.gates.shape == (3, 1, 6) and routing.notes["log_prob"].shape == (3, 1)


def test_one_sided_probabilities_stay_finite():
    scores = torch.tensor([[[2000.0, 0.0, -2000.0, 5.0]]], requires_grad=True)
    notes = {}
    gates = sample(torch.softmax(scores, -1), Context(training=True), k=4, notes=notes)
    assert gates.eq(1).all()
    notes["log_prob"].sum().backward()
    assert torch.isfinite(notes["log_prob"]).all() and torch.isfinite(scores.grad).all()
    torch.testing.assert_close(log_shares(torch.tensor([0.5, 0.5, 1.0])), torch.tensor([0.25, 0.25, 0.5]).log())
    noise = gumbel(torch.zeros(100_000), torch.Generator().manual_seed(0))
    assert torch.isfinite(noise).all() and abs(noise.mean().item() - 0.5772) < 0.02


def test_wrong_numbers_are_said():
    with pytest.raises(ConfigError, match="k=7 with 6"):
        Router(8, 6, selector={"name": "sample", "k": 7})
    assert Router(8, 6, selector={"name": "sample", "k": 7, "clamp": True})(torch.randn(1, 2, 8), Context()).gates.all()
    with pytest.raises(ConfigError, match="draws must be a whole number >= 2"):
        build_objective({"name": "rloo", "draws": 1})
    with pytest.raises(ConfigError, match="known: row, batch"):
        build_objective({"name": "rloo", "per": "token"})
    with pytest.raises(ConfigError, match="alpha must not be negative"):
        build_objective({"name": "consistency", "alpha": -1.0})
