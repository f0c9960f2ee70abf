"""A prior on how probable each expert is over the tokens: the Dirichlet-prior shaping loss, and the Beta cdf it needs.

Under a Dirichlet prior with concentrations a_e the probs of one expert follow Beta(a_e, sum a - a_e). torch has no
differentiable incomplete beta function, so its values and its derivative (the density) are written here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .losses import losses, shares
from .types import Context, Routing

EDGE = 1e-6  # probs are kept this far from 0 and 1
_STEPS = 4096  # of the table over logit(p); its error is far below float32


def incomplete_beta(x: Tensor, a: Tensor, b: Tensor, iterations: int = 300) -> Tensor:
    """Return the regularised incomplete beta function I_x(a, b) in float64, by its continued fraction (Lentz)."""
    x, a, b = torch.broadcast_tensors(x.double(), a.double(), b.double())
    flipped = x > (a + 1) / (a + b + 2)  # where the fraction converges slowly, 1 - I_{1-x}(b, a)
    first, second, z = torch.where(flipped, b, a), torch.where(flipped, a, b), torch.where(flipped, 1 - x, x)
    log_front = first * z.log() + second * torch.log1p(-z) + _log_constant(a, b)
    c, d = torch.ones_like(z), 1 / _not_zero(1 - (first + second) * z / (first + 1))
    fraction = d
    for m in range(1, iterations + 1):
        even = m * (second - m) * z / ((first + 2 * m - 1) * (first + 2 * m))
        odd = -(first + m) * (first + second + m) * z / ((first + 2 * m) * (first + 2 * m + 1))
        for term in (even, odd):
            d, c = 1 / _not_zero(1 + term * d), _not_zero(1 + term / c)
            fraction = fraction * (c * d)
        if ((c * d - 1).abs() < 1e-15).all():
            break
    value = log_front.exp() * fraction / first
    return torch.where(flipped, 1 - value, value)


def _not_zero(value: Tensor) -> Tensor:
    return torch.where(value.abs() < 1e-300, 1e-300, value)


def _log_constant(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b)


def beta_density(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return the density of Beta(a, b) at x in (0, 1)."""
    return ((a - 1) * x.log() + (b - 1) * torch.log1p(-x) + _log_constant(a, b)).exp()


@functools.lru_cache(maxsize=64)
def _table(alphas: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Return I and its derivative at _STEPS + 1 equal steps of logit(x), (experts, steps) float64; computed once."""
    a = torch.tensor(alphas, dtype=torch.float64)[:, None]
    edge = math.log((1 - EDGE) / EDGE)
    x = torch.sigmoid(torch.linspace(-edge, edge, _STEPS + 1, dtype=torch.float64))
    return incomplete_beta(x, a, a.sum() - a), beta_density(x, a, a.sum() - a) * x * (1 - x)


class MarginalCdf(torch.autograd.Function):
    """The cdf of each marginal of a Dirichlet distribution, whose derivative is the Beta density.

    The value is read from a table over logit(x) with cubic pieces that meet the exact slope at each step.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, alphas: tuple[float, ...]) -> Tensor:
        """Return F_e(x_e) for x (..., E) in [EDGE, 1 - EDGE], in its dtype."""
        ctx.save_for_backward(x)
        ctx.alphas = alphas
        values, slopes = (table.to(x.device) for table in _table(alphas))
        edge = math.log((1 - EDGE) / EDGE)
        place = (torch.logit(x.double()).clamp(-edge, edge) + edge) / (2 * edge) * _STEPS
        left = place.long().clamp_max(_STEPS - 1)
        t, step, expert = place - left, 2 * edge / _STEPS, torch.arange(len(alphas), device=x.device)
        low, rise = values[expert, left], values[expert, left + 1] - values[expert, left]
        start, stop = slopes[expert, left] * step, slopes[expert, left + 1] * step
        # Hermite's cubic: values and slopes are exact at both ends
        cubic = start * t + (3 * rise - 2 * start - stop) * t**2 + (start + stop - 2 * rise) * t**3
        return (low + cubic).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Multiply by the density."""
        (x,) = ctx.saved_tensors
        a = torch.tensor(ctx.alphas, dtype=torch.float64, device=x.device)
        return grad * beta_density(x.double(), a, a.sum() - a).to(x.dtype), None


def _uniform_value(experts: int, alpha: float = 0.75) -> float:
    """Return the loss of a uniform router with many tokens: every prob is 1 / E."""
    middle, a = torch.tensor(1 / experts, dtype=torch.float64), torch.tensor(alpha, dtype=torch.float64)
    return float((incomplete_beta(middle, a, (experts - 1) * a) - 0.5) ** 2) + 1 / 12


@losses.register("dirichlet_prior", at_balance=_uniform_value, reads="number")
def dirichlet_prior(routing: Routing, ctx: Context, *, alpha: float | Sequence[float] = 0.75) -> Tensor:
    """Return how far the probs of each expert are from the Beta marginals of a Dirichlet prior (DPSL).

    Per expert, the probs over all N valid tokens are sorted and compared with the prior's quantiles:
    `mean_{e,n} (F_e(p_(n)) - (n - 1/2) / N)^2`. Probs that follow the prior score `(1/6 - 1/(12 N)) / N`, a uniform
    router 0.099 (E = 8, alpha = 0.75). alpha < 1 asks for tokens that decide. Which distance between the two cdfs the
    paper takes is inferred here (a mean square), and its weight is unknown.

    Options:
        alpha: the concentration of every expert, or a list with one per expert (for experts of unequal use).
    """
    probs = shares(routing)
    experts = probs.shape[-1]
    alphas = [float(alpha)] * experts if isinstance(alpha, (int, float)) else [float(value) for value in alpha]
    if len(alphas) != experts or not all(0 < value < math.inf for value in alphas):
        raise ConfigError(
            f"dirichlet_prior needs a positive alpha, or one for each of {experts} experts, got {alpha!r}"
        )
    if experts == 1:
        return probs.sum() * 0.0
    valid = ctx.weights(routing.probs).flatten()
    count = valid.sum()
    flat = probs.flatten(0, 1)
    # padding goes last, above every prob; its place is beyond N and weighs nothing
    ordered = torch.where(valid[:, None] > 0, flat, torch.full_like(flat, 2.0)).sort(0).values
    inside = (torch.arange(len(valid), device=valid.device) < count)[:, None]
    ordered = torch.where(inside, ordered, torch.full_like(ordered, 0.5)).clamp(EDGE, 1 - EDGE)
    quantiles = (torch.arange(len(valid), device=valid.device)[:, None] + 0.5) / count.clamp_min(1.0)
    cdf = MarginalCdf.apply(ordered, tuple(alphas))
    return (((cdf - quantiles) ** 2) * inside).sum() / (count.clamp_min(1.0) * experts)
