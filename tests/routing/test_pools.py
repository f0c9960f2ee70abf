"""Pools: a per-prompt decision reads prompt tokens only, and each pool is what it says."""

import pytest
import torch

from molora.routing.pools import pools, prompt_tokens
from molora.routing.router import Router
from molora.routing.types import Context


def bools(*rows):
    return torch.tensor(rows).bool()


# --- which tokens a decision per prompt may read ----------------------------------------------------------------------


def test_prompt_tokens_without_masks_are_all():
    assert prompt_tokens(torch.zeros(2, 3, 1), Context()).all()


def test_prompt_tokens_are_valid_and_of_the_prompt():
    valid, prompt = bools([0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]), bools([1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0])
    got = prompt_tokens(torch.zeros(2, 6, 1), Context(valid=valid, prompt=prompt))
    assert torch.equal(got, bools([0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]))


def test_a_row_without_prompt_reads_its_first_valid_token():
    valid, prompt = bools([0, 0, 1, 1], [1, 1, 1, 0]), bools([0, 0, 0, 0], [1, 0, 0, 0])
    got = prompt_tokens(torch.zeros(2, 4, 1), Context(valid=valid, prompt=prompt))
    assert torch.equal(got, bools([0, 0, 1, 0], [1, 0, 0, 0]))
    # prompt tokens that are all padding are none
    got = prompt_tokens(torch.zeros(2, 4, 1), Context(valid=valid, prompt=bools([1, 1, 0, 0], [1, 0, 0, 0])))
    assert torch.equal(got[0], torch.tensor([0, 0, 1, 0]).bool())


def test_a_row_of_padding_reads_one_position_so_that_everything_stays_finite():
    got = prompt_tokens(torch.zeros(1, 3, 1), Context(valid=bools([0, 0, 0])))
    assert torch.equal(got, bools([1, 0, 0]))


# --- pools ------------------------------------------------------------------------------------------------------------

INSIDE = bools([0, 1, 1, 0], [1, 1, 1, 1])


def test_mean_last_and_max_by_hand():
    x = torch.randn(2, 4, 3)
    assert torch.allclose(pools.build("mean", 3)(x, INSIDE)[0, 0], (x[0, 1] + x[0, 2]) / 2)
    assert torch.allclose(pools.build("mean", 3)(x, INSIDE)[1, 0], x[1].mean(0))
    assert torch.equal(pools.build("last", 3)(x, INSIDE)[:, 0], torch.stack([x[0, 2], x[1, 3]]))
    assert torch.equal(pools.build("max", 3)(x, INSIDE)[0, 0], torch.maximum(x[0, 1], x[0, 2]))
    assert torch.equal(pools.build("max", 3)(x, INSIDE)[1, 0], x[1].max(0).values)


def test_attention_pool_starts_as_the_mean_and_follows_its_query():
    pool, x = pools.build("attention", 3), torch.randn(2, 4, 3)
    torch.testing.assert_close(pool(x, INSIDE), pools.build("mean", 3)(x, INSIDE))
    with torch.no_grad():
        pool.query.normal_()
    weights = torch.softmax(torch.stack([x[0, 1] @ pool.query, x[0, 2] @ pool.query]) / 3**0.5, 0)
    torch.testing.assert_close(pool(x, INSIDE)[0, 0], weights[0] * x[0, 1] + weights[1] * x[0, 2])
    with torch.no_grad():
        pool.query.copy_(1000 * x[1, 2] / x[1, 2].norm())
    nearest = (x[1] @ x[1, 2]).argmax()
    torch.testing.assert_close(pool(x, INSIDE)[1, 0], x[1, nearest])


@pytest.mark.parametrize("name", list(pools))
def test_pools_read_only_what_is_inside(name):
    pool = pools.build(name, 3)
    for parameter in pool.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 4, 3)
    other = torch.where(INSIDE[..., None], x, 1e4 * torch.randn_like(x))
    torch.testing.assert_close(pool(other, INSIDE), pool(x, INSIDE))
    assert pool(x, INSIDE).shape == (2, 1, getattr(pool, "dim", 3))  # pools of another size say so


@pytest.mark.parametrize("name", list(pools))
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("amount", [1, 5])
def test_padding_side_and_amount_change_no_decision(name, side, amount):
    router = Router(6, 4, granularity="prompt", pool=name)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    x, prompt = torch.randn(2, 5, 6), bools([1, 1, 1, 0, 0], [1, 0, 0, 0, 0])
    valid = torch.ones(2, 5).bool()
    plain = router(x, Context(valid=valid, prompt=prompt)).gates
    junk, no = 1e3 * torch.randn(2, amount, 6), torch.zeros(2, amount).bool()

    def padded(t, filler):
        return torch.cat([filler, t] if side == "left" else [t, filler], 1)

    ctx = Context(valid=padded(valid, no), prompt=padded(prompt, ~no if side == "left" else no))
    torch.testing.assert_close(router(padded(x, junk), ctx).gates, plain)


@pytest.mark.parametrize("name", list(pools))
def test_the_answer_changes_no_decision(name):
    router = Router(6, 4, granularity="prompt", pool=name)
    x, prompt = torch.randn(2, 5, 6), bools([1, 1, 1, 0, 0], [1, 1, 0, 0, 0])
    plain = router(x, Context(prompt=prompt)).gates
    other = torch.where(prompt[..., None], x, torch.randn_like(x))
    assert torch.equal(router(other, Context(prompt=prompt)).gates, plain)
    without = router(x, Context()).gates  # everything counts as prompt
    assert not torch.allclose(without, plain)


@pytest.mark.parametrize("name", list(pools))
def test_a_row_of_padding_gives_finite_gates(name):
    router = Router(6, 4, granularity="prompt", pool=name)
    ctx = Context(valid=bools([0, 0, 0], [1, 1, 0]))
    assert torch.isfinite(router(torch.randn(2, 3, 6), ctx).gates).all()
