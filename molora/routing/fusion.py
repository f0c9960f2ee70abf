"""Attention over what the experts give out: the scores of AdapterFusion (arXiv 2005.00247), and its penalty."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, RoutingError
from .features import Place
from .losses import Parts, losses
from .scorers import _init_rows, scorers
from .types import Context, Routing


@scorers.register("fusion", given=("bank", "place"))
class Fusion(nn.Module):
    """Scores `(W_q h) . (W_k z_e)`, with z_e what expert e gives out for h (AdapterFusion, arXiv 2005.00247).

    With a softmax link and the soft selector the gates are the attention of the paper; experts of form `fusion` add
    its values. In the paper h is the output of a block's sublayer and the adapters come after it; here it is the input
    of the routed layer. The authors' annealed temperature is an option of the link, which may follow a schedule.

    Options:
        width: of queries and keys; null for as many as the layer gives out, as in the paper.
        dropout: on the scores, in training (the authors drop them before the softmax).
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        width: int | None = None,
        dropout: float = 0.0,
        place: Place | None = None,
    ) -> None:
        super().__init__()
        out = place.out if place is not None and place.out is not None else dim
        width = out if width is None else width
        if isinstance(width, bool) or not isinstance(width, int) or width < 1 or not 0 <= dropout < 1:
            raise ConfigError(f"scorer 'fusion' needs width >= 1 and 0 <= dropout < 1, got {width!r} and {dropout!r}")
        self.num_experts = num_experts
        self.query, self.key = nn.Parameter(torch.empty(width, dim)), nn.Parameter(torch.empty(width, out))
        _init_rows(self.query, "kaiming")
        _init_rows(self.key, "kaiming")
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, ctx: Context, *, bank: Any) -> Tensor:
        """Score x (B, S, d) -> (B, S, N); null experts give out nothing and score 0."""
        if bank is None or getattr(bank, "form", None) not in ("lora", "rank", "fusion"):
            what = "there are none" if bank is None else f"these are of form '{getattr(bank, 'form', '?')}'"
            raise RoutingError(f"scorer 'fusion' attends to what LoRA experts give out, but {what}; use form: fusion")
        A, B = bank.stack()
        if x.shape[-1] != A.shape[1] or B.shape[0] != self.key.shape[1]:
            raise RoutingError(
                f"scorer 'fusion' reads what the experts read ({A.shape[1]} numbers) and what they give out "
                f"({B.shape[0]}), but it was made for {x.shape[-1]} and {self.key.shape[1]}; leave `feature` out, and "
                "set share: site"
            )
        # q . (W_k z_e) = s sum_r (q W_k B)_r (A x)_r over the ranks r of e: no output of any expert is formed
        per_rank = (x @ self.query.t()) @ (self.key @ B.float()) * (x @ A.float().t())
        scores = bank.layout.gather(per_rank)[..., : self.num_experts] * bank.scaling
        scores = nn.functional.pad(scores, (0, self.num_experts - scores.shape[-1]))
        return self.dropout(scores)

    def permute(self, order: Tensor) -> None:
        """Do nothing: the order of the experts is that of the bank."""


def _why_not(router: Any) -> str | None:
    if not isinstance(getattr(router.bank, "value", None), Tensor):
        return "it presses the values of experts of form 'fusion', which this adapter does not have"
    return None


@losses.register("fusion_value", at_balance=lambda experts: 0.0, given=("parts",), why_not=_why_not)
def fusion_value(routing: Routing, ctx: Context, *, parts: Parts) -> Tensor:
    """Return `||I - V||_F^2` of the experts of form `fusion` (AdapterFusion, arXiv 2005.00247, weight 0.01)."""
    value = parts.router.bank.value
    return (torch.eye(len(value), device=value.device, dtype=value.dtype) - value).square().sum().float()
