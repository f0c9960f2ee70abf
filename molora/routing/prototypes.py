"""Scorers with one vector per expert that nobody trains together, and the selector that subtracts general experts.

Post-hoc routers (molora/posthoc) fill in the vectors: from the weights of each expert (Arrow), from what its layers
read on its own data (average activation), or by training each alone (PHATGOOSE). An expert without a vector is never
chosen: a vector of zeros would score 0, and so compete with the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError, RoutingError
from .choice import check_count, largest
from .scorers import scorers
from .selectors import selectors, weigh
from .types import Context

MEASURES = ("dot", "abs", "scaled", "norm")
ABSENT = -1e9  # the score of an expert that has no vector: its probability is exactly 0 in float32


def normed(x: Tensor) -> Tensor:
    """LayerNorm of x (..., d) without weights, eps 1e-5."""
    return F.layer_norm(x, x.shape[-1:])


@scorers.register("prototypes")
class Prototypes(nn.Module):
    """One vector per expert, v: (E, d), compared with the hidden state x.

    Options:
        measure: `dot` (x v), `abs` (|x v|: Arrow, arXiv 2405.11157, whose v has no sign), `scaled` (x v / sqrt(d)) or
            `norm` (LN(x) LN(v) / sqrt(d), LN without weights: PHATGOOSE, arXiv 2402.05859).
        absent: the numbers of experts that are never chosen, whatever their vectors.

    Attributes:
        weight: the vectors (E, d).
        present: (E,) bool, which experts have one; the others score -1e9.
    """

    def __init__(self, dim: int, num_experts: int, *, measure: str = "dot", absent: Sequence[int] = ()) -> None:
        super().__init__()
        if measure not in MEASURES:
            raise ConfigError(f"prototypes measure {measure!r} is unknown; known: {', '.join(MEASURES)}")
        self.measure = measure
        self.weight = nn.Parameter(torch.randn(num_experts, dim))
        far = sorted({e for e in absent if not 0 <= e < num_experts})
        if far:
            raise ConfigError(f"prototypes.absent names expert {far[0]}, but there are {num_experts}, from 0")
        self.register_buffer("present", torch.ones(num_experts, dtype=torch.bool))
        self.present[list(absent)] = False

    def measured(self, x: Tensor) -> Tensor:
        """Return the scores (B, S, E) of x (B, S, d), as if every expert had its vector."""
        if self.measure == "norm":
            return F.linear(normed(x), normed(self.weight)) / x.shape[-1] ** 0.5
        scores = F.linear(x, self.weight)
        if self.measure == "abs":
            return scores.abs()
        return scores / x.shape[-1] ** 0.5 if self.measure == "scaled" else scores

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """Score x (B, S, d) -> (B, S, E)."""
        return self.measured(x).masked_fill(~self.present, ABSENT)

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Put the experts in another order."""
        self.weight.copy_(self.weight[order])
        self.present.copy_(self.present[order])


@scorers.register("glider")
class Glider(Prototypes):
    """PHATGOOSE's scores plus what the request as a whole asks for (GLIDER, arXiv 2410.07172).

    `LN(x) LN(v_e) / sqrt(d) + gamma c_e`, where c (B, E) are the cosines of a description of the request with those of
    the experts, the same at every layer and token. They come with the forward as `router_extra`. The authors tune
    gamma per evaluation; the rule here makes it a property of the request: `sure` where its largest cosine reaches
    `threshold` (some expert is clearly meant), gamma elsewhere.

    Options:
        gamma: weight of the cosines (the authors' scripts: 3 for held-out tasks, 100 for tasks that were trained on).
        sure: the weight where the largest cosine reaches `threshold`; none: always gamma.
        threshold: a cosine, needed with `sure`.
        descriptions: what each expert is for, one text each, kept with the adapter.
        embedder: the name of what embeds the descriptions.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        gamma: float,
        sure: float | None = None,
        threshold: float | None = None,
        descriptions: Sequence[str | None] | None = None,
        embedder: str | None = None,
    ) -> None:
        super().__init__(dim, num_experts, measure="norm")
        if (sure is None) != (threshold is None):
            raise ConfigError(
                f"glider needs both sure and threshold, or neither, got sure={sure}, threshold={threshold}"
            )
        if descriptions is not None and len(descriptions) != num_experts:
            raise ConfigError(f"glider holds {len(descriptions)} descriptions for {num_experts} experts")
        self.gamma, self.sure, self.threshold = float(gamma), sure, threshold

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """Score x (B, S, d) -> (B, S, E)."""
        scores = self.measured(x)
        if self.gamma or self.sure:
            scores = scores + self._bias(ctx, scores.shape[-1]).to(scores)
        return scores.masked_fill(~self.present, ABSENT)

    def _bias(self, ctx: Context, experts: int) -> Tensor:
        cosines = ctx.extra
        if cosines is None or cosines.shape[-1] != experts:
            given = "none" if cosines is None else f"{cosines.shape[-1]} per row"
            raise RoutingError(
                f"scorer 'glider' needs {experts} cosines per row, one per expert, but {given} reached the forward; "
                "run it inside `with molora.posthoc.describing(model, requests, embed):`, or pass router_extra=(B, "
                f"{experts}) yourself"
            )
        if self.sure is None:
            return self.gamma * cosines
        known = cosines.masked_fill(~self.present.to(cosines.device), -torch.inf)
        is_sure = known.amax(-1, keepdim=True) >= self.threshold
        return torch.where(is_sure, self.sure * cosines, self.gamma * cosines)


@selectors.register("subtract", given=("real",), sparse=True, may_be_negative=True)
class Subtract(nn.Module):
    """`top_k` among the task experts, minus the mean of the general ones (GenKnowSub, in delta space).

    The general experts G share the weight -sum(gates) / |G|, so that the mixture is `sum_e g_e (dW_e - mean_G dW)`,
    exactly and without touching any expert. Without general experts it is `top_k`. PEFT calls it `use_gks`.

    Options:
        k: how many task experts to keep.
        normalise: as in `top_k`.
        general: the numbers of the general experts.
    """

    def __init__(
        self, dim: int, num_choices: int, *, k: int = 2, normalise: str = "sum1", general: Sequence[int] = ()
    ) -> None:
        super().__init__()
        far = sorted({e for e in general if not 0 <= e < num_choices})
        if far:
            raise ConfigError(f"subtract.general names expert {far[0]}, but there are {num_choices}, from 0")
        if k > num_choices - len(set(general)):
            raise ConfigError(f"subtract keeps k={k} of {num_choices - len(set(general))} task experts; set k lower")
        self.k, self.normalise = k, normalise
        mask = torch.zeros(num_choices, dtype=torch.bool)
        mask[list(general)] = True
        self.register_buffer("general", mask)

    def forward(self, probs: Tensor, ctx: Context, *, progress: float, real: int | None = None) -> Tensor:
        """Return gates (B, S, E) for probs (B, S, E)."""
        check_count(probs.shape[-1], self.k, False, 0.0)
        mask = largest(probs.masked_fill(self.general, -torch.inf), self.k)
        gates = weigh(probs, mask, normalise=self.normalise, real=real)
        count = self.general.sum().clamp_min(1)
        return gates - gates.sum(-1, keepdim=True) * (self.general / count)

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Put the experts in another order."""
        self.general.copy_(self.general[order])
