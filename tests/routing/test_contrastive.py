"""The contrast of prototypes and tokens (RCL): its corners, and where it does not apply."""

import math

import pytest
import torch
from torch.nn import functional as F

from molora.errors import ConfigError, RoutingError
from molora.routing.contrastive import prototype_contrast
from molora.routing.losses import Parts
from molora.routing.router import Router
from molora.routing.types import Context

TOP_1 = {"name": "top_k", "k": 1, "normalise": "none"}


def loss_of(router, x, ctx=None, **options):
    ctx = ctx or Context()
    return prototype_contrast(router(x, ctx), ctx, parts=Parts(router, x), **options)


def router_with(prototypes, **options):
    router = Router(prototypes.shape[1], len(prototypes), scorer={"name": "cosine", **options}, selector=TOP_1)
    router.scorer.weight.data.copy_(prototypes)
    return router


def test_it_is_zero_when_prototypes_are_orthogonal_and_tokens_lie_on_them():
    router = router_with(torch.eye(6))
    assert float(loss_of(router, 3 * torch.eye(6)[None], temperature=0.01)) == pytest.approx(0, abs=1e-6)
    assert float(loss_of(router, torch.eye(6)[None], temperature=1.0)) == pytest.approx(
        math.log(1 + 5 * math.exp(-1)), abs=1e-5
    )  # 1 against five cosines of 0


def test_it_is_the_logarithm_of_the_experts_in_use_when_nothing_tells_them_apart():
    router = router_with(torch.ones(5, 4) + 1e-6 * torch.randn(5, 4))
    x = torch.ones(1, 40, 4) + 1e-3 * torch.randn(1, 40, 4)
    used = len(router(x, Context()).gates.argmax(-1).unique())
    assert used > 1
    assert float(loss_of(router, x)) == pytest.approx(math.log(used), abs=1e-3)


def test_fewer_than_two_experts_in_use_make_zero_with_a_finite_gradient():
    router = router_with(torch.eye(4))
    x = torch.eye(4)[:1].expand(1, 5, 4).clone().requires_grad_()
    loss = loss_of(router, x)
    loss.backward()
    assert float(loss) == 0.0 and torch.isfinite(router.scorer.weight.grad).all() and torch.isfinite(x.grad).all()


def test_padding_does_not_count_and_the_projected_space_is_compared():
    router = Router(6, 4, scorer={"name": "cosine", "bottleneck": 3}, selector=TOP_1)
    x = torch.randn(2, 7, 6)
    valid = torch.rand(2, 7) < 0.6
    ctx = Context(valid=valid)
    loss = loss_of(router, x, ctx, temperature=1.0)
    junk = torch.where(valid[..., None], x, 100 * torch.randn(2, 7, 6))
    torch.testing.assert_close(loss_of(router, junk, ctx, temperature=1.0), loss)
    tokens = F.linear(x, router.scorer.project)[valid]
    chosen = router(x, ctx).gates.argmax(-1)[valid]
    centres = {int(e): tokens[chosen == e].mean(0) for e in chosen.unique()}
    terms = []
    for e in centres:
        alike = {f: float(F.cosine_similarity(router.scorer.weight[e], c, dim=0)) for f, c in centres.items()}
        terms.append(math.log(sum(math.exp(v) for v in alike.values())) - alike[e])
    assert len(terms) > 1 and float(loss) == pytest.approx(sum(terms) / len(terms), rel=1e-4)


def test_descending_it_moves_prototypes_to_their_tokens():
    torch.manual_seed(3)
    centres = 3 * torch.eye(4)
    x = (centres[torch.arange(40) % 4] + 0.3 * torch.randn(40, 4))[None]
    router = router_with(centres + torch.randn(4, 4))

    def nearness():
        rows, tokens = F.normalize(router.scorer.weight, dim=-1), F.normalize(centres, dim=-1)
        return float((rows * tokens).sum(-1).min())

    before, optimizer = nearness(), torch.optim.Adam(router.parameters(), lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        loss_of(router, x, temperature=1.0).backward()
        optimizer.step()
    assert nearness() > before + 0.08


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scorer": "mlp"}, "needs scorer: cosine .*not mlp"),
        ({"scorer": "cosine", "feature": "similarity"}, "and no feature"),
        ({"scorer": "cosine", "granularity": "prompt"}, "set granularity: token"),
    ],
)
def test_it_says_where_it_does_not_apply(options, message):
    with pytest.raises(RoutingError, match=message):
        loss_of(Router(6, 4, **options), torch.randn(2, 3, 6))


def test_the_temperature_must_be_positive():
    with pytest.raises(ConfigError, match="positive temperature, got 0"):
        loss_of(router_with(torch.eye(4)), torch.randn(1, 3, 4), temperature=0)
