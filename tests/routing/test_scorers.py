"""Scorers against plain loops, and what their options mean."""

import math

import pytest
import torch
from torch import nn

from molora.errors import ConfigError, RoutingError
from molora.registry import Registry
from molora.routing.scorers import ACTIVATIONS, MLP, Constant, Cosine, Linear, Rational, Table, scorers
from molora.routing.types import Context

NOBODY = Context()


def test_linear_is_a_dot_product_per_expert():
    scorer, x = Linear(5, 3, bias=True).double(), torch.randn(2, 4, 5, dtype=torch.float64)
    nn.init.normal_(scorer.bias)
    got = scorer(x, NOBODY)
    for b in range(2):
        for s in range(4):
            for e in range(3):
                expected = sum(float(scorer.weight[e, i]) * float(x[b, s, i]) for i in range(5)) + float(scorer.bias[e])
                assert got[b, s, e].item() == pytest.approx(expected)


def test_linear_has_no_bias_by_default_and_starts_like_nn_linear():
    scorer = Linear(400, 100)
    assert [name for name, _ in scorer.named_parameters()] == ["weight"]
    bound = 1 / math.sqrt(400)  # kaiming_uniform with a = sqrt(5)
    assert scorer.weight.abs().max() <= bound
    assert scorer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_linear_starts_normal_on_request():
    assert Linear(400, 100, init=0.02).weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert Linear(4, 2, init=0.0).weight.eq(0).all()


@pytest.mark.parametrize("init", ["xavier", -1, True, None])
def test_wrong_init(init):
    with pytest.raises(ConfigError, match=r"init .* is unknown; write 'kaiming' or a standard deviation"):
        Linear(4, 2, init=init)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activation_comes_first(activation):
    scorer, x = Linear(6, 3, activation=activation), torch.randn(2, 3, 6)
    torch.testing.assert_close(scorer(x, NOBODY), scorer.activation(x) @ scorer.weight.T)


def test_unknown_activation():
    with pytest.raises(ConfigError, match="activation 'swish' is unknown; known: gelu"):
        Linear(4, 2, activation="swish")


def test_rational_is_its_definition():
    act = Rational().double()
    nn.init.normal_(act.a)
    nn.init.normal_(act.b)
    assert (act.a.numel(), act.b.numel()) == (7, 5)  # degrees 6 and 5
    for x in torch.randn(20, dtype=torch.float64):
        v = float(x)
        top = sum(float(a) * v**j for j, a in enumerate(act.a))
        bottom = 1 + abs(sum(float(b) * v ** (j + 1) for j, b in enumerate(act.b)))
        assert act(x).item() == pytest.approx(top / bottom)


def test_rational_starts_as_the_identity_and_learns():
    act, x = Rational(), torch.randn(50)
    torch.testing.assert_close(act(x), x)
    act(x).sum().backward()
    # at b = 0: d/da_j = sum x^j, and d/db_i = -sum x x^i, with 1 as the slope of |.| at 0, since 0 would keep b there
    torch.testing.assert_close(act.a.grad, torch.stack([(x**j).sum() for j in range(7)]))
    torch.testing.assert_close(act.b.grad, torch.stack([-(x * x**i).sum() for i in range(1, 6)]))
    with torch.no_grad():
        act.b -= 0.01 * act.b.grad
    assert act.b.abs().min() > 0


def test_cosine_is_the_cosine_over_the_temperature():
    scorer, x = Cosine(6, 3, temperature=0.25), torch.randn(2, 4, 6)
    for e in range(3):
        expected = torch.cosine_similarity(x, scorer.weight[e].expand_as(x), dim=-1) / 0.25
        torch.testing.assert_close(scorer(x, NOBODY)[..., e], expected)


@pytest.mark.parametrize("bottleneck", [None, 4])
def test_cosine_ignores_the_length_of_the_input(bottleneck):
    scorer, x = Cosine(6, 3, bottleneck=bottleneck), torch.randn(2, 4, 6)
    torch.testing.assert_close(scorer(37.0 * x, NOBODY), scorer(x, NOBODY), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(scorer(-x, NOBODY), scorer(x, NOBODY))
    zero = scorer(torch.zeros(1, 1, 6), NOBODY)
    assert torch.isfinite(zero).all()


def test_cosine_with_bottleneck_compares_projections():
    scorer, x = Cosine(6, 3, bottleneck=4, temperature=1.0), torch.randn(2, 5, 6)
    projected = x @ scorer.project.T
    expected = torch.cosine_similarity(projected[..., None, :], scorer.weight, dim=-1)
    torch.testing.assert_close(scorer(x, NOBODY), expected)


def test_cosine_of_temperature_one_cannot_decide():
    """At best one expert is aligned and the seven others opposite: e / (e + 7 / e) = 0.51."""
    scorer = Cosine(6, 8, temperature=1.0)
    direction = torch.randn(6)
    with torch.no_grad():
        scorer.weight.copy_(-direction.expand(8, 6))
        scorer.weight[3] = direction
    best = torch.softmax(scorer(direction.expand(1, 1, 6), NOBODY), -1).max().item()
    assert best == pytest.approx(math.e / (math.e + 7 / math.e), abs=1e-5)
    assert best < 0.52


def test_cosine_temperature_can_be_learned_and_is_otherwise_fixed():
    fixed, learned = Cosine(6, 3), Cosine(6, 3, learn_temperature=True)
    assert "log_temperature" not in dict(fixed.named_parameters())
    learned(torch.randn(2, 3, 6), NOBODY).square().sum().backward()
    assert learned.log_temperature.grad.abs() > 0
    assert learned.log_temperature.item() == pytest.approx(math.log(0.07))
    with pytest.raises(ConfigError, match="temperature must be positive"):
        Cosine(6, 3, temperature=0)


def test_mlp_is_two_maps():
    scorer, x = MLP(6, 3, hidden=5, activation="relu"), torch.randn(2, 4, 6)
    W1, b1, W2, b2 = (p.detach() for p in (*scorer.inner.parameters(), *scorer.outer.parameters()))
    for b in range(2):
        for s in range(4):
            inner = [max(0.0, float(W1[j] @ x[b, s] + b1[j])) for j in range(5)]
            expected = [sum(float(W2[e, j]) * inner[j] for j in range(5)) + float(b2[e]) for e in range(3)]
            assert scorer(x, NOBODY)[b, s].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("learn", [True, False])
def test_constant_reads_nothing(learn):
    scorer = Constant(6, 3, learn=learn)
    assert scorer(torch.randn(2, 4, 6), NOBODY).eq(0).all()
    assert len(list(scorer.parameters())) == int(learn)
    if learn:
        nn.init.normal_(scorer.weight)
        got = scorer(torch.randn(2, 4, 6), NOBODY)
        assert got.shape == (2, 4, 3) and (got == scorer.weight).all()


# --- by task ----------------------------------------------------------------------------------------------------------


def test_table_looks_rows_up():
    scorer = Table(6, 3, num_tasks=4)
    assert scorer.weight.abs().max() <= 1e-3
    nn.init.normal_(scorer.weight)
    got = scorer(torch.randn(3, 5, 6), Context(task_ids=torch.tensor([2, 0, 2])))
    assert got.shape == (3, 1, 3)
    assert torch.equal(got[:, 0], scorer.weight[[2, 0, 2]])


def test_table_gives_an_unknown_task_the_mean_row():
    scorer = Table(6, 3, num_tasks=4)
    nn.init.normal_(scorer.weight)
    got = scorer(torch.randn(2, 5, 6), Context(task_ids=torch.tensor([-1, 3])))
    torch.testing.assert_close(got[0, 0], torch.stack([scorer.weight[t] for t in range(4)]).mean(0))
    assert torch.equal(got[1, 0], scorer.weight[3])


def test_table_spreads_one_id_over_the_batch_and_trains_only_its_row():
    scorer = Table(6, 3, num_tasks=4)
    got = scorer(torch.randn(2, 5, 6), Context(task_ids=torch.tensor([1])))
    assert got.shape == (2, 1, 3)
    got.sum().backward()
    assert scorer.weight.grad.abs().sum(-1).ne(0).tolist() == [False, True, False, False]


def test_table_says_what_is_missing_or_wrong():
    scorer, x = Table(6, 3, num_tasks=4), torch.randn(3, 5, 6)
    with pytest.raises(RoutingError, match="no task_ids reached the forward"):
        scorer(x, NOBODY)
    with pytest.raises(RoutingError, match="2 ids for a batch of 3"):
        scorer(x, Context(task_ids=torch.tensor([0, 1])))
    with pytest.raises(RoutingError, match="task id 4 is out of range; this adapter knows 4"):
        scorer(x, Context(task_ids=torch.tensor([0, 4, 1])))


# --- the registry -----------------------------------------------------------------------------------------------------


def test_registry_names_what_is_wrong():
    assert isinstance(scorers, Registry)
    with pytest.raises(ConfigError, match="scorer 'liner' is unknown; did you mean 'linear'"):
        scorers.build("liner", 4, 2)
    with pytest.raises(ConfigError, match="scorer 'linear' has no option 'biass'; did you mean 'bias'"):
        scorers.build({"name": "linear", "biass": True}, 4, 2)
    with pytest.raises(ConfigError, match="scorer 'table' needs the option 'num_tasks'"):
        scorers.build("table", 4, 2)
