"""The Dirichlet prior and its Beta cdf, against scipy."""

import pytest
import torch
from scipy import stats

from molora.errors import ConfigError
from molora.routing.prior_losses import EDGE, MarginalCdf, beta_density, dirichlet_prior, incomplete_beta
from molora.routing.types import Context, Routing

NOBODY = Context()
SHAPES = [(0.75, 5.25), (0.75, 0.75), (1.0, 7.0), (3.0, 40.0), (0.2, 60.0), (30.0, 2.0)]


def routing_of(probs):
    return Routing(probs, probs, probs)


@pytest.mark.proves("dirichlet_prior")
@pytest.mark.parametrize(("a", "b"), SHAPES)
def test_incomplete_beta_is_scipys(a, b):
    x = torch.linspace(EDGE, 1 - EDGE, 501, dtype=torch.float64)
    value = incomplete_beta(x, torch.tensor(a), torch.tensor(b))
    torch.testing.assert_close(value, torch.tensor(stats.beta.cdf(x, float(torch.tensor(a)), b)), atol=1e-12, rtol=0)
    density = beta_density(x, torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))
    torch.testing.assert_close(density, torch.tensor(stats.beta.pdf(x, a, b)), atol=1e-10, rtol=1e-9)


@pytest.mark.proves("dirichlet_prior")
def test_the_cdf_of_each_marginal_and_its_derivative():
    alphas = (0.75, 0.3, 2.0, 5.0)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(400, 4, dtype=torch.float64, generator=generator).clamp(EDGE, 1 - EDGE).requires_grad_()
    value = MarginalCdf.apply(x, alphas)
    (grad,) = torch.autograd.grad(value.sum(), x)
    for e, a in enumerate(alphas):
        at, b = x[:, e].detach(), sum(alphas) - a
        torch.testing.assert_close(value[:, e].detach(), torch.tensor(stats.beta.cdf(at, a, b)), atol=1e-9, rtol=0)
        torch.testing.assert_close(grad[:, e], torch.tensor(stats.beta.pdf(at, a, b)), atol=1e-9, rtol=1e-9)
    assert torch.autograd.gradcheck(lambda x: MarginalCdf.apply(x, alphas), x[:9], eps=1e-7, atol=1e-5)


@pytest.mark.proves("dirichlet_prior")
def test_probs_that_follow_the_prior_score_what_order_statistics_of_uniforms_do():
    """(1/6 - 1/(12 N)) / N in the mean, whatever alpha."""
    tokens, draws = 24, 3000
    expected = (1 / 6 - 1 / (12 * tokens)) / tokens
    for alpha in (0.75, 2.0):
        prior = torch.distributions.Dirichlet(torch.full((5,), alpha, dtype=torch.float64))
        torch.manual_seed(0)
        scores = [
            dirichlet_prior(routing_of(prior.sample((1, tokens))), NOBODY, alpha=alpha) for _ in range(draws // 5)
        ]
        assert torch.stack(scores).mean().item() == pytest.approx(expected, rel=0.06)


@pytest.mark.proves("dirichlet_prior")
def test_a_uniform_router_scores_as_the_specification_says():
    value = dirichlet_prior(routing_of(torch.full((2, 2048, 8), 1 / 8)), NOBODY, alpha=0.75).item()
    assert value == pytest.approx(0.099, abs=5e-4)
    assert value == pytest.approx((stats.beta.cdf(1 / 8, 0.75, 5.25) - 0.5) ** 2 + 1 / 12, rel=1e-5)


@pytest.mark.proves("dirichlet_prior")
def test_against_loops_with_a_list_of_alphas_and_padding():
    probs = torch.softmax(2 * torch.randn(2, 4, 3, dtype=torch.float64), -1)
    valid = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]).bool()
    alphas, total = [0.5, 1.0, 3.0], 0.0
    for e, a in enumerate(alphas):
        ordered = sorted(probs[valid][:, e].tolist())
        total += sum((stats.beta.cdf(p, a, 4.5 - a) - (n + 0.5) / 6) ** 2 for n, p in enumerate(ordered))
    value = dirichlet_prior(routing_of(probs), Context(valid=valid), alpha=alphas).item()
    assert value == pytest.approx(total / 18, abs=1e-9)


@pytest.mark.proves("dirichlet_prior")
def test_descent_brings_a_router_to_the_prior():
    """From near uniform, the marginals become those of the prior: tokens decide, and experts are used alike."""
    torch.manual_seed(0)
    scores = (0.1 * torch.randn(1, 256, 4)).requires_grad_()
    optimizer = torch.optim.Adam([scores], lr=0.05)
    first = dirichlet_prior(routing_of(torch.softmax(scores, -1)), NOBODY).item()
    for _ in range(150):
        optimizer.zero_grad()
        value = dirichlet_prior(routing_of(torch.softmax(scores, -1)), NOBODY)
        value.backward()
        optimizer.step()
    probs = torch.softmax(scores, -1).detach()[0]
    assert value.item() < 0.02 * first
    for e in range(4):
        assert stats.kstest(probs[:, e].numpy(), stats.beta(0.75, 2.25).cdf).statistic < 0.06


def test_wrong_alphas_are_named():
    for alpha in (0, -1.0, [1.0, 1.0], [1.0, 1.0, 0.0]):
        with pytest.raises(ConfigError, match="positive alpha, or one for each of 3 experts"):
            dirichlet_prior(routing_of(torch.rand(1, 2, 3)), NOBODY, alpha=alpha)
