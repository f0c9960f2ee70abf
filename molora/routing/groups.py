"""The alignment loss of routing in groups (SAM): a token's best experts should lie in the group it was sent to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .losses import Parts, losses, mean_over_tokens
from .schedules import Scheduled
from .types import Context, Routing


def _why_no_groups(router: Any) -> str | None:
    selector = router.selector
    name = selector.function.__name__ if isinstance(selector, Scheduled) else type(selector).__name__
    if name == "top_k" and int(selector.fixed.get("n_group", 1)) > 1:
        return None
    return "it needs selector: {name: top_k, n_group: ..., topk_group: ...}, the one that sends tokens to groups"


@losses.register("align", at_balance=lambda experts: 0.0, given=("parts",), why_not=_why_no_groups)
def align(routing: Routing, ctx: Context, *, parts: Parts | None = None) -> Tensor:
    """Return the mean over tokens of `sum_{e outside} max(0, p_e - p_k)`, 0 iff the global best k lie inside.

    "Outside" are the experts of the groups that nothing was chosen from, and p_k is the smallest prob among the chosen
    (SAM, as implemented in Hetu). The groups are those of the router's selector.
    """
    probs, chosen = routing.probs, routing.selected
    groups = 1 if parts is None else int(parts.router.selector.fixed["n_group"])
    inside = chosen.unflatten(-1, (groups, probs.shape[-1] // groups)).any(-1, keepdim=True)
    inside = inside.expand(*inside.shape[:-1], probs.shape[-1] // groups).flatten(-2)
    least = probs.masked_fill(~chosen, torch.inf).amin(-1, keepdim=True)
    least = torch.where(chosen.any(-1, keepdim=True), least, probs.amax(-1, keepdim=True))
    over = torch.relu(probs - least) * ~inside
    return mean_over_tokens(over.sum(-1), ctx.weights(probs))
