"""Losses of load and sparsity: ranges, identities, loops over tokens and experts; scopes and null experts."""

import math

import pytest
import torch
from scipy import stats

from molora.errors import ConfigError
from molora.routing.load_losses import cardinality, mutual_information, rsl, sparsity_l1, variation, weighted_l1
from molora.routing.losses import Parts, entropy, importance, switch_balance
from molora.routing.router import Router
from molora.routing.types import Context, Memory, Routing
from molora.routing.weighted import WeightedLoss

NOBODY = Context()


def decision(rows=3, length=5, experts=4, k=2):
    scores = torch.randn(rows, length, experts, dtype=torch.float64)
    probs = torch.softmax(scores, -1)
    mask = torch.zeros_like(probs).scatter(-1, probs.topk(k, -1).indices, 1.0)
    return Routing(scores, probs, probs * mask)


def of_probs(rows):
    probs = torch.tensor(rows, dtype=torch.float64)[None]
    return Routing(probs.log(), probs, probs)


# --- ranges and identities --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [2, 8, 33])
def test_sparsity_l1_goes_from_one_to_the_root_of_e(experts):
    assert sparsity_l1(of_probs(torch.eye(experts).tolist()), NOBODY).item() == pytest.approx(1)
    assert sparsity_l1(of_probs([[1 / experts] * experts]), NOBODY).item() == pytest.approx(math.sqrt(experts))
    assert 1 < sparsity_l1(decision(experts=experts), NOBODY).item() < math.sqrt(experts)


def test_sparsity_l1_of_a_token_without_probs_costs_nothing():
    probs = torch.tensor([[[0.0, 0.0], [0.3, 0.4]]], requires_grad=True)
    value = sparsity_l1(Routing(probs, probs, probs), NOBODY)
    (grad,) = torch.autograd.grad(value, probs)
    assert value.item() == pytest.approx(0.5 * 0.7 / 0.5) and torch.isfinite(grad).all() and grad[0, 0].abs().max() < 2


def test_variation_of_importance_is_importance_minus_one():
    routing = decision()
    torch.testing.assert_close(variation(routing, NOBODY), importance(routing, NOBODY) - 1)
    mean = routing.probs.mean((0, 1))
    unbiased = mean.var() / mean.mean() ** 2  # what T2MIR's code takes
    torch.testing.assert_close(variation(routing, NOBODY) * 4 / 3, unbiased)


def test_smooth_load_against_redrawn_noise_in_loops():
    routing, sigma = decision(rows=1, length=3, experts=4, k=2), 0.7
    load = [0.0] * 4
    for scores in routing.scores[0].tolist():
        for e in range(4):
            others = sorted((s for f, s in enumerate(scores) if f != e), reverse=True)
            load[e] += stats.norm.cdf((scores[e] - others[1]) / sigma) / 3  # k = 2: the second of the others
    mean = sum(load) / 4
    expected = sum((v - mean) ** 2 for v in load) / 4 / mean**2
    assert variation(routing, NOBODY, of="load", noise=sigma).item() == pytest.approx(expected)
    assert variation(routing, NOBODY, of="load", noise=sigma, k=2).item() == pytest.approx(expected)
    both = variation(routing, NOBODY, of="both", noise=sigma)
    torch.testing.assert_close(both, variation(routing, NOBODY) + variation(routing, NOBODY, of="load", noise=sigma))


def test_smooth_load_reads_clean_scores_and_the_noise_of_the_scorer():
    routing = decision()
    noted = Routing(
        routing.scores, routing.probs, routing.gates, notes={"clean": routing.scores, "noise": torch.tensor(0.3)}
    )
    torch.testing.assert_close(
        variation(noted, NOBODY, of="load"), variation(routing, NOBODY, of="load", noise=0.3), check_dtype=False
    )


def test_weighted_l1_is_the_plain_norm_when_experts_are_used_alike():
    gates = torch.tensor([[0.4, 0.2, 0, 0], [0, 0.3, 0.6, 0], [0, 0, 0.1, 0.9], [0.5, 0, 0, 0.2]])[None]
    routing = Routing(gates, gates, gates)
    plain = gates.sum(-1).mean()
    torch.testing.assert_close(weighted_l1(routing, NOBODY, k=2), plain)
    torch.testing.assert_close(weighted_l1(routing, NOBODY, balanced=False), plain)
    torch.testing.assert_close(weighted_l1(routing, NOBODY, k=1), 2 * plain)


def test_weighted_l1_against_loops_presses_on_what_is_used_most():
    gates = torch.relu(torch.randn(2, 6, 4, dtype=torch.float64)).requires_grad_()
    value = weighted_l1(Routing(gates, gates, gates), NOBODY, k=2)
    tokens = gates.reshape(-1, 4).tolist()
    used = [4 / 2 * sum(t[e] > 0 for t in tokens) / 12 for e in range(4)]
    assert value.item() == pytest.approx(sum(used[e] * sum(t[e] for t in tokens) / 12 for e in range(4)))
    (grad,) = torch.autograd.grad(value, gates)
    expected = torch.tensor(used, dtype=torch.float64) / 12 * (gates != 0)  # f carries no gradient, a zero gate none
    torch.testing.assert_close(grad, expected.detach())


def test_cardinality_is_zero_where_k_experts_share_the_load():
    halves = of_probs([[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0]])
    assert cardinality(halves, NOBODY, k=2).item() == pytest.approx(0, abs=1e-12)
    turns = of_probs([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0]])  # the layer uses three, each token one
    assert cardinality(turns, NOBODY, k=3).item() == pytest.approx(0, abs=1e-12)
    assert cardinality(turns, NOBODY, k=1).item() == pytest.approx(math.log(3) ** 2)


# --- LoRA-Mixer and BECoTTA -------------------------------------------------------------------------------------------


@pytest.mark.proves("lora_mixer", "lora_mixer_router")
def test_rsl_against_loops_and_both_signs():
    routing = decision(experts=5)
    tokens = routing.probs.reshape(-1, 5).tolist()
    f, P, H = [0.0] * 5, [0.0] * 5, 0.0
    for p in tokens:
        for e in sorted(range(5), key=lambda e: -p[e])[:3]:
            f[e] += 1 / 3 / len(tokens)
        P = [P[e] + p[e] / len(tokens) for e in range(5)]
        H += sum(-v * math.log(v) for v in p) / len(tokens)
    balance = sum(a * b for a, b in zip(f, P, strict=True))
    assert rsl(routing, NOBODY, k=3, entropy=0.2).item() == pytest.approx(balance + 0.2 * H)
    assert rsl(routing, NOBODY, k=3, entropy=0.2, sign="spread").item() == pytest.approx(balance - 0.2 * H)
    for experts in (2, 7):  # alpha / K at uniform
        assert rsl(of_probs([[1 / experts] * experts]), NOBODY, entropy=0).item() == pytest.approx(1 / experts)


@pytest.mark.proves("lora_mixer")
@pytest.mark.parametrize(("sign", "entropy_at_the_end"), [("spread", 1.0), ("specialise", 0.0)])
def test_the_sign_of_rsl_decides_between_uniform_and_one_hot(sign, entropy_at_the_end):
    scores = torch.randn(1, 32, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    optimizer = torch.optim.Adam([scores], lr=0.1)
    for _ in range(200):
        probs = torch.softmax(scores, -1)
        optimizer.zero_grad()
        rsl(Routing(scores, probs, probs), NOBODY, entropy=1.0, sign=sign).backward()
        optimizer.step()
    probs = torch.softmax(scores, -1)
    assert entropy(Routing(scores, probs, probs), NOBODY).item() == pytest.approx(entropy_at_the_end, abs=0.02)


def test_mutual_information_of_tasks():
    def at(rows, tasks):
        routing = of_probs(rows)
        rows_first = Routing(*(t.transpose(0, 1) for t in (routing.scores, routing.probs, routing.gates)))
        return -mutual_information(rows_first, Context(task_ids=torch.tensor(tasks))).item()

    eye = torch.eye(4).tolist()
    assert at(eye, [0, 1, 2, 3]) == pytest.approx(math.log(4))  # a permutation
    assert at(eye, [7, 2, 5, 0]) == pytest.approx(math.log(4))
    assert at(eye, [0, 0, 1, 1]) == pytest.approx(math.log(2))  # ln min(D, E)
    assert at([[0.1, 0.2, 0.3, 0.4]] * 4, [0, 1, 2, 3]) == pytest.approx(0, abs=1e-9)  # independent
    assert at(eye, [0, 0, 0, 0]) == pytest.approx(0, abs=1e-9)
    # tasks weigh alike, however many rows they have; unknown tasks (-1) say nothing
    assert at([eye[0], eye[0], eye[0], eye[1], eye[2]], [0, 0, 0, 1, -1]) == pytest.approx(math.log(2))
    p, q = [0.7, 0.2, 0.1, 0.0001], [0.1, 0.1, 0.3, 0.5]
    expected = sum(0.5 * v * math.log(v / (0.5 * (a + b))) for r in (p, q) for v, a, b in zip(r, p, q, strict=True))
    total = [sum(p), sum(q)]
    assert at([[v / total[0] for v in p], q], [0, 1]) == pytest.approx(expected, abs=1e-3)


def test_mutual_information_gives_the_router_a_gradient():
    scores = torch.randn(4, 3, 4, dtype=torch.float64, requires_grad=True)

    def loss(scores):
        probs = torch.softmax(scores, -1)
        return mutual_information(Routing(scores, probs, probs), Context(task_ids=torch.tensor([0, 1, 0, 2])))

    assert torch.autograd.gradcheck(loss, scores)
    (grad,) = torch.autograd.grad(loss(scores), scores)
    assert grad.abs().max() > 1e-4


# --- scopes and null experts of switch_balance ------------------------------------------------------------------------


def test_balance_per_sequence_is_the_mean_over_rows():
    routing = decision(rows=3, length=6)
    valid = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0]]).bool()
    each = [
        switch_balance(Routing(*(t[r][valid[r]][None] for t in (routing.scores, routing.probs, routing.gates))), NOBODY)
        for r in range(2)
    ]
    value = switch_balance(routing, Context(valid=valid), scope="sequence")
    torch.testing.assert_close(value, (each[0] + each[1]) / 2)
    assert abs(value - switch_balance(routing, Context(valid=valid))) > 1e-3


def test_tied_null_experts_fix_how_often_nothing_is_chosen_but_not_which():
    scores = torch.randn(1, 12, 6, dtype=torch.float64)
    probs = torch.softmax(scores, -1)
    chosen = torch.zeros_like(probs).scatter(-1, probs.topk(3, -1).indices, 1.0).bool()
    routing = Routing(scores, probs, (probs * chosen)[..., :4], choices=chosen)
    f = chosen.double().mean((0, 1)) / 3
    P = probs.mean((0, 1))
    torch.testing.assert_close(switch_balance(routing, NOBODY), 6 * (f * P).sum())
    f[4:] = f[4:].mean()
    torch.testing.assert_close(switch_balance(routing, NOBODY, null="tied"), 6 * (f * P).sum())


def parts_at(place):
    router = Router(4, 3)
    router.place.name = place
    return Parts(router, torch.zeros(1, 1, 4))


@pytest.mark.proves("unipool")
def test_the_pool_scope_reads_the_mean_load_of_the_forward_before():
    loss = WeightedLoss({"name": "switch_balance", "weight": 1.0, "scope": "pool"})
    forwards = [[decision(experts=3) for _ in range(2)] for _ in range(3)]
    loads = []
    for forward in forwards:
        memory, before = Memory(), loads[-1] if loads else None
        own = [r.gates.ne(0).double().mean((0, 1)) / 2 for r in forward]
        for layer, routing in enumerate(forward):
            ctx, parts = Context(memory=memory, training=True), parts_at(f"layer{layer}")
            f = own[layer] if before is None else before
            expected = 3 * (f * routing.probs.mean((0, 1))).sum()
            torch.testing.assert_close(loss(routing, ctx, 1, parts), expected)
            torch.testing.assert_close(loss(routing, ctx, 1, parts), expected)  # the recompute finds the same
        loads.append((own[0] + own[1]) / 2)


def test_the_pool_scope_keeps_layers_with_other_numbers_of_experts_apart():
    loss = WeightedLoss({"name": "switch_balance", "weight": 1.0, "scope": "pool"})
    three, five = decision(experts=3), decision(experts=5)
    for _ in range(2):
        ctx = Context(memory=Memory(), training=True)
        for place, routing in (("a", three), ("b", five)):
            torch.testing.assert_close(loss(routing, ctx, 1, parts_at(place)), switch_balance(routing, NOBODY))


def test_the_global_scope_is_the_micro_scope_on_one_rank_and_is_asked_once_per_forward(monkeypatch):
    loss, routing = WeightedLoss({"name": "switch_balance", "weight": 1.0, "scope": "global"}), decision()
    asked = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    other = torch.tensor([3.0, 0, 0, 0], dtype=torch.float64)  # what the other ranks counted
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda load: asked.append(load.add_(other)))
    ctx, parts = Context(memory=Memory(), training=True), parts_at("layer")
    counts = routing.gates.ne(0).double().sum((0, 1)) + other
    expected = 4 * (counts / counts.sum() * routing.probs.mean((0, 1))).sum()
    for _ in range(2):  # the forward and the recompute
        torch.testing.assert_close(loss(routing, ctx, 1, parts), expected)
    assert len(asked) == 1
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    alone = loss(routing, Context(memory=Memory(), training=True), 1, parts)
    torch.testing.assert_close(alone, switch_balance(routing, NOBODY))


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (switch_balance, {"scope": "layer"}, "scope 'layer' is unknown; known: micro, sequence, global, pool"),
        (switch_balance, {"null": "no"}, "null 'no' is unknown; known: each, tied"),
        (variation, {"of": "size"}, "variation of 'size' is unknown"),
        (variation, {"noise": 0}, "needs noise > 0"),
        (weighted_l1, {"k": 0}, "needs k > 0"),
        (cardinality, {"k": 0.5}, "needs k >= 1"),
        (rsl, {"sign": "plus"}, "rsl sign 'plus' is unknown; known: specialise, spread"),
        (rsl, {"k": 0}, "rsl needs k >= 1"),
    ],
)
def test_wrong_options_are_named(loss, options, message):
    with pytest.raises(ConfigError, match=message):
        loss(decision(), NOBODY, **options)
