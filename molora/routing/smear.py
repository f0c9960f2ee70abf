"""The router of SMEAR (arXiv 2306.03745): normalised linear scores, and gates that lose some experts in training."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from .scorers import scorers
from .selectors import check_switches, selectors
from .types import Context


@scorers.register("layer_norm")
class LayerNormed(nn.Module):
    """Linear scores of a layer-normed state by layer-normed rows, `LN(x) LN(R)^T + b`, as in SMEAR's code.

    Options:
        gain: the start of the gain of the rows' norm; small, so that all experts start nearly equal.
    """

    def __init__(self, dim: int, num_experts: int, *, gain: float = 1e-2) -> None:
        super().__init__()
        self.norm, self.row_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        nn.init.constant_(self.row_norm.weight, gain)
        self.weight = nn.Parameter(torch.randn(num_experts, dim))
        self.bias = nn.Parameter(torch.zeros(num_experts))

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """Score x (B, S, d) -> (B, S, E)."""
        return F.linear(self.norm(x), self.row_norm(self.weight), self.bias)

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Put the experts in another order."""
        self.weight.copy_(self.weight[order])
        self.bias.copy_(self.bias[order])


@selectors.register("expert_dropout", given=("generator",))
def expert_dropout(
    probs: Tensor,
    ctx: Context,
    *,
    p: float = 0.1,
    grad: str = "soft",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Drop each expert of each decision with probability p in training and share its weight among the others.

    As in SMEAR's code the rest is divided by its sum, with 1e-10 added first, so that a decision that loses all of
    its experts uses all alike. At inference nothing is dropped.
    """
    check_switches(grad=grad)
    if not 0 <= p < 1:
        raise ConfigError(f"expert_dropout needs 0 <= p < 1, got p={p}")
    if ctx.training and p > 0:
        draws = torch.rand(probs.shape, generator=generator, device=probs.device, dtype=probs.dtype)
        probs = probs * (draws >= p) + 1e-10
        probs = probs / probs.sum(-1, keepdim=True)
    return probs if grad in ("soft", "straight_through") else probs.detach()
