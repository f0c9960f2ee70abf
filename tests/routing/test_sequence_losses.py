"""Losses of neighbouring tokens: closed forms, loops over documents of any length, padding anywhere."""

import math

import pytest
import torch

from molora.errors import ConfigError
from molora.routing.sequence_losses import chunk, locality
from molora.routing.types import Context, Routing

NOBODY = Context()


def routing_of(probs, scores=None):
    probs = torch.as_tensor(probs, dtype=torch.float64)
    return Routing(probs if scores is None else scores, probs, probs)


@pytest.mark.proves("blockffn")
def test_locality_is_zero_where_neighbours_agree_with_saturated_switches():
    signs = torch.tensor([[1.0, -1.0, 1.0], [1.0, -1.0, 1.0], [1.0, -1.0, 1.0]], dtype=torch.float64)[None]
    assert locality(routing_of(signs, signs), NOBODY).item() == pytest.approx(0, abs=1e-30)
    flipped = signs * torch.tensor([1.0, -1.0, 1.0])[None, :, None]  # every switch is thrown at each step
    assert locality(routing_of(signs, flipped), NOBODY).item() == pytest.approx(100)
    nothing = torch.zeros(2, 5, 4)
    assert locality(routing_of(nothing, nothing), NOBODY).item() == pytest.approx(math.log(2))
    noise = torch.randn(4, 4000, 8, generator=torch.Generator().manual_seed(1))
    # half of E max(0, -100 z), plus half of E max(0, 100 z): 100 / sqrt(2 pi)
    assert locality(routing_of(noise, noise), NOBODY).item() == pytest.approx(100 / math.sqrt(2 * math.pi), rel=0.02)


@pytest.mark.proves("blockffn")
def test_locality_against_bce_in_loops():
    scores = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    valid = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 1, 1]]).bool()
    terms = []
    for row, t in [(0, 2), (0, 3), (1, 1), (1, 4)]:  # neighbours of which both are there
        a, b = torch.sigmoid(2 * scores[row, t - 1]), torch.sigmoid(2 * scores[row, t])
        terms.append(torch.nn.functional.binary_cross_entropy(a, b))
    expected = torch.stack(terms).mean()
    value = locality(routing_of(scores.detach(), scores), Context(valid=valid), sharpness=2.0)
    torch.testing.assert_close(value, expected)
    grads = [torch.autograd.grad(v, scores, retain_graph=True)[0] for v in (value, expected)]
    torch.testing.assert_close(*grads)  # both sides get one
    assert grads[0][0, 3].abs().max() > 0


@pytest.mark.proves("blockffn")
@pytest.mark.parametrize("size", [1, 4, 64])
def test_chunk_closed_forms(size):
    experts, tokens = 8, 64
    one = torch.zeros(1, tokens, experts)
    one[..., 3] = 1
    assert chunk(routing_of(one), NOBODY, size=size).item() == pytest.approx(1 / experts)
    uniform = torch.full((1, tokens, experts), 1 / experts)
    expected = 1 - (1 - 1 / experts) ** size
    assert chunk(routing_of(uniform), NOBODY, size=size).item() == pytest.approx(expected)
    assert chunk(routing_of(torch.zeros(1, tokens, experts)), NOBODY, size=size).item() == pytest.approx(0)


@pytest.mark.proves("blockffn")
def test_chunk_of_one_hot_tokens_is_the_share_of_experts_in_their_union():
    choices = [[0, 0, 1, 1, 2, 3, 4, 4, 4], [5, 5, 5, 5, 5, 5, 5, 5, 5]]
    probs = torch.nn.functional.one_hot(torch.tensor(choices), 6).double()
    unions = [len({*row[start : start + 4]}) / 6 for row in choices for start in (0, 4, 8)]
    assert chunk(routing_of(probs), NOBODY, size=4).item() == pytest.approx(sum(unions) / len(unions))


def test_chunk_counts_in_valid_tokens_wherever_the_padding_stands():
    q = torch.softmax(torch.randn(7, 4, dtype=torch.float64), -1)
    expected = torch.stack([1 - (1 - q[s : s + 3]).prod(0).mean() for s in (0, 3, 6)]).mean()
    for before, inside, after in ((0, 0, 0), (2, 0, 0), (0, 0, 5), (1, 3, 2)):
        pieces = [torch.rand(before, 4), q[:2], torch.rand(inside, 4), q[2:], torch.rand(after, 4)]
        valid = [torch.full((len(p),), i in (1, 3)) for i, p in enumerate(pieces)]
        ctx = Context(valid=torch.cat(valid)[None])
        torch.testing.assert_close(chunk(routing_of(torch.cat(pieces)[None]), ctx, size=3), expected)


def test_chunk_gradient():
    scores = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    valid = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()

    def loss(scores):
        probs = torch.softmax(scores, -1)
        return chunk(Routing(scores, probs, probs), Context(valid=valid), size=2)

    assert torch.autograd.gradcheck(loss, scores)


def test_a_decision_per_row_has_no_neighbours():
    probs = torch.full((3, 1, 4), 0.25)
    assert locality(routing_of(probs, probs), NOBODY).item() == 0


def test_wrong_options_are_named():
    for loss, options, message in ((locality, {"sharpness": 0}, "sharpness > 0"), (chunk, {"size": 0}, "size >= 1")):
        with pytest.raises(ConfigError, match=message):
            loss(routing_of(torch.rand(1, 2, 3)), NOBODY, **options)
