"""Link functions: scores (B, S, E) -> probs (B, S, E), both float32.

A link is a function of the scores, or a Module class built with `(num_choices, **options)` when it learns something.
Fact `may_be_negative`: its probs, and so the gates, may fall below zero.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from ..registry import Registry

links = Registry("link")


def _cooled(scores: Tensor, temperature: float) -> Tensor:
    if not temperature > 0:
        raise ConfigError(f"link temperature must be positive, got {temperature}")
    return scores if temperature == 1.0 else scores / temperature


@links.register("softmax")
def softmax(scores: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Softmax over experts; `temperature` divides the scores."""
    return torch.softmax(_cooled(scores, temperature), dim=-1)


@links.register("sigmoid")
def sigmoid(scores: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Independent sigmoid per expert (SMoRA, arXiv 2501.15103); the probs do not sum to 1."""
    return torch.sigmoid(_cooled(scores, temperature))


@links.register("relu")
def relu(scores: Tensor) -> Tensor:
    """Positive part of each score (ReMoE, arXiv 2412.14711): sparse by itself, and differentiable almost everywhere.

    A token whose scores are all negative gets no expert and sends the router no gradient. Without a bias in the
    scorer, inputs that are symmetric around zero keep half of the experts on whatever is learned.
    """
    return torch.relu(scores)


@links.register("identity", may_be_negative=True)
def identity(scores: Tensor) -> Tensor:
    """The scores themselves (the cosines of ProMoE): a negative score gives a negative weight."""
    return scores


@links.register("l2_relu")
class L2Relu(nn.Module):
    """Positive part of the scores on the unit sphere, `c kappa relu(z / ||z||_2)` (NormRouter of UniPool).

    The same for `a z` as for z, a > 0; zero scores give zero. The learned kappa starts at 1 and is kept positive by an
    exponential (the authors learn it directly). Their c is the mean of 1 / ||top-k of relu(n / ||n||)|| over normal
    draws n; it is 1 here unless given, since that mean diverges for few experts: with probability 2^-E every draw is
    negative (E = 8, k = 2 gave infinity).

    Options:
        c: the constant factor.
    """

    def __init__(self, num_choices: int, *, c: float = 1.0) -> None:
        super().__init__()
        if not 0 < c < float("inf"):
            raise ConfigError(f"l2_relu needs a positive finite c, got {c}")
        self.c = float(c)
        self.log_kappa = nn.Parameter(torch.zeros(()))

    def forward(self, scores: Tensor, *, progress: float) -> Tensor:
        """Link scores (B, S, E) -> probs (B, S, E)."""
        return self.c * torch.exp(self.log_kappa) * torch.relu(F.normalize(scores, dim=-1))


@links.register("relu_rms", may_be_negative=True)
class ReluRms(nn.Module):
    """Positive part of the scores over its root mean square, times a learned weight per expert (BlockFFN).

    `w * a / sqrt(mean_e a^2 + eps)` with `a = relu(z)`: which experts act is decided by the sign of the score, how
    much by the norm. A row without any positive score stays zero; w starts at 1 and may learn to be negative.

    Options:
        eps: added to the mean square; rows far below its root are not blown up.
    """

    def __init__(self, num_choices: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        if not eps > 0:
            raise ConfigError(f"relu_rms needs eps > 0, got {eps}")
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_choices))

    def forward(self, scores: Tensor, *, progress: float) -> Tensor:
        """Link scores (B, S, E) -> probs (B, S, E)."""
        active = torch.relu(scores)
        return self.weight * active * torch.rsqrt(active.square().mean(-1, keepdim=True) + self.eps)

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Put the experts in another order."""
        self.weight.copy_(self.weight[order])
