"""Balanced assignment, Sinkhorn's plan, dual prices and thresholds, against scipy, closed forms and plain loops."""

import math

import pytest
import torch
from scipy.optimize import linear_sum_assignment, linprog

from molora.errors import ConfigError
from molora.routing import balance
from molora.routing.assignment import base, expert_choice, sinkhorn
from molora.routing.types import Context, Memory

TRAINING = Context(training=True)


def violation(mask):
    """The largest load over the mean load, minus 1; mask (T, N) bool."""
    load = mask.float().sum(0)
    return (load.max() / load.mean() - 1).item()


def top(values, k):
    return torch.zeros_like(values, dtype=torch.bool).scatter(-1, values.topk(k, -1).indices, True)


def all_real(tokens):
    return torch.ones(tokens, dtype=torch.bool)


# --- the balanced assignment ------------------------------------------------------------------------------------------


def kinds(tokens, experts):
    values = torch.randn(tokens, experts)
    yield values
    yield values + torch.linspace(4, -4, experts)  # everybody wants the first expert
    yield values.round()  # many ties
    yield values[:3].repeat(math.ceil(tokens / 3), 1)[:tokens]  # the same token again and again
    yield 1e4 * values
    yield 0 * values


@pytest.mark.parametrize(("tokens", "experts"), [(64, 8), (61, 8), (5, 8), (40, 3), (7, 1), (1, 4)])
def test_assignment_is_the_best_balanced_one(tokens, experts):
    """The value of scipy's linear_sum_assignment, with every column repeated ceil(T / E) times."""
    room = math.ceil(tokens / experts)
    for values in kinds(tokens, experts):
        chosen, price = balance.balanced_assignment(values)
        columns = values.double().repeat_interleave(room, 1).numpy()
        rows, best = linear_sum_assignment(columns, maximize=True)
        value = values.double().gather(1, chosen[:, None]).sum().item()
        assert value == pytest.approx(columns[rows, best].sum(), rel=1e-9, abs=1e-9)
        load = torch.bincount(chosen, minlength=experts)
        assert load.max() <= room and (tokens % experts or load.eq(room).all())
        # the price makes the assigned expert everybody's favourite
        priced = values.double() - price.double()
        mine = priced.gather(1, chosen[:, None])[:, 0]
        assert (mine >= priced.amax(1) - 1e-5 * max(1.0, values.abs().max().item())).all()
        assert abs(price.mean().item()) <= 1e-5 * max(1.0, price.abs().max().item())


def test_assignment_of_nothing_and_of_broken_numbers_ends():
    chosen, price = balance.balanced_assignment(torch.zeros(0, 4))
    assert chosen.shape == (0,) and price.eq(0).all()
    chosen, price = balance.balanced_assignment(torch.full((8, 4), torch.nan))
    assert torch.bincount(chosen).tolist() == [2, 2, 2, 2] and torch.isfinite(price).all()


# --- the dual price ---------------------------------------------------------------------------------------------------


def loops_of_bip(values, k, price, steps):
    """One number after the other, as the paper's algorithm is written."""
    tokens, experts = values.shape
    price = price.tolist()
    room = k * tokens // experts
    for _ in range(steps):
        left = [sorted((values[t, e].item() - price[e] for e in range(experts)), reverse=True) for t in range(tokens)]
        p = [max(0.0, row[k]) for row in left]
        price = [
            max(0.0, sorted((values[t, e].item() - p[t] for t in range(tokens)), reverse=True)[room])
            for e in range(experts)
        ]
    return torch.tensor(price)


def test_dual_price_is_the_loop_and_padding_says_nothing():
    values, start = torch.rand(24, 4), 0.1 * torch.rand(4)
    count = torch.full((24,), 2)
    found = balance.dual_price(values, all_real(24), count, start, 3, floor=True)
    torch.testing.assert_close(found, loops_of_bip(values, 2, start, 3))
    longer, real = torch.cat([values, torch.rand(9, 4)]), torch.arange(33) < 24
    again = balance.dual_price(longer, real, torch.full((33,), 2), start, 3, floor=True)
    torch.testing.assert_close(again, found)


def test_dual_price_reaches_the_optimum_of_the_linear_program():
    """The dual is never below the optimum, falls with every round, and comes within 0.1 % of it."""
    tokens, experts, k = 96, 8, 2
    values = torch.softmax(torch.randn(tokens, experts) + torch.linspace(1.5, -1.5, experts), -1).double()
    room = k * tokens // experts
    rows = torch.kron(torch.eye(tokens), torch.ones(1, experts))
    columns = torch.kron(torch.ones(1, tokens), torch.eye(experts))
    best = -linprog(
        -values.flatten().numpy(),
        A_ub=torch.cat([rows, columns]).numpy(),
        b_ub=[k] * tokens + [room] * experts,
        bounds=(0, 1),
    ).fun
    count, duals = torch.full((tokens,), k), []
    for steps in (2, 14, 60):
        q = balance.dual_price(values, all_real(tokens), count, values.new_zeros(experts), steps, floor=True)
        p = (values - q).sort(-1, descending=True).values[:, k].clamp_min(0)
        gain = (values - p[:, None] - q).clamp_min(0).sum()
        duals.append((k * p.sum() + room * q.sum() + gain).item())
    assert all(dual >= best - 1e-9 for dual in duals)
    assert duals[-1] <= best * 1.001 and duals == sorted(duals, reverse=True)


def test_load_violation_falls_with_the_rounds_of_the_dual_price():
    """16 experts, 4 per token: from more than 1 to under 0.6 after 2 rounds and under 0.1 after 14."""
    values = torch.softmax(torch.randn(1024, 16) + torch.linspace(1, -1, 16), -1)
    count, found = torch.full((1024,), 4), [violation(top(values, 4))]
    for steps in (2, 14):
        q = balance.dual_price(values, all_real(1024), count, torch.zeros(16), steps, floor=True)
        found.append(violation(top(values - q, 4)))
    assert found[0] > 1 and found[1] < 0.6 and found[2] < 0.1


# --- Sinkhorn's plan --------------------------------------------------------------------------------------------------


def test_plan_has_its_marginals_and_padding_has_none():
    scores, real = 3 * torch.randn(30, 5), torch.arange(30) % 3 != 0
    plan, _ = balance.sinkhorn_plan(scores, real, 0.5, 2000, 0.0)
    torch.testing.assert_close(plan.sum(1), real.float())
    torch.testing.assert_close(plan.sum(0), torch.full((5,), 4.0), atol=1e-3, rtol=1e-3)
    alone, _ = balance.sinkhorn_plan(scores[real], all_real(20), 0.5, 2000, 0.0)
    torch.testing.assert_close(plan[real], alone)
    nothing, price = balance.sinkhorn_plan(scores, torch.zeros(30).bool(), 0.5, 10, 1e-4)
    assert nothing.eq(0).all() and torch.isfinite(price).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_plan_of_two_by_two_in_closed_form(temperature):
    """Symmetric scores: plan_11 = sigmoid((z_11 - z_12) / xi)."""
    scores = torch.tensor([[0.73, 0.27], [0.27, 0.73]])
    plan, _ = balance.sinkhorn_plan(scores, all_real(2), temperature, 200, 0.0)
    expected = 1 / (1 + math.exp(-(0.73 - 0.27) / temperature))
    torch.testing.assert_close(plan, torch.tensor([[expected, 1 - expected], [1 - expected, expected]]))


def test_plan_is_blind_to_offsets_of_experts_and_its_price_is_not():
    scores, offset = torch.randn(40, 4), torch.tensor([3.0, -1.0, 0.0, -2.0])
    plan, price = balance.sinkhorn_plan(scores, all_real(40), 1.0, 500, 0.0)
    other, moved = balance.sinkhorn_plan(scores + offset, all_real(40), 1.0, 500, 0.0)
    torch.testing.assert_close(other, plan, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(moved - price, offset, atol=1e-4, rtol=1e-4)  # the offsets sum to 0, as prices do
    assert torch.equal((scores - price).argsort(-1), plan.argsort(-1))


def test_plan_at_temperature_zero_is_the_balanced_assignment():
    scores = (torch.randn(32, 4) + torch.linspace(2, -2, 4)).double()
    plan, _ = balance.sinkhorn_plan(scores, all_real(32), 0.01, 5000, 1e-9)
    chosen, _ = balance.balanced_assignment(scores)
    assert (plan.argmax(-1) == chosen).all()
    best = scores.gather(1, chosen[:, None]).sum()
    assert best - 0.01 * 32 * math.log(4) <= (plan * scores).sum() <= best + 1e-6  # all that the entropy may cost


def test_gradient_flows_through_the_iterations():
    scores = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: balance.sinkhorn_plan(z, all_real(6), 1.0, 8, 0.0)[0], scores)


def test_a_stored_price_keeps_the_loads_of_the_plan():
    """Skewed offsets, E = 8: plain top-k overloads an expert fourfold, the mean price of 5 earlier batches does not."""
    offset = torch.linspace(2, -2, 8)
    draw = lambda: torch.randn(4096, 8) + offset  # noqa: E731
    scores = draw()
    plan, _ = balance.sinkhorn_plan(scores, all_real(4096), 1.0, 100, 1e-6)
    stored = sum(balance.sinkhorn_plan(draw(), all_real(4096), 1.0, 100, 1e-6)[1] for _ in range(5)) / 5
    for k, plain in ((1, 3.0), (2, 2.0)):
        assert violation(top(scores, k)) > plain
        assert violation(top(plan, k)) < 0.15
        assert violation(top(scores - stored, k)) < 0.2


# --- thresholds -------------------------------------------------------------------------------------------------------


def test_threshold_separates_the_best_tokens_of_each_expert():
    values, real = torch.rand(20, 3), torch.arange(20) < 17
    price = balance.threshold_price(values, real, torch.tensor(5))
    assert ((values > price) & real[:, None]).sum(0).tolist() == [5, 5, 5]
    for e in range(3):
        ranked = sorted(values[:17, e].tolist(), reverse=True)
        assert price[e].item() == pytest.approx((ranked[4] + ranked[5]) / 2)
    everybody = balance.threshold_price(values, real, torch.tensor(99.0))
    assert (values[real] > everybody).all()


# --- the selectors ----------------------------------------------------------------------------------------------------


def ctx_with(valid):
    return Context(valid=valid, training=True, memory=Memory())


def test_base_deals_out_real_tokens_only():
    scores, valid = torch.randn(2, 9, 4) + torch.linspace(3, 0, 4), torch.rand(2, 9) < 0.7
    notes = {}
    gates = base(torch.sigmoid(scores), ctx_with(valid), scores=scores, notes=notes)
    assert (gates[~valid] == 0).all() and ((gates[valid] != 0).sum(-1) == 1).all()
    assert (gates != 0).sum((0, 1)).max() <= math.ceil(int(valid.sum()) / 4)
    chosen, price = balance.balanced_assignment(scores[valid])
    assert (gates[valid].argmax(-1) == chosen).all()
    torch.testing.assert_close(gates[valid].amax(-1), torch.sigmoid(scores[valid]).gather(1, chosen[:, None])[:, 0])
    assert torch.equal(notes["price"], price[None, None])


def test_base_in_evaluation_subtracts_the_price_from_the_scores():
    scores, price = torch.randn(2, 9, 4), torch.tensor([2.0, 0.0, -1.0, 0.5])
    gates = base(torch.sigmoid(scores), Context(), scores=scores, price=price)
    assert (gates.argmax(-1) == (scores - price).argmax(-1)).all() and ((gates != 0).sum(-1) == 1).all()


def test_sinkhorn_gates_are_the_plan_on_its_largest():
    scores, valid = torch.randn(2, 8, 4) + torch.linspace(2, 0, 4), torch.ones(2, 8).bool()
    gates = sinkhorn(torch.softmax(scores, -1), ctx_with(valid), scores=scores, iterations=300, tolerance=0.0)
    plan, _ = balance.sinkhorn_plan(scores.flatten(0, 1), all_real(16), 1.0, 300, 0.0)
    for row, g in zip(plan, gates.flatten(0, 1), strict=True):
        best = sorted(range(4), key=lambda e: -row[e])[:2]
        expected = torch.tensor([row[e] / sum(row[f] for f in best) if e in best else 0.0 for e in range(4)])
        torch.testing.assert_close(g, expected)


def test_sinkhorn_by_chance_uses_the_plan_that_often():
    scores = torch.randn(1, 6, 4)
    probs = torch.softmax(scores, -1)
    plain = sinkhorn(probs, Context(), scores=scores)
    memory, used = Memory(), 0
    for seed in range(400):
        memory.seed = seed
        generator = memory.generator("here/selector", scores.device)
        notes = {}
        ctx = Context(training=True, memory=memory)
        gates = sinkhorn(probs, ctx, scores=scores, chance=0.25, notes=notes, generator=generator)
        used += "price" in notes
        if "price" not in notes:
            assert torch.equal(gates, plain)
    assert 70 <= used <= 130  # 100 expected, 3.5 standard deviations


def test_sinkhorn_noise_is_in_training_only_and_drawn_from_the_generator():
    scores = torch.randn(1, 50, 4)
    probs = torch.softmax(scores, -1)
    draws = [
        sinkhorn(probs, TRAINING, scores=scores, chance=0.0, noise=1.0, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    quiet = [sinkhorn(probs, Context(), scores=scores, chance=0.0, noise=noise) for noise in (0.0, 1.0)]
    assert torch.equal(*quiet)


def test_expert_choice_takes_the_best_tokens_of_each_expert():
    probs, valid = torch.softmax(torch.randn(3, 8, 4), -1), torch.rand(3, 8) < 0.8
    gates = expert_choice(probs, ctx_with(valid), capacity=2.0)
    tokens = int(valid.sum())
    count = round(2.0 * tokens / 4)
    assert (gates != 0).sum((0, 1)).tolist() == [count] * 4 and (gates[~valid] == 0).all()
    for e in range(4):
        taken = gates[..., e] != 0
        assert probs[..., e][taken].min() >= probs[..., e][valid & ~taken].max()
        torch.testing.assert_close(gates[..., e][taken], probs[..., e][taken])


def test_expert_choice_loads_are_exact_with_ties():
    gates = expert_choice(torch.full((1, 12, 4), 0.25), TRAINING, capacity=1.0)
    assert (gates != 0).sum((0, 1)).tolist() == [3, 3, 3, 3]


def test_expert_choice_in_evaluation_goes_by_the_price_or_by_the_tokens_own_best():
    probs, price = torch.softmax(torch.randn(2, 5, 4), -1), torch.tensor([0.1, 0.2, 0.3, 0.4])
    torch.testing.assert_close(expert_choice(probs, Context(), price=price), probs * (probs > price))
    own = expert_choice(probs, Context(), capacity=2.0)
    assert ((own != 0) == top(probs, 2)).all()


def test_options_are_checked():
    scores = torch.zeros(1, 1, 4)
    for options, message in (
        ({"k": 5}, "k=5 with 4"),
        ({"chance": 2.0}, "0 <= chance <= 1"),
        ({"temperature": 0.0}, "temperature > 0"),
        ({"gates": "scores"}, "known: plan, prob"),
    ):
        with pytest.raises(ConfigError, match=message):
            sinkhorn(scores, Context(), scores=scores, **options)
    with pytest.raises(ConfigError, match="0 < capacity <= number of experts, got 5"):
        expert_choice(scores, Context(), capacity=5)
