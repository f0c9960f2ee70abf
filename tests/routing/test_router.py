"""Router: float32 inside, granularity, what cannot work, copies."""

import copy
import pickle

import pytest
import torch

from molora.errors import ConfigError
from molora.routing.router import Router
from molora.routing.types import Context

# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_everything_is_float32_whatever_comes_in(dtype):
    router = Router(8, 4, selector="top_k")
    x = torch.randn(2, 3, 8).to(dtype)
    routing = router(x, Context())
    assert {routing.scores.dtype, routing.probs.dtype, routing.gates.dtype} == {torch.float32}
    torch.testing.assert_close(routing.gates, router(x.float(), Context()).gates, rtol=0, atol=0)


def test_autocast_does_not_reach_inside():
    router = Router(64, 8)
    x = 10 * torch.randn(2, 3, 64)
    plain = router(x, Context()).gates
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x.mT).dtype == torch.bfloat16  # autocast is on
        inside = router(x, Context()).gates
    assert torch.equal(inside, plain)


def test_shapes():
    x = torch.randn(2, 3, 8)
    assert Router(8, 4)(x, Context()).gates.shape == (2, 3, 4)
    assert Router(8, 4, granularity="prompt")(x, Context()).gates.shape == (2, 1, 4)
    by_task = Router(8, 4, granularity="task", scorer={"name": "table", "num_tasks": 2})
    assert by_task(x, Context(task_ids=torch.tensor([0, 1]))).gates.shape == (2, 1, 4)


def test_selected_and_detach():
    routing = Router(8, 4, selector="top_k")(torch.randn(2, 3, 8), Context())
    assert routing.num_experts == 4 and routing.selected.sum(-1).eq(2).all()
    assert routing.gates.requires_grad and not routing.detach().gates.requires_grad


def test_schedules_follow_progress():
    router = Router(
        8,
        4,
        link={"name": "softmax", "temperature": {"schedule": "linear", "from": 1.0, "to": 0.1}},
        selector={"name": "top_k", "k": {"schedule": "linear", "from": 4, "to": 1}, "normalise": "none"},
    )
    x = torch.randn(2, 3, 8)
    start, end = router(x, Context(progress=0.0)), router(x, Context(progress=1.0))
    torch.testing.assert_close(start.gates, torch.softmax(start.scores, -1))
    assert end.selected.sum(-1).eq(1).all()
    torch.testing.assert_close(end.probs, torch.softmax(end.scores / 0.1, -1))


# --- construction and copies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selector": {"name": "top_k", "k": 5}}, "got k=5 with 4"),
        ({"selector": {"name": "top_k", "k": {"schedule": "linear", "from": 2, "to": 6}}}, "got k=6 with 4"),
        ({"selector": {"name": "top_p", "p": 2}}, "needs 0 <= p <= 1"),
        ({"selector": {"name": "entropy_switch", "q": 0}}, "order q of an entropy"),
        ({"selector": {"name": "top_k", "weight": "probability"}}, "weight='probability' is unknown"),
        ({"link": {"name": "softmax", "temperature": 0}}, "temperature must be positive"),
        (
            {"link": {"name": "softmax", "temperature": {"schedule": "linear", "from": 1, "to": 0}}},
            "temperature must be",
        ),
        ({"scorer": {"name": "cosine", "temperature": -1}}, "temperature must be positive"),
        ({"granularity": "prompt", "pool": "median"}, "pool 'median' is unknown"),
    ],
)
def test_what_cannot_work_fails_at_once(options, message):
    with pytest.raises(ConfigError, match=message):
        Router(8, 4, **options)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
def test_copies_decide_alike(copied):
    router = Router(
        8,
        4,
        link={"name": "softmax", "temperature": {"schedule": "cosine", "from": 1.0, "to": 0.1}},
        selector={"name": "top_k", "k": 2},
        price="sign",
    )
    x = torch.randn(2, 3, 8)
    router.price.observe(router(x, Context()).selected, torch.ones(2, 3))
    router.price.settle()
    assert torch.equal(copied(router)(x, Context(progress=0.3)).gates, router(x, Context(progress=0.3)).gates)


def test_context_drops_masks_of_other_inputs():
    ctx = Context(valid=torch.ones(2, 5).bool(), prompt=torch.ones(2, 5).bool(), progress=0.5)
    x = torch.zeros(2, 5, 3)
    assert ctx.fit(x) is ctx
    other = ctx.fit(torch.zeros(2, 4, 3))
    assert other.valid is None and other.prompt is None and other.progress == 0.5
    assert torch.equal(other.weights(torch.zeros(2, 4, 6)), torch.ones(2, 4))
