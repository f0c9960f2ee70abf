"""What may bend a choice of the top k: groups of experts, labels that pin an expert, and chance.

Pure functions on masks and scores, used by the selector `top_k`; N counts the choices, null experts included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError, RoutingError
from .types import Context

GROUP_SCORES = ("max", "top2", "sum")
PINS = ("none", "last", "hard")
SECONDS = ("always", "random")


def largest(values: Tensor, count: int) -> Tensor:
    """Return (..., N) bool: the `count` largest of values (..., N)."""
    chosen = values.detach().topk(count, dim=-1).indices
    return torch.zeros_like(values, dtype=torch.bool).scatter(-1, chosen, True)


def best_groups(biased: Tensor, n_group: int, topk_group: int, group_score: str) -> Tensor:
    """Return (..., N) bool: the experts of the best groups, for biased scores (..., N).

    The N choices are cut into n_group groups of neighbours. A group's score is the `max` of its members (DeepSeek-V2),
    the sum of its two largest (`top2`, DeepSeek-V3, arXiv 2412.19437) or their `sum` (SAM).
    """
    choices = biased.shape[-1]
    members = biased.detach().unflatten(-1, (n_group, choices // n_group))
    if group_score == "max":
        score = members.amax(-1)
    elif group_score == "top2":
        score = members.topk(min(2, members.shape[-1]), dim=-1).values.sum(-1)
    else:
        score = members.sum(-1)
    return largest(score, topk_group).repeat_interleave(choices // n_group, dim=-1)


def check_count(choices: int, k: int, clamp: bool, explore: float) -> int:
    """Return how many of `choices` experts top_k keeps; raise ConfigError when it cannot."""
    if k < 1 or (k > choices and not clamp):
        raise ConfigError(f"top_k needs 1 <= k <= number of experts, got k={k} with {choices}; or set clamp: true")
    if not 0 <= explore <= 1:
        raise ConfigError(f"top_k needs 0 <= explore <= 1, got {explore}")
    return min(k, choices)


def check_groups(choices: int, k: int, n_group: int, topk_group: int, group_score: str) -> None:
    """Raise ConfigError for groups that cannot hold the choice of k among `choices` experts."""
    if group_score not in GROUP_SCORES:
        raise ConfigError(f"top_k option group_score={group_score!r} is unknown; known: {', '.join(GROUP_SCORES)}")
    if n_group < 1 or choices % n_group:
        raise ConfigError(f"top_k needs n_group to divide the number of experts, got n_group={n_group} with {choices}")
    if not 1 <= topk_group <= n_group:
        raise ConfigError(f"top_k needs 1 <= topk_group <= n_group, got topk_group={topk_group} of {n_group}")
    if k > topk_group * choices // n_group:
        raise ConfigError(
            f"top_k needs k experts in {topk_group} of {n_group} groups of {choices // n_group}, got k={k}; "
            "raise topk_group, or lower k"
        )


def labels_of(ctx: Context, like: Tensor) -> Tensor | None:
    """Return (B, S, 1) long: the expert that a label asks for at each decision of `like` (B, S, N), -1 for none.

    Raises:
        RoutingError: a label names an expert that does not exist, or one decision has labels for several tokens.
    """
    labels = ctx.expert_ids
    if labels is None or like.shape[-1] == 1:  # a layer with one expert has nothing to choose
        return None
    labels = labels.to(like.device)
    if labels.shape[1] not in (1, like.shape[1]):
        raise RoutingError(
            f"expert_ids holds {labels.shape[1]} labels per row, but this decision is taken {like.shape[1]} times per "
            "row; give one label per row"
        )
    if labels.numel() and int(labels.max()) >= like.shape[-1]:
        raise RoutingError(f"expert id {int(labels.max())} is out of range; there are {like.shape[-1]} experts")
    return labels.expand(like.shape[:-1])[..., None]


def pin_last(mask: Tensor, biased: Tensor, labels: Tensor) -> Tensor:
    """Return the mask (B, S, N) with the labelled expert in the place of the last one chosen, where it is absent.

    Hybrid routing of Post-MoE (arXiv 2410.10626): labels (B, S, 1), -1 where no label is known.
    """
    asked = torch.zeros_like(mask).scatter(-1, labels.clamp_min(0), True) & (labels >= 0)
    absent = (asked & ~mask).any(-1, keepdim=True)
    last = biased.detach().masked_fill(~mask, torch.inf).argmin(-1, keepdim=True)
    dropped = torch.zeros_like(mask).scatter(-1, last, True)
    return torch.where(absent, (mask & ~dropped) | asked, mask)


def explored(biased: Tensor, share: float) -> Tensor:
    """Return scores (B, S, N) that are uniform noise at a random `share` of the tokens (epsilon-greedy)."""
    random_tokens = torch.rand_like(biased[..., :1]) < share
    return torch.where(random_tokens, torch.rand_like(biased), biased)


def thinned(gates: Tensor, mask: Tensor, k: int) -> Tensor:
    """Return gates (B, S, N) without the lesser experts that lost their draw: kept with probability min(1, k g).

    g is an expert's share of the gates; the best one always stays. With k = 2 this is GShard's random second expert
    (arXiv 2006.16668), kept when `2 g_2` beats a uniform draw. The gates that stay are not scaled up again.
    """
    shares = gates.detach() / gates.detach().sum(-1, keepdim=True).clamp_min(torch.finfo(gates.dtype).tiny)
    best = largest(torch.where(mask, shares, -torch.ones_like(shares)), 1)
    kept = best | (torch.rand_like(shares) < k * shares)
    return gates * kept
