"""Decisions that are drawn in training and plain at inference: relaxed Bernoulli gates, uncertainty-aware scores."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from .scorers import _init_rows, scorers
from .selectors import check_switches, selectors, weigh
from .types import Context


@selectors.register("relaxed_bernoulli", given=("scores", "generator"))
def relaxed_bernoulli(
    probs: Tensor,
    ctx: Context,
    *,
    temperature: float = 1.0,
    normalise: str = "sum1",
    grad: str = "soft",
    scores: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw each expert's gate from a relaxed Bernoulli in training, `sigmoid((score + logistic noise) / temperature)`.

    Poly (arXiv 2202.13914) with link sigmoid: at inference the gates are the probs. Both are divided by their sum.
    At temperature 1 and score 0 a draw is uniform in (0, 1).

    Options:
        temperature: of the draws.
    """
    check_switches(normalise=normalise, grad=grad)
    if temperature <= 0:
        raise ConfigError(f"relaxed_bernoulli temperature must be positive, got {temperature}")
    values = probs
    if ctx.training and scores is not None:
        eps = torch.finfo(scores.dtype).eps  # keeps the noise finite, as torch.distributions does
        u = torch.rand(scores.shape, generator=generator, device=scores.device, dtype=scores.dtype).clamp(eps, 1 - eps)
        values = torch.sigmoid((u.log() - (-u).log1p() + scores) / temperature)
    return weigh(values, torch.ones_like(values, dtype=torch.bool), normalise=normalise, grad=grad)


@scorers.register("uncertainty_aware", given=("generator",))
class UncertaintyAware(nn.Module):
    """Linear scores that are softened where passes with dropout disagree (UaR of MoFME, 2312.16610; inferred).

    In training, M passes with dropout on the input give probabilities p_m with mean w and variances v, and the scores
    are `ln(w) / (1 + sum_e v_e)`; at inference one pass without dropout scores. This is a safe reading of the paper:
    its own formulas were not available to us, and its public code passes a deterministic router several times, so
    that all variances are 0, and then averages deviations from the mean.

    Options:
        passes: M.
        dropout: of the input, in (0, 1).
        init: as in `linear`.
    """

    def __init__(
        self, dim: int, num_experts: int, *, passes: int = 4, dropout: float = 0.1, init: str | float = "kaiming"
    ) -> None:
        super().__init__()
        if passes < 1 or not 0 < dropout < 1:
            raise ConfigError(f"uncertainty_aware needs passes >= 1 and 0 < dropout < 1, got {passes} and {dropout}")
        self.passes, self.dropout = passes, float(dropout)
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        _init_rows(self.weight, init)

    def forward(self, x: Tensor, ctx: Context, *, generator: torch.Generator | None = None) -> Tensor:
        """Score x (B, S, d) -> (B, S, E)."""
        if not ctx.training:
            return F.linear(x, self.weight)
        draws = torch.rand((self.passes, *x.shape), generator=generator, device=x.device, dtype=x.dtype)
        kept = (draws >= self.dropout) / (1 - self.dropout)
        log_probs = torch.log_softmax(F.linear(x * kept, self.weight), -1)
        log_mean = torch.logsumexp(log_probs, 0) - torch.tensor(float(self.passes)).log()
        spread = log_probs.exp().var(0, unbiased=False).sum(-1, keepdim=True)
        return log_mean / (1 + spread)

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Put the experts in another order."""
        self.weight.copy_(self.weight[order])
