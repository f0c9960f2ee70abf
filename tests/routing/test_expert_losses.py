"""Losses that read experts and routers: coupling, diversity, orthogonality, match; against loops over the experts."""

import math

import pytest
import torch
from torch.nn import functional as F

import molora
from molora.errors import ConfigError
from molora.experts.bank import ExpertBank
from molora.routing.expert_losses import (
    _noise_within_cells,
    diversity,
    expert_router_coupling,
    match,
    orthogonality,
)
from molora.routing.losses import Parts
from molora.routing.router import Router
from molora.routing.types import Context, Routing
from molora.routing.weighted import WeightedLoss
from tests.tiny import tiny_llama

NOBODY = Context()
D, E = 6, 3


def parts_of(ranks=(2, 2, 2), form="lora", hidden=None, num=E, **options):
    router = Router(D, num, **options)
    bank = ExpertBank(D, 5, ranks, form=form)
    for parameter in (*router.parameters(), *bank.parameters()):
        torch.nn.init.normal_(parameter)
    router.reads(bank)
    return Parts(router, torch.randn(2, 4, D) if hidden is None else hidden)


def coupling(parts, ctx=NOBODY, **options):
    return expert_router_coupling(parts.router(parts.hidden, ctx), ctx, parts=parts, **options)


# --- coupling ---------------------------------------------------------------------------------------------------------


def coupling_in_loops(rows, downs, alpha):
    n = len(rows)
    M = [[float((A.double() @ row.double()).norm()) for A in downs] for row in rows]
    total = 0.0
    for i in range(n):
        for j in range(n):
            if i != j:
                total += max(0.0, M[i][j] - alpha * M[i][i]) + max(0.0, M[j][i] - alpha * M[i][i])
    return total / n**2


@pytest.mark.proves("expert_router_coupling")
@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 3, 2), (1, 1, 1)])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_coupling_against_loops(ranks, alpha):
    parts = parts_of(ranks)
    downs = [parts.router.bank.pair(e)[0] for e in range(E)]
    expected = coupling_in_loops(parts.router.scorer.weight.detach(), downs, alpha)
    assert coupling(parts, alpha=alpha).item() == pytest.approx(expected, rel=1e-5)


def aligned():
    """Rows of the router along the axes, and experts that answer their own axis twice as strong as any other."""
    parts = parts_of(ranks=(1, 1, 1))
    with torch.no_grad():
        parts.router.scorer.weight.copy_(torch.eye(E, D))
        parts.router.bank.A.copy_(torch.eye(E, D) + 0.5 * (torch.ones(E, D) - torch.eye(E, D)))
    return parts


@pytest.mark.proves("expert_router_coupling")
def test_coupling_is_zero_iff_the_diagonal_dominates():
    parts = aligned()
    assert coupling(parts).item() == 0
    assert coupling(parts, alpha=0.5).item() == pytest.approx(0, abs=1e-7)
    # M is 1 on the diagonal and 1/2 elsewhere: below that alpha, each of the 6 pairs pays twice
    assert coupling(parts, alpha=0.4).item() == pytest.approx(6 * 2 * 0.1 / 9)
    with torch.no_grad():
        parts.router.bank.A[0, 1] = 1.25  # expert 0 answers row 1 stronger than expert 1 does, and than its own row
    # M_10 > M_11 is one violation of row 1, M_10 > M_00 one of column 0
    assert coupling(parts).item() == pytest.approx((0.25 + 0.25) / 9)


@pytest.mark.proves("expert_router_coupling")
def test_coupling_grows_with_the_scale_of_a():
    parts = parts_of()
    value = coupling(parts).item()
    with torch.no_grad():
        parts.router.bank.A.mul_(3)
    assert coupling(parts).item() == pytest.approx(3 * value, rel=1e-5)


@pytest.mark.proves("expert_router_coupling")
def test_noise_leaves_each_row_in_its_own_cell():
    parts = parts_of()
    rows = parts.router.scorer.weight.detach()
    for _ in range(200):
        moved = rows * _noise_within_cells(parts.router.scorer.weight, Context(training=True), parts.router)
        assert torch.equal(torch.cdist(moved, rows).argmin(1), torch.arange(E))
        assert not torch.equal(moved, rows)


@pytest.mark.proves("expert_router_coupling")
def test_noise_acts_in_training_only_and_can_be_switched_off():
    parts = parts_of()
    plain, training = coupling(parts).item(), Context(training=True)
    assert coupling(parts, training, noise=False).item() == plain
    draws = {coupling(parts, training).item() for _ in range(5)}
    assert len(draws) == 5 and plain not in draws


@pytest.mark.proves("expert_router_coupling")
def test_descent_on_the_coupling_makes_experts_and_rows_agree():
    torch.manual_seed(0)
    parts = parts_of()
    learned = [parts.router.scorer.weight, parts.router.bank.A]
    optimizer = torch.optim.Adam(learned, lr=0.02)
    assert coupling(parts).item() > 0.1
    for _ in range(150):
        optimizer.zero_grad()
        coupling(parts, Context(training=True)).backward()
        optimizer.step()
    downs = [parts.router.bank.pair(e)[0] for e in range(E)]
    M = torch.stack([torch.stack([(A @ row).norm() for A in downs]) for row in parts.router.scorer.weight.detach()])
    assert torch.equal(M.argmax(0), torch.arange(E)) and torch.equal(M.argmax(1), torch.arange(E))
    assert M.diagonal().min() > 0.1  # not by shrinking to nothing


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scorer": {"name": "mlp"}}, "needs a scorer with one row per expert"),
        ({"experts": {"form": "shared_a", "num": 4}}, "have one A"),
        ({"experts": {"form": "module"}, "share": "block"}, "whole layers"),
    ],
)
def test_coupling_says_at_once_where_it_cannot_work(changes, message):
    with pytest.raises(ConfigError, match=f"loss 'expert_router_coupling': .*{message}"):
        molora.wrap(tiny_llama(), {}, losses=[{"name": "expert_router_coupling", "weight": 1}], **changes)


def test_router_that_stands_alone():
    router = Router(D, E)
    loss = WeightedLoss({"name": "diversity", "weight": 1.0})
    assert "stands alone" in loss.why_not(router)


# --- diversity --------------------------------------------------------------------------------------------------------


def diversity_in_loops(parts, routing):
    total, count = 0.0, 0
    for row in range(2):
        for t in range(4):
            chosen = [e for e in range(E) if routing.gates[row, t, e] != 0]
            if len(chosen) < 2:
                continue
            outs = []
            for e in chosen:
                A, B = (p.double() for p in parts.router.bank.pair(e))
                outs.append(B @ (A @ parts.hidden[row, t].double()))
            pairs = [F.cosine_similarity(a, b, dim=0) for i, a in enumerate(outs) for b in outs[i + 1 :]]
            total, count = total + float(sum(pairs)) / len(pairs), count + 1
    return total / count


@pytest.mark.parametrize(
    ("form", "ranks"), [("lora", (2, 2, 2)), ("lora", (1, 3, 2)), ("rank", (1, 1, 1)), ("shared_a", (2, 2, 2))]
)
@pytest.mark.parametrize("k", [2, 3])
def test_diversity_against_the_outputs_themselves(form, ranks, k):
    parts = parts_of(ranks, form, selector={"name": "top_k", "k": k})
    routing = parts.router(parts.hidden, NOBODY)
    assert diversity(routing, NOBODY, parts=parts).item() == pytest.approx(diversity_in_loops(parts, routing), abs=1e-5)


def test_diversity_bounds_and_fresh_experts():
    parts = parts_of()
    routing = parts.router(parts.hidden, NOBODY)
    for e in range(E):  # the same expert three times
        parts.router.bank.write(e, *parts.router.bank.pair(0))
    assert diversity(routing, NOBODY, parts=parts).item() == pytest.approx(1, abs=1e-5)
    parts = parts_of(ranks=(1, 1, 1), hidden=torch.ones(1, 1, D))
    with torch.no_grad():  # three directions at 120 degrees: the least that three cosines can sum to
        parts.router.bank.A.fill_(1.0)
        angles = torch.tensor([0, 2, 4]) * math.pi / 3
        parts.router.bank.Bt.zero_()
        parts.router.bank.Bt[:, 0], parts.router.bank.Bt[:, 1] = angles.cos(), angles.sin()
    routing = parts.router(parts.hidden, NOBODY)
    assert diversity(routing, NOBODY, parts=parts).item() == pytest.approx(-1 / 2, abs=1e-5)
    parts.router.bank.Bt.data.zero_()
    value = diversity(routing, NOBODY, parts=parts)
    (grad,) = torch.autograd.grad(value, parts.router.bank.Bt)
    assert value.item() == 0 and torch.isfinite(grad).all()


def test_orthogonality_of_what_experts_read():
    parts = parts_of()
    routing = parts.router(parts.hidden, NOBODY)
    A = [F.normalize(parts.router.bank.pair(e)[0].double(), dim=-1) for e in range(E)]
    expected = sum(((A[i] @ A[j].t()) ** 2).sum().item() for i in range(E) for j in range(E) if i != j) / (
        E * (E - 1) * 4
    )
    assert orthogonality(routing, NOBODY, parts=parts).item() == pytest.approx(expected, rel=1e-5)
    parts.router.bank.A.data.copy_(torch.eye(D))
    assert orthogonality(routing, NOBODY, parts=parts).item() == 0
    parts.router.bank.A.data.copy_(torch.eye(D)[[0, 1, 0, 1, 0, 1]])  # all read the same two directions
    assert orthogonality(routing, NOBODY, parts=parts).item() == pytest.approx(1 / 2)


# --- match ------------------------------------------------------------------------------------------------------------


def test_match_of_three_kinds():
    probs = torch.softmax(torch.randn(2, 3, 4, dtype=torch.float64), -1).requires_grad_()
    target = torch.rand(2, 3, 4, dtype=torch.float64)
    wanted = target / target.sum(-1, keepdim=True)
    routing = Routing(probs, probs, probs, notes={"target": target, "other": probs.detach()})
    flat = probs.flatten(0, 1)
    references = {
        "mse": F.mse_loss(probs, wanted),
        "ce": F.nll_loss(flat.log(), wanted.flatten(0, 1).argmax(-1)),
        "kl": F.kl_div(flat.log(), wanted.flatten(0, 1), reduction="batchmean"),
    }
    for kind, expected in references.items():
        torch.testing.assert_close(match(routing, NOBODY, kind=kind), expected)
    for kind in ("mse", "kl"):
        assert match(routing, NOBODY, target="other", kind=kind).item() == pytest.approx(0, abs=1e-12)
    assert match(routing, NOBODY, target="none").item() == 0
    with pytest.raises(ConfigError, match="match kind 'l1' is unknown; known: mse, ce, kl"):
        match(routing, NOBODY, kind="l1")


def test_match_gives_its_target_no_gradient():
    target = torch.rand(1, 2, 3, requires_grad=True)
    probs = torch.softmax(torch.randn(1, 2, 3, requires_grad=True), -1)
    value = match(Routing(probs, probs, probs, notes={"target": target}), NOBODY)
    (grad,) = torch.autograd.grad(value, target, allow_unused=True)
    assert grad is None
