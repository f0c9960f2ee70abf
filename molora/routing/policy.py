"""Sampled selections: experts drawn at random in training, with the log-probability that a policy gradient needs.

Experts are drawn one after another without replacement, each with its share of what is left (Plackett-Luce). Adding
Gumbel noise to log-probabilities and sorting draws exactly so, with no loop over draws.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError
from .selectors import selectors
from .types import Context


def gumbel(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return Gumbel noise of the shape of `like`: -log(-log(uniform)), always finite."""
    uniform = torch.rand(like.shape, generator=generator, device=like.device, dtype=torch.float32)
    tiny = torch.finfo(torch.float32).tiny
    return -(-uniform.clamp_min(tiny).log()).clamp_min(tiny).log()


def log_shares(probs: Tensor) -> Tensor:
    """Return the logarithm of probs divided by their sum over experts, (..., E); finite where a prob is 0."""
    return torch.log_softmax(probs.clamp_min(torch.finfo(probs.dtype).tiny).log(), -1)


def log_prob_in_order(log_q: Tensor, order: Tensor, k: int) -> Tensor:
    """Return (...): the log-probability of drawing the first k experts of `order`, one after another.

    `sum_{j<k} log(q_{o_j} / (1 - sum_{i<j} q_{o_i}))`. What is left is summed in log space from the end of the order,
    since `1 - sum` loses everything once the first draws hold nearly all probability.

    Args:
        log_q: (..., E), the log of a distribution.
        order: (..., E), a permutation of the experts, those that were drawn first.
        k: how many were drawn.
    """
    ordered = log_q.gather(-1, order)
    left = ordered.flip(-1).logcumsumexp(-1).flip(-1)
    return (ordered - left)[..., :k].sum(-1)


@selectors.register("sample", given=("notes", "generator"), sparse=True)
def sample(
    probs: Tensor,
    ctx: Context,
    *,
    k: int = 2,
    omega: float = 1.0,
    clamp: bool = False,
    notes: dict[str, Tensor],
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw k experts without replacement in training, keep the top k otherwise; all weigh the same (ReMix).

    No gradient reaches the router through the gates: `objective: rloo` trains it, from `notes["log_prob"]` (B, S), the
    log-probability of the draw in the order in which it was made. The draws of one forward follow from its seed, so
    that the recompute of a checkpoint repeats them. At `granularity: token` every token draws for itself, at `prompt`
    a row draws once.

    Options:
        k: how many experts act.
        omega: the weight of each.
        clamp: allow k > E and keep all E there; otherwise an error.
    """
    experts = probs.shape[-1]
    if k < 1 or (k > experts and not clamp):
        raise ConfigError(f"sample needs 1 <= k <= number of experts, got k={k} with {experts}; or set clamp: true")
    k = min(k, experts)
    if not ctx.training:
        chosen = probs.detach().topk(k, -1).indices
    else:
        log_q = log_shares(probs)
        order = (log_q.detach() + gumbel(log_q, generator)).argsort(-1, descending=True)
        notes["log_prob"] = log_prob_in_order(log_q, order, k)
        chosen = order[..., :k]
    return torch.zeros_like(probs).scatter(-1, chosen, omega).detach()
