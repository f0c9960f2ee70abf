"""Auxiliary losses: closed forms, balance values, gradients, masks."""

import math

import pytest
import torch
from scipy import stats

from molora.errors import ConfigError
from molora.routing import parts  # noqa: F401  (registers every loss)
from molora.routing.losses import (
    entropy,
    importance,
    load_share,
    losses,
    router_z,
    switch_balance,
    tsallis,
)
from molora.routing.types import Context, Routing

NOBODY = Context()
# What each loss is at perfect balance, derived by hand: every token spreads its probs evenly, all scores are 0, and
# each token has one expert, in turn, with gate 1 / E.
BALANCED = {
    "switch_balance": lambda experts: 1.0,
    "router_z": lambda experts: math.log(experts) ** 2,
    "importance": lambda experts: 1.0,
    "entropy": lambda experts: 1.0,
    "tsallis": lambda experts: 1.0,
    "variation": lambda experts: 0.0,
    "sparsity_l1": lambda experts: math.sqrt(experts),
    "weighted_l1": lambda experts: 1 / experts,
    "cardinality": lambda experts: math.log(experts / 2) ** 2,
    "rsl": lambda experts: 1 / experts + 0.1 * math.log(experts),
    "mutual_information": lambda experts: 0.0,
    "centred_balance": lambda experts: 0.0,
    "capacity": lambda experts: 0.0,
    "match": lambda experts: 0.0,
    "locality": lambda experts: math.log(2),
    "chunk": lambda experts: 1 - (1 - 1 / experts) ** 64,
    "dirichlet_prior": lambda experts: 1 / 12 + (stats.beta.cdf(1 / experts, 0.75, 0.75 * (experts - 1)) - 0.5) ** 2,
}
# Losses with parts, and losses of notes that one scorer or selector leaves, are in tests of their own.
PLAIN = sorted(
    name
    for name in losses
    if "parts" not in losses.fact(name, "given", ()) and not losses.fact(name, "reads_notes", False)
)
# What does not read the probs over their sum, but scores, gates or probs as they are.
UNSCALED = {"router_z", "locality", "centred_balance"}


def routing_of(probs, gates=None, scores=None):
    probs = torch.as_tensor(probs, dtype=torch.float64).reshape(1, -1, len(probs[0]))
    gates = probs if gates is None else torch.as_tensor(gates, dtype=torch.float64).reshape(probs.shape)
    return Routing(probs.log() if scores is None else scores, probs, gates)


def random_routing(rows=3, length=5, experts=4, k=2):
    scores = torch.randn(rows, length, experts, dtype=torch.float64)
    probs = torch.softmax(scores, -1)
    mask = torch.zeros_like(probs).scatter(-1, probs.topk(k, -1).indices, 1.0)
    return Routing(scores, probs, probs * mask)


def balanced(experts, turns=64):
    """Every token spreads evenly, and all experts are chosen equally often (one each, in turn)."""
    uniform = torch.full((1, turns * experts, experts), 1 / experts)
    return Routing(torch.zeros_like(uniform), uniform, torch.eye(experts).repeat(turns, 1)[None] / experts)


# --- balance values ---------------------------------------------------------------------------------------------------


def test_every_loss_has_a_balance_value_here():
    missing = set(PLAIN) - set(BALANCED)
    assert not missing, f"derive the value of {sorted(missing)} at perfect balance and add it to BALANCED"
    assert set(BALANCED) <= set(losses)


@pytest.mark.parametrize("experts", [2, 3, 8, 64])
@pytest.mark.parametrize("name", PLAIN)
def test_value_at_perfect_balance(name, experts):
    value = losses.get(name)(balanced(experts), NOBODY).item()
    # with N tokens the prior's quantiles are N steps, which cost 1 / (12 N^2) less than a line
    expected = BALANCED[name](experts) - (1 / 12 / (64 * experts) ** 2 if name == "dirichlet_prior" else 0)
    assert value == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert losses.fact(name, "at_balance")(experts) == pytest.approx(BALANCED[name](experts), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_switch_balance_does_not_grow_with_k(k):
    """Mixtral's code gives k here."""
    uniform = torch.full((1, 4, 4), 0.25)
    gates = torch.stack([torch.roll(torch.tensor([1.0] * k + [0.0] * (4 - k)), shift) for shift in range(4)])[None]
    assert switch_balance(Routing(uniform, uniform, gates), NOBODY).item() == pytest.approx(1)
    mixtral = 4 * (gates.mean((0, 1)) * uniform.mean((0, 1))).sum().item()
    assert mixtral == pytest.approx(k)


# --- switch_balance ---------------------------------------------------------------------------------------------------


def test_switch_balance_is_one_when_either_side_is_uniform():
    skewed = routing_of([[0.7, 0.2, 0.1]] * 3, gates=[[1, 0, 0], [0, 1, 0], [0, 0, 1]])
    assert switch_balance(skewed, NOBODY).item() == pytest.approx(1)
    uniform = routing_of([[1 / 3] * 3] * 3, gates=[[1, 0, 0]] * 3)
    assert switch_balance(uniform, NOBODY).item() == pytest.approx(1)


def test_switch_balance_can_fall_below_one():
    """The counter-example: f = (.9, .1), P = (.459, .541)."""
    routing = routing_of([[0.459, 0.541]] * 10, gates=[[1, 0]] * 9 + [[0, 1]])
    assert switch_balance(routing, NOBODY).item() == pytest.approx(2 * (0.9 * 0.459 + 0.1 * 0.541))
    assert switch_balance(routing, NOBODY).item() == pytest.approx(0.934, abs=5e-4)


def test_switch_balance_is_e_at_collapse():
    routing = routing_of([[1.0, 0, 0, 0]] * 5)
    assert switch_balance(routing, NOBODY).item() == pytest.approx(4)


def test_switch_balance_against_loops():
    routing = random_routing()
    tokens = [(r, t) for r in range(3) for t in range(5)]
    chosen = [sum(routing.gates[r, t, e].item() != 0 for r, t in tokens) for e in range(4)]
    top = [sum(int(routing.probs[r, t].argmax()) == e for r, t in tokens) for e in range(4)]
    gate = [sum(routing.gates[r, t, e].item() for r, t in tokens) / 15 for e in range(4)]
    P = [sum(routing.probs[r, t, e].item() for r, t in tokens) / 15 for e in range(4)]
    for load, f in (
        ("selected", [c / sum(chosen) for c in chosen]),
        ("argmax", [c / 15 for c in top]),
        ("gates", gate),
    ):
        expected = 4 * sum(a * b for a, b in zip(f, P, strict=True))
        assert switch_balance(routing, NOBODY, load=load).item() == pytest.approx(expected), load
        assert load_share(routing, NOBODY, load).tolist() == pytest.approx(f)


def test_gate_load_falls_when_mass_is_masked_away():
    dense = random_routing(k=4)
    sparse = Routing(dense.scores, dense.probs, dense.gates * (dense.gates == dense.gates.amax(-1, keepdim=True)))
    assert switch_balance(sparse, NOBODY, load="gates") < switch_balance(dense, NOBODY, load="gates")


@pytest.mark.parametrize("load", ["selected", "argmax"])
def test_counts_carry_no_gradient(load):
    """d/dp_te of E sum f_e P_e is E f_e / T, with f constant."""
    scores = torch.randn(1, 6, 4, dtype=torch.float64)
    p = torch.softmax(scores, -1).requires_grad_()
    mask = torch.zeros_like(p).scatter(-1, p.topk(2, -1).indices, 1.0)
    # shares() divides by the sum; take it out by moving inside the simplex only
    (grad,) = torch.autograd.grad(switch_balance(Routing(scores, p, p * mask), NOBODY, load=load), p)
    f = load_share(Routing(scores, p, p * mask), NOBODY, load)
    expected = (4 * f / 6).expand_as(grad)
    torch.testing.assert_close(grad - grad.mean(-1, True), expected - expected.mean(-1, True))


def test_gate_load_carries_its_gradient():
    p = torch.softmax(torch.randn(1, 6, 4, dtype=torch.float64), -1).requires_grad_()
    gates = torch.softmax(torch.randn(1, 6, 4, dtype=torch.float64), -1).requires_grad_()
    (grad,) = torch.autograd.grad(switch_balance(Routing(p, p, gates), NOBODY, load="gates"), gates)
    torch.testing.assert_close(grad, (4 * p.mean((0, 1)) / 6).expand_as(grad))


def test_unknown_load_is_named():
    with pytest.raises(ConfigError, match="load 'tokens' is unknown; known: selected, gates, argmax"):
        switch_balance(random_routing(), NOBODY, load="tokens")


# --- the others -------------------------------------------------------------------------------------------------------


def test_router_z_against_a_loop_and_at_its_minimum():
    routing = random_routing()
    expected = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in routing.scores.reshape(-1, 4).tolist()) / 15
    assert router_z(routing, NOBODY).item() == pytest.approx(expected)
    scores = torch.full((1, 3, 4), -math.log(4))  # logsumexp is 0: the loss pulls scores to -ln E
    assert router_z(Routing(scores, scores, scores), NOBODY).item() == pytest.approx(0, abs=1e-10)


def test_importance_is_the_squared_variation_plus_one():
    routing = random_routing()
    mean = routing.probs.mean((0, 1))
    variation = mean.var(unbiased=False) / mean.mean() ** 2
    torch.testing.assert_close(importance(routing, NOBODY), variation + 1)
    assert importance(routing_of([[1.0, 0, 0, 0]] * 3), NOBODY).item() == pytest.approx(4)


@pytest.mark.parametrize("loss", [entropy, tsallis])
def test_entropy_of_tokens_is_below_that_of_the_batch(loss):
    """Their difference is the mutual information of token and expert (for Shannon), never negative."""
    routing = random_routing()
    token, batch = loss(routing, NOBODY, level="token"), loss(routing, NOBODY, level="batch")
    assert 0 < token < batch < 1
    decided_and_spread = routing_of(torch.eye(4).tolist())
    assert loss(decided_and_spread, NOBODY, level="token").item() == pytest.approx(0)
    assert loss(decided_and_spread, NOBODY, level="batch").item() == pytest.approx(1)


def test_mutual_information():
    routing = random_routing()
    p, mean = routing.probs, routing.probs.mean((0, 1))
    kl = (p * (p / mean).log()).sum(-1).mean() / math.log(4)
    torch.testing.assert_close(entropy(routing, NOBODY, level="batch") - entropy(routing, NOBODY, level="token"), kl)


def test_entropy_names_its_levels():
    with pytest.raises(ConfigError, match="entropy level 'row' is unknown; known: token, batch"):
        entropy(random_routing(), NOBODY, level="row")


def test_tsallis_alone_is_smallest_at_collapse():
    collapsed = routing_of([[1.0, 0, 0, 0]] * 5)
    assert tsallis(collapsed, NOBODY).item() == pytest.approx(0)
    assert switch_balance(collapsed, NOBODY, load="gates").item() == pytest.approx(4)  # why they come in pairs


@pytest.mark.parametrize("name", sorted(set(PLAIN) - UNSCALED))
def test_only_the_shares_of_probs_matter(name):
    """Probs of a sigmoid do not sum to 1."""
    routing = random_routing()
    scaled = Routing(routing.scores, 3 * routing.probs, routing.gates)
    torch.testing.assert_close(losses.get(name)(scaled, NOBODY), losses.get(name)(routing, NOBODY))


# --- padding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLAIN)
def test_padding_never_counts(name):
    routing = with_target(random_routing(rows=2, length=6))
    valid = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 0, 0, 0]]).bool()
    tasks, options = torch.tensor([0, 1]), {"target": 1e-3} if name == "capacity" else {}
    kept = valid[:, :, None].expand(-1, -1, 4)
    if losses.fact(name, "reads") in ("neighbours", "tasks"):
        # rows as they are, each without its padding, and then of one length again by repeating nothing: one by one
        rows = [cut(routing, row, valid[row]) for row in range(2)]
        counts = [len(r.scores[0]) - (name == "locality") for r in rows]
        if name == "mutual_information":
            mean = torch.stack([r.probs[0].mean(0) for r in rows])
            expected = -(mean * (mean / mean.mean(0)).log()).sum(-1).mean()
        else:
            each = torch.stack([losses.get(name)(r, NOBODY) for r in rows])
            weights = torch.tensor(counts if name == "locality" else [1, 1], dtype=each.dtype)  # one chunk per row
            expected = (each * weights).sum() / weights.sum()
    else:
        flat = [t[kept].view(1, -1, 4) for t in (routing.scores, routing.probs, routing.gates)]
        notes = {"target": routing.notes["target"][kept].view(1, -1, 4)}
        expected = losses.get(name)(Routing(*flat, notes=notes), NOBODY, **options)
    torch.testing.assert_close(losses.get(name)(routing, Context(valid=valid, task_ids=tasks), **options), expected)
    plain = losses.get(name)(routing, Context(task_ids=tasks), **options)
    assert abs(plain - expected) > 1e-7, "the mask must matter for this test to mean something"


def with_target(routing):
    """The same decision with a note for the loss `match`."""
    return Routing(routing.scores, routing.probs, routing.gates, notes={"target": torch.rand_like(routing.probs)})


def cut(routing, row, valid):
    """One row of a decision without its padding."""
    return Routing(*(t[row][valid][None] for t in (routing.scores, routing.probs, routing.gates)))


@pytest.mark.parametrize("name", PLAIN)
def test_a_batch_of_padding_costs_nothing(name):
    routing = with_target(random_routing(rows=1, length=3))
    scores = routing.scores.clone().requires_grad_()
    probs = torch.softmax(scores, -1)
    nothing = Context(valid=torch.zeros(1, 3).bool(), task_ids=torch.tensor([0]))
    options = {"target": 1e-3} if name == "capacity" else {}
    value = losses.get(name)(Routing(scores, probs, probs, notes=routing.notes), nothing, **options)
    (grad,) = torch.autograd.grad(value, scores)
    assert value.item() == pytest.approx(0, abs=1e-9)
    assert grad.abs().max().item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name", PLAIN)
def test_decisions_per_row_count_rows_that_are_not_all_padding(name):
    routing = with_target(random_routing(rows=3, length=1))
    valid = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    tasks = torch.tensor([0, 1, 2])
    notes = {"target": routing.notes["target"][[0, 2]]}
    kept = Routing(*(t[[0, 2]] for t in (routing.scores, routing.probs, routing.gates)), notes=notes)
    value = losses.get(name)(routing, Context(valid=valid, task_ids=tasks))
    torch.testing.assert_close(value, losses.get(name)(kept, Context(task_ids=tasks[[0, 2]])))
