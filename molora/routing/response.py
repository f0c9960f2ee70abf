"""Experts that route themselves: a scorer that reads their own response, and the selector that goes with it (MoRA)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError, RoutingError
from .choice import largest
from .scorers import scorers
from .selectors import check_switches, selectors, weigh
from .types import Context

MEASURES = ("signed", "length")


@scorers.register("response", given=("bank",))
class Response(nn.Module):
    """How strongly the experts themselves respond, `s_e = A_e x`, divided by the length of all: no router to train.

    Self-activated rank-1 experts (MoRA, arXiv 2506.21035; not the high-rank MoRA): read a rank as a key A_i with a
    value B_i. Taken from the paper's equations, where s is signed: x and -x use different ranks. Gradients reach A
    through the scores, too.

    Options:
        measure: `signed` (the sum of A_e x over the ranks of an expert; for one rank, the response itself) or `length`
            (its norm).
        normalise: divide by the norm over all experts, so that the squares of the scores sum to 1.
    """

    def __init__(self, dim: int, num_experts: int, *, measure: str = "signed", normalise: bool = True) -> None:
        super().__init__()
        if measure not in MEASURES:
            raise ConfigError(f"scorer 'response': measure {measure!r} is unknown; known: {', '.join(MEASURES)}")
        self.num_experts, self.measure, self.normalise = num_experts, measure, normalise

    def forward(self, x: Tensor, ctx: Context, *, bank: Any) -> Tensor:
        """Score x (B, S, d) by the experts' A -> (B, S, N); null experts respond 0."""
        if bank is None or getattr(bank, "form", None) not in ("lora", "rank"):
            what = "there are none" if bank is None else f"these are of form '{getattr(bank, 'form', '?')}'"
            raise RoutingError(f"scorer 'response' reads the A of each expert, but {what}; use form: rank or lora")
        if x.shape[-1] != bank.d_in:
            raise RoutingError(
                f"scorer 'response' reads what the experts read ({bank.d_in} numbers), not a feature of {x.shape[-1]}; "
                "leave `feature` out"
            )
        per_rank = F.linear(x, bank.stack()[0].float())
        if self.measure == "signed":
            scores = bank.layout.gather(per_rank)
        else:
            scores = bank.layout.gather(per_rank.square()).clamp_min(1e-24).sqrt()
        scores = scores[..., : self.num_experts]  # shared experts come after those that are routed
        if self.normalise:
            scores = F.normalize(scores, dim=-1)
        return F.pad(scores, (0, self.num_experts - scores.shape[-1]))

    def permute(self, order: Tensor) -> None:
        """Do nothing: the order of the experts is that of the bank."""


@selectors.register("activated", given=("scores",), sparse=True)
def activated(
    probs: Tensor,
    ctx: Context,
    *,
    k: int | None = None,
    threshold: float | None = None,
    in_training: bool = True,
    normalise: str = "none",
    weight: str = "prob",
    omega: float = 1.0,
    grad: str = "soft",
    scores: Tensor | None = None,
) -> Tensor:
    """Keep the k most probable experts whose own score reaches a threshold (MoRA, arXiv 2506.21035).

    Whether MoRA renormalises after the mask is not known to us (`normalise`); a reviewer calls its threshold one of
    test time (`in_training: false`). A token whose scores all stay below it uses no expert.

    Options:
        k: how many at most; none for all.
        threshold: on the scores, before the link; none for no threshold.
        in_training: whether the threshold holds in training, too.
    """
    check_switches(normalise=normalise, weight=weight, grad=grad)
    if k is not None and k < 1:
        raise ConfigError(f"activated needs k >= 1, or null, got k={k}")
    mask = torch.ones_like(probs, dtype=torch.bool) if k is None else largest(probs, min(k, probs.shape[-1]))
    if threshold is not None and scores is not None and (in_training or not ctx.training):
        mask = mask & (scores >= threshold)
    return weigh(probs, mask, normalise=normalise, weight=weight, omega=omega, grad=grad)
