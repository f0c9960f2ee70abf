"""Sparsegen routing: the scores are projected on the simplex, as sparsely as a small network asks for each token.

    gates = argmin over the simplex of ||g - u||^2 - lambda ||g||^2  =  relu(u - tau) / (1 - lambda)

lambda < 1 sets how many experts survive: towards -infinity the gates become uniform, 0 is sparsemax, near 1 one-hot.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError, RoutingError
from .losses import losses, mean_over_tokens
from .selectors import selectors
from .types import Context, Routing

HIGHEST = 0.99  # the denominator 1 - lambda never falls below 0.01


def sparsegen(scores: Tensor, lam: Tensor) -> Tensor:
    """Project scores (..., E) on the simplex with lambda (...) < 1 -> (..., E) that sum to 1, exactly differentiable.

    With the scores sorted falling and U_k the sum of the first k: `k* = max{k: 1 - lambda + k u_(k) > U_k}`,
    `tau = (U_k* - 1 + lambda) / k*` (LD-MoLE, arXiv 2509.25684). On the support the gradient with respect to the scores
    is `(I - 1 1^T / k*) / (1 - lambda)`; off it, zero.
    """
    spare = 1 - lam[..., None]
    u = scores - scores.amax(-1, keepdim=True).detach()  # the projection does not see a common shift
    ranked = u.detach().sort(-1, descending=True).values
    ranks = torch.arange(1, u.shape[-1] + 1, device=u.device, dtype=u.dtype)
    support = (spare.detach() + ranks * ranked > ranked.cumsum(-1)).sum(-1, keepdim=True).clamp_min(1)
    least = ranked.gather(-1, support - 1)
    # ties with the last one that is kept are kept too: they get the same gate, and it is not negative
    kept = u.detach() >= least
    count = kept.sum(-1, keepdim=True)
    tau = ((u * kept).sum(-1, keepdim=True) - spare) / count
    return torch.where(kept, (u - tau).clamp_min(0) / spare, torch.zeros_like(u))


@selectors.register("sparsegen", given=("scores", "hidden", "notes"), sparse=True, skips_link=True)
class Sparsegen(nn.Module):
    """Sparsegen of the raw scores with a lambda predicted per token (LD-MoLE, arXiv 2509.25684).

    `lambda = logsigmoid(MLP(x)) + 0.99`, MLP: Linear(d, hidden) - ReLU - Linear(hidden, 1), its last bias at -2.5, so
    that training starts with most experts (lambda near -1.6). The authors start the inner bias there too, which at
    inputs of unit variance switches every hidden unit off and leaves one lambda for all tokens; here it starts at 0.
    The link plays no part in the gates; it only gives the probs that metrics read.

    Options:
        hidden_size: width of the MLP.
        share: one MLP for all routers that read inputs of the same size, as in the authors' code.
        bias: the start of the last bias of the MLP.
        inner_bias: the start of its inner biases.
    """

    def __init__(
        self,
        dim: int,
        num_choices: int,
        *,
        hidden_size: int = 256,
        share: bool = True,
        bias: float = -2.5,
        inner_bias: float = 0.0,
    ) -> None:
        super().__init__()
        if hidden_size < 1:
            raise ConfigError(f"sparsegen needs hidden_size >= 1, got {hidden_size}")
        self.sharing, self.dim = share, dim
        inner, outer = nn.Linear(dim, hidden_size), nn.Linear(hidden_size, 1)
        for layer, start in ((inner, inner_bias), (outer, bias)):
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
            nn.init.constant_(layer.bias, start)
        self.mlp = nn.Sequential(inner, nn.ReLU(), outer)

    def borrow(self, lender: Sparsegen) -> None:
        """Predict lambda with the MLP of another router, which alone holds, trains and saves it."""
        del self._modules["mlp"]
        self.__dict__["mlp"] = lender.mlp  # not through nn.Module, which would register it a second time

    def forward(
        self,
        probs: Tensor,
        ctx: Context,
        *,
        progress: float = 0.0,
        scores: Tensor | None = None,
        hidden: Tensor | None = None,
        notes: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Select from scores (B, S, E), as asked by hidden (B, S, d) -> gates (B, S, E); leaves `lambda` (B, S)."""
        if scores is None or hidden is None:
            raise RoutingError("selector 'sparsegen' reads scores and hidden states; use it inside a Router")
        lam = F.logsigmoid(self.mlp(hidden)[..., 0]) + HIGHEST
        if notes is not None:
            notes["lambda"] = lam
        return sparsegen(scores, lam.expand(scores.shape[:-1]))


def interval(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the lambdas [low, high) (...) for which exactly k experts survive, for scores (..., E).

    `[1 - (U_k - k u_(k+1)), 1 - (U_k - k u_(k)))`; with k = E there is no u_(k+1), and low is minus infinity.
    """
    ranked = scores.sort(-1, descending=True).values
    total = ranked[..., :k].sum(-1)
    high = 1 - (total - k * ranked[..., k - 1])
    low = 1 - (total - k * ranked[..., k]) if k < scores.shape[-1] else torch.full_like(high, -torch.inf)
    return low, high


def _why_no_lambda(router: Any) -> str | None:
    return None if isinstance(router.selector, Sparsegen) else "it needs selector: sparsegen, which predicts a lambda"


@losses.register("lambda_sparsity", at_balance=lambda experts: 1 - HIGHEST, why_not=_why_no_lambda, reads_notes=True)
def lambda_sparsity(routing: Routing, ctx: Context, *, k: int = 2) -> Tensor:
    """Return the mean of `relu(lambda_low(k) - lambda)`: pushes lambda up to where at most k experts survive.

    LD-MoLE's analytic loss (arXiv 2509.25684; k = 2 in its code). The scores are read without gradient, so that only
    the network that predicts lambda learns from it. At equal scores lambda_low is 1 and the loss 1 - lambda >= 0.01.
    """
    if k < 1:
        raise ConfigError(f"lambda_sparsity needs k >= 1, got {k}")
    if routing.notes is None:  # a config that is being checked: the router is asked by why_not
        return routing.scores.sum() * 0
    lam = routing.notes["lambda"]
    if k >= routing.scores.shape[-1]:
        return lam.sum() * 0  # never more than k experts
    low, _ = interval(routing.scores.detach(), k)
    return mean_over_tokens(torch.relu(low - lam.expand(low.shape)), ctx.weights(routing.scores))
