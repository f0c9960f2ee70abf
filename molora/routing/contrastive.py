"""Contrastive routing losses: the experts' prototypes against the tokens that were given to them."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError, RoutingError
from .losses import Parts, losses
from .scorers import Cosine, Linear
from .types import Context, Routing


@losses.register("prototype_contrast", at_balance=lambda experts: math.log(experts), given=("parts",))
def prototype_contrast(routing: Routing, ctx: Context, *, temperature: float = 0.07, parts: Parts) -> Tensor:
    """Return the InfoNCE of prototypes and the mean token of each expert (RCL of ProMoE, arXiv 2510.24711).

    `mean_e -log softmax_f(cos(m_e, c_f) / temperature)[e]`, where m_e is the prototype of expert e (its row of a
    cosine or linear scorer, in the scorer's projected space) and c_f the mean of the tokens that chose f. It pulls
    each prototype to its own tokens and pushes it from those of others. Experts that no token chose are left out, and
    with fewer than two experts in use the loss is 0; with n in use it is ln n when nothing tells them apart.

    Options:
        temperature: divides the cosines.
    """
    if not temperature > 0:
        raise ConfigError(f"prototype_contrast needs a positive temperature, got {temperature}")
    prototypes, tokens = (value.float() for value in _compared(routing, parts))
    chosen = routing.selected * ctx.weights(routing.probs)[..., None]  # (B, S, N)
    chosen = chosen.to(tokens.dtype).flatten(0, 1)
    counts = chosen.sum(0)
    centres = chosen.t() @ tokens.flatten(0, 1) / counts.clamp_min(1.0)[:, None]
    used = counts > 0
    alike = F.normalize(prototypes, dim=-1) @ F.normalize(centres, dim=-1).t() / temperature
    alike = alike.masked_fill(~used, torch.finfo(alike.dtype).min)  # empty experts compete with nobody
    each = torch.logsumexp(alike, -1) - alike.diagonal()
    several = (used.sum() > 1).to(each.dtype)
    return several * torch.where(used, each, torch.zeros_like(each)).sum() / used.sum().clamp_min(1)


def _compared(routing: Routing, parts: Parts) -> tuple[Tensor, Tensor]:
    """Return the prototypes (N, D) and the tokens (B, S, D) in the space where the scorer compares them."""
    router, tokens = parts.router, parts.hidden.float()
    scorer = router.scorer
    plain = isinstance(scorer, Linear) and scorer.activation is None
    if not (isinstance(scorer, Cosine) or plain) or len(router.feature) > 0:
        raise RoutingError(
            "loss 'prototype_contrast' compares hidden states with one row per expert: it needs scorer: cosine (or "
            f"linear without an activation) and no feature, not {type(scorer).__name__.lower()}"
        )
    if routing.scores.shape[1] != tokens.shape[1]:
        raise RoutingError("loss 'prototype_contrast' needs a decision per token: set granularity: token")
    if isinstance(scorer, Cosine) and scorer.project is not None:
        tokens = F.linear(tokens, scorer.project)
    return scorer.weight, tokens
