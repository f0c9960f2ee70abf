"""Selectors: who stays, what weighs them, how the weights are scaled, and what gradient reaches the router."""

import inspect
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molora.errors import ConfigError
from molora.routing.selectors import (
    entropy_switch,
    selectors,
    softmax,
    top_k,
    top_p,
    weigh,
)
from molora.routing.types import Context

NOBODY = Context()


def some_probs(experts=6, rows=4, length=5, sharpness=1.5):
    return torch.softmax(sharpness * torch.randn(rows, length, experts, dtype=torch.float64), -1)


def each_token(*tensors):
    return zip(*(t.reshape(-1, t.shape[-1]).tolist() for t in tensors), strict=True)


# --- top_k ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 5, 6])
@pytest.mark.parametrize("normalise", ["none", "sum1", "sumk"])
def test_top_k_is_a_sort(k, normalise):
    p = some_probs()
    for probs, gates in each_token(p, top_k(p, NOBODY, k=k, normalise=normalise)):
        best = sorted(range(6), key=lambda e: -probs[e])[:k]
        total = {"none": 1.0, "sum1": sum(probs[e] for e in best), "sumk": sum(probs[e] for e in best) / k}[normalise]
        assert gates == pytest.approx([probs[e] / total if e in best else 0.0 for e in range(6)])


def test_renormalised_top_k_is_a_softmax_over_the_chosen_scores():
    scores = torch.randn(4, 5, 6)
    gates = top_k(torch.softmax(scores, -1), NOBODY, k=3)
    chosen = scores.topk(3, -1).indices
    expected = torch.zeros_like(scores).scatter(-1, chosen, torch.softmax(scores.gather(-1, chosen), -1))
    torch.testing.assert_close(gates, expected)


def test_top_k_all_of_them_is_softmax():
    p = some_probs()
    torch.testing.assert_close(top_k(p, NOBODY, k=6), softmax(p, NOBODY))


def test_top_1_renormalised_teaches_the_router_nothing():
    scores = torch.randn(3, 4, 5, requires_grad=True)
    values = torch.randn(3, 4, 5)

    def gradient(**options):
        gates = top_k(torch.softmax(scores, -1), NOBODY, k=1, **options)
        return torch.autograd.grad((gates * values).sum(), scores, allow_unused=True)[0]

    assert gradient(normalise="sum1").abs().max() < 1e-7
    assert gradient(normalise="none").abs().max() > 1e-2
    assert gradient(normalise="sum1", grad="straight_through").abs().max() > 1e-2


def test_top_k_refuses_more_than_there_are_unless_clamped():
    p = some_probs(experts=3)
    for k in (4, 0, -1):
        with pytest.raises(ConfigError, match=f"1 <= k <= number of experts, got k={k} with 3"):
            top_k(p, NOBODY, k=k)
    torch.testing.assert_close(top_k(p, NOBODY, k=4, clamp=True), p)
    with pytest.raises(ConfigError):
        top_k(p, NOBODY, k=0, clamp=True)


# --- the price --------------------------------------------------------------------------------------------------------


def test_a_price_selects_and_does_not_weigh():
    p = some_probs()
    price = torch.tensor([0.9, 0.0, 0.0, 0.0, -0.9, 0.0], dtype=torch.float64)
    for probs, gates in each_token(p, top_k(p, NOBODY, k=2, normalise="none", price=price)):
        best = sorted(range(6), key=lambda e: -(probs[e] - float(price[e])))[:2]
        assert 4 in best and 0 not in best
        assert gates == pytest.approx([probs[e] if e in best else 0.0 for e in range(6)])


def test_a_price_that_changes_no_choice_changes_no_gate():
    p = some_probs()
    small = torch.full((6,), 0.3, dtype=torch.float64)  # the same for all
    assert torch.equal(top_k(p, NOBODY, k=3, price=small), top_k(p, NOBODY, k=3))


def test_a_biased_weight_can_turn_negative():
    """SMoRA's own form: with k = all and one bias of -0.9, that gate is below zero, and the sum is still k."""
    s = torch.tensor([[[0.6, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]]])
    price = torch.tensor([0.9, 0, 0, 0, 0, 0, 0, 0])
    gates = top_k(s, NOBODY, k=8, weight="biased", normalise="sumk", price=price)
    assert gates[0, 0, 0].item() == pytest.approx(8 * -0.3 / 3.2)
    assert gates.sum().item() == pytest.approx(8)


# --- weights and gradients --------------------------------------------------------------------------------------------


def test_constant_weights():
    gates = top_k(some_probs(), NOBODY, k=3, weight="const", omega=0.25, normalise="none")
    assert sorted(gates.unique().tolist()) == [0, 0.25]
    assert (gates != 0).sum(-1).eq(3).all()
    spread = gates.sum(-1) ** 2 / gates.square().sum(-1)
    torch.testing.assert_close(spread, torch.full_like(spread, 3.0))  # effective experts = k exactly


def test_straight_through_has_the_value_of_the_gate_and_the_gradient_of_the_prob():
    p = some_probs().requires_grad_()
    values = torch.randn_like(p)
    plain = top_k(p, NOBODY, k=1, weight="const", normalise="none")
    gates = top_k(p, NOBODY, k=1, weight="const", normalise="none", grad="straight_through")
    assert torch.equal(gates, plain)
    (grad,) = torch.autograd.grad((gates * values).sum(), p)
    torch.testing.assert_close(grad, values)


FUNCTIONS = [name for name in selectors if not inspect.isclass(selectors.get(name))]
WITH_GRAD = [name for name in FUNCTIONS if "grad" in selectors.options(name)]


@pytest.mark.parametrize("grad", ["none", "policy"])
@pytest.mark.parametrize("name", WITH_GRAD)
def test_no_gradient_on_request(name, grad):
    p = some_probs().requires_grad_()
    gates = selectors.get(name)(p, NOBODY, grad=grad)
    assert not gates.requires_grad
    soft = selectors.get(name)(p, NOBODY)
    assert soft.requires_grad
    torch.testing.assert_close(gates, soft.detach())


def test_soft_gradient_of_a_renormalised_choice():
    """On the chosen set gates are a softmax of scores, so the Jacobian is diag(g) - g g^T; others get nothing."""
    scores = torch.randn(1, 1, 5, dtype=torch.float64)

    def gates(scores):
        return top_k(torch.softmax(scores, -1), NOBODY, k=3)[0, 0]

    jacobian, g = torch.autograd.functional.jacobian(gates, scores)[:, 0, 0], gates(scores)
    torch.testing.assert_close(jacobian, torch.diag(g) - torch.outer(g, g))


@pytest.mark.parametrize("normalise", ["none", "sum1", "sumk"])
@pytest.mark.parametrize("weight", ["prob", "biased"])
def test_gradients_of_gates_against_finite_differences(normalise, weight):
    p = some_probs(experts=4, rows=2, length=3).requires_grad_()
    mask = torch.rand(2, 3, 4) < 0.6
    mask[0, 0], mask[1, 2] = True, False  # all, and none
    price = torch.tensor([0.05, 0.0, -0.1, 0.02], dtype=torch.float64)

    def gates(probs):
        return weigh(probs, mask, price, normalise=normalise, weight=weight)

    assert torch.autograd.gradcheck(gates, p)
    assert torch.autograd.gradgradcheck(gates, p)


def test_nothing_selected_stays_nothing():
    p = some_probs()
    none = torch.zeros_like(p, dtype=torch.bool)
    for normalise in ("none", "sum1", "sumk"):
        assert weigh(p, none, normalise=normalise).eq(0).all()


@pytest.mark.parametrize("name", WITH_GRAD)
def test_unknown_switches_are_named(name):
    with pytest.raises(ConfigError, match=r"grad='hard' is unknown; known: soft, straight_through, policy, none"):
        selectors.get(name)(some_probs(), NOBODY, grad="hard")


# --- top_p ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 9),
    st.floats(0, 1),
    st.sampled_from(["include", "exclude"]),
    st.integers(0, 3),
    st.integers(0, 10**6),
)
def test_top_p_is_the_shortest_prefix(experts, p, crossing, min_k, seed):
    generator = torch.Generator().manual_seed(seed)
    probs = torch.softmax(2 * torch.randn(1, 1, experts, generator=generator, dtype=torch.float64), -1)
    kept = top_p(probs, NOBODY, p=p, crossing=crossing, min_k=min_k).ne(0)[0, 0].tolist()
    order = sorted(range(experts), key=lambda e: -float(probs[0, 0, e]))
    expected, mass = [], 0.0
    for place, e in enumerate(order):
        inside = mass < p if crossing == "include" else mass + float(probs[0, 0, e]) <= p
        if p == 1 or inside or place < min_k:
            expected.append(e)
        mass += float(probs[0, 0, e])
    assert {e for e in range(experts) if kept[e]} == set(expected)


def test_top_p_reaches_its_mass_and_not_without_its_last():
    p = some_probs(experts=8)
    for probs, gates in each_token(p, top_p(p, NOBODY, p=0.6)):
        mass = sum(gates)
        assert mass >= 0.6
        assert mass - min(g for g in gates if g > 0) < 0.6
        assert all(g in (0, q) for g, q in zip(gates, probs, strict=True))  # not renormalised


def test_top_p_keeps_more_the_larger_p():
    p = some_probs(experts=8)
    counts = [top_p(p, NOBODY, p=v).ne(0).sum(-1) for v in (0.0, 0.3, 0.6, 0.9, 0.99, 1.0)]
    assert all((a <= b).all() for a, b in itertools.pairwise(counts))
    assert counts[0].eq(1).all() and counts[-1].eq(8).all()


def test_the_crossing_expert():
    p = torch.tensor([[[0.5, 0.3, 0.15, 0.05]]])

    def kept(**options):
        return top_p(p, NOBODY, p=0.75, **options).ne(0)[0, 0].tolist()

    assert kept() == [True, True, False, False]
    assert kept(crossing="exclude") == [True, False, False, False]
    assert kept(crossing="exclude", min_k=3) == [True, True, True, False]


def test_float32_running_sums_do_not_drop_the_last_expert():
    probs = torch.softmax(torch.randn(1, 20_000, 8), -1)
    naive = probs.sort(-1, descending=True).values.cumsum(-1) <= 1.0
    assert naive.all(-1).float().mean() < 0.98, "the trap must be there for this test to mean something"
    for crossing in ("include", "exclude"):
        assert top_p(probs, NOBODY, p=1.0, crossing=crossing).ne(0).all()
        assert entropy_switch(probs, NOBODY, threshold=1.0, p=1.0, crossing=crossing).ne(0).all()


@pytest.mark.parametrize("selector", [top_p, entropy_switch])
def test_top_p_names_wrong_options(selector):
    p = some_probs()
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ConfigError, match="needs 0 <= p <= 1"):
            selector(p, NOBODY, p=wrong)
    with pytest.raises(ConfigError, match="needs min_k >= 0"):
        selector(p, NOBODY, min_k=-1)
    with pytest.raises(ConfigError, match="crossing='both' is unknown; known: include, exclude"):
        selector(p, NOBODY, crossing="both")


# --- entropy_switch ---------------------------------------------------------------------------------------------------


def plain_entropy(probs, kind, q):
    n = len(probs)
    if kind == "shannon":
        return -sum(v * math.log(v) for v in probs) / math.log(n)
    if kind == "tsallis":
        return (1 - sum(v**q for v in probs)) / (1 - n ** (1 - q))
    return math.log(sum(v**q for v in probs)) / (1 - q) / math.log(n)


@pytest.mark.parametrize("kind", ["tsallis", "shannon", "renyi"])
def test_entropy_switch_is_dense_where_uncertain(kind):
    p = some_probs(length=40)
    seen = set()
    for probs, gates in each_token(p, entropy_switch(p, NOBODY, entropy=kind, q=1.3, threshold=0.8, p=0.7, min_k=1)):
        uncertain = plain_entropy(probs, kind, 1.3) > 0.8
        seen.add(uncertain)
        kept, mass = [], 0.0
        for place, e in enumerate(sorted(range(6), key=lambda e: -probs[e])):
            mass += probs[e]
            if uncertain or mass <= 0.7 or place < 1:
                kept.append(e)
        assert gates == pytest.approx([probs[e] if e in kept else 0.0 for e in range(6)])
    assert seen == {True, False}


def test_entropy_switch_at_its_ends():
    p = some_probs()
    assert torch.equal(entropy_switch(p, NOBODY, threshold=-1), p)
    assert torch.equal(entropy_switch(p, NOBODY, threshold=1.0, p=1.0), p)
    uniform = torch.full((1, 1, 6), 1 / 6)
    assert entropy_switch(uniform, NOBODY, threshold=0.99).ne(0).all()
    one_hot = torch.zeros(1, 1, 6).index_fill(-1, torch.tensor([2]), 1.0)
    assert torch.equal(entropy_switch(one_hot, NOBODY, threshold=1e-6), one_hot)


def test_entropy_switch_reads_shares_of_probs_that_do_not_sum_to_one():
    p = some_probs()
    scaled = 3.0 * p
    # the entropy is that of p; the nucleus is of the mass itself, so compare where all or min_k experts stay
    for threshold in (-1.0, 0.7):
        a = entropy_switch(p, NOBODY, threshold=threshold, p=0.0)
        b = entropy_switch(scaled, NOBODY, threshold=threshold, p=0.0)
        torch.testing.assert_close(b, 3.0 * a)


def test_unknown_entropy_is_named():
    with pytest.raises(ConfigError, match="entropy 'tsalis' is unknown; did you mean 'tsallis'"):
        entropy_switch(some_probs(), NOBODY, entropy="tsalis")


# --- what weighing keeps for backward ---------------------------------------------------------------------------------


def weighed_by_plain_autograd(probs, mask, sumk):
    gates = probs * mask
    total = gates.sum(-1, keepdim=True)
    gates = gates / torch.where(total == 0, torch.ones_like(total), total)
    return gates * mask.sum(-1, keepdim=True) if sumk else gates


@pytest.mark.parametrize("normalise", ["sum1", "sumk"])
def test_normalised_weights_have_the_gradients_of_plain_autograd(normalise):
    torch.manual_seed(0)
    values = torch.randn(3, 4, 5, dtype=torch.double)  # negative ones too, as a biased weight can be
    mask = torch.rand(3, 4, 5) > 0.4
    mask[0, 0] = False  # nothing selected
    values[1, 1], mask[1, 1] = 0.0, True  # everything selected weighs nothing
    cotangent, grads = torch.randn_like(values), []
    for run in (
        lambda v: weigh(v, mask, normalise=normalise),
        lambda v: weighed_by_plain_autograd(v, mask, normalise == "sumk"),
    ):
        leaf = values.clone().requires_grad_()
        gates = run(leaf)
        (first,) = torch.autograd.grad(gates, leaf, cotangent, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf)
        grads.append((gates, first, second))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_normalised_weights_keep_only_probs_and_the_selection():
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    probs = torch.randn(2, 64, 8).softmax(-1).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        selectors.get("top_k")(probs, Context(), k=2)
    assert sum(kept.values()) == probs.numel() * 4 + probs.numel()  # float32, and one byte of mask each
