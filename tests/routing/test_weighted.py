"""Losses as a config writes them: their weights, how decisions add up, and what is wrong with an entry."""

import pytest
import torch

from molora.routing import parts  # noqa: F401  (registers every loss)
from molora.routing.losses import importance, tsallis
from molora.routing.types import Context, Routing
from molora.routing.weighted import WeightedLoss, check_loss

NOBODY = Context()


def random_routing(rows=3, length=5, experts=4, k=2):
    scores = torch.randn(rows, length, experts, dtype=torch.float64)
    probs = torch.softmax(scores, -1)
    mask = torch.zeros_like(probs).scatter(-1, probs.topk(k, -1).indices, 1.0)
    return Routing(scores, probs, probs * mask)


def test_mean_and_sum_over_decisions():
    routing = random_routing()
    plain = importance(routing, NOBODY)
    mean = WeightedLoss({"name": "importance", "weight": 0.5})
    total = WeightedLoss({"name": "importance", "weight": 0.5, "over": "sum"})
    torch.testing.assert_close(mean(routing, NOBODY, 4), 0.5 * plain / 4)
    torch.testing.assert_close(total(routing, NOBODY, 4), 0.5 * plain)


def test_weights_and_options_follow_schedules():
    routing = random_routing()
    loss = WeightedLoss(
        {
            "name": "tsallis",
            "weight": {"schedule": "linear", "from": 0.0, "to": 2.0},
            "q": {"schedule": "linear", "from": 1.0, "to": 3.0},
        }
    )
    for progress in (0.0, 0.25, 1.0):
        expected = 2 * progress * tsallis(routing, NOBODY, q=1 + 2 * progress)
        torch.testing.assert_close(loss(routing, Context(progress=progress), 1), expected)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("switch_balance", "must be a mapping with a 'name' and a 'weight'"),
        ({"name": "switch_balance"}, "needs a 'weight'"),
        ({"name": "swich_balance", "weight": 1}, "loss 'swich_balance' is unknown; did you mean 'switch_balance'"),
        ({"name": "tsallis", "weight": 1, "order": 2}, "loss 'tsallis' has no option 'order'"),
        ({"name": "tsallis", "weight": 1, "over": "max"}, "over 'max' is unknown; known: mean, sum"),
        ({"name": "tsallis", "weight": "much"}, "'much' is neither a number nor a schedule"),
        ({"name": "tsallis", "weight": True}, "True is neither a number nor a schedule"),
        ({"name": "tsallis", "weight": 1, "q": -1}, "order q of an entropy must be a positive number"),
        ({"name": "switch_balance", "weight": 1, "load": "tokens"}, "load 'tokens' is unknown"),
        ({"name": "entropy", "weight": {"schedule": "liner", "from": 1, "to": 0}}, "did you mean 'linear'"),
    ],
)
def test_wrong_entries_are_named(spec, message):
    assert message in "\n".join(check_loss(spec))


def test_a_good_entry_has_no_problem():
    assert check_loss({"name": "tsallis", "weight": 1e-2, "q": 2, "level": "batch", "over": "sum"}) == []
