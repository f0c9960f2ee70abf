"""Shared: the weights of experts that are always on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import ConfigError

SHARED_GATES = ("none", "sigmoid")


class Shared(nn.Module):
    """The weights of experts that are always on (DeepSeekMoE, arXiv 2401.06066): no choice touches them.

    Args:
        dim: hidden size d.
        num: how many shared experts.
        gate: `none` (the constant weight) or `sigmoid` (`weight * sigmoid(w x)` per expert, as in Qwen2-MoE).
        weight: the constant.
    """

    def __init__(self, dim: int, num: int, *, gate: str = "none", weight: float = 1.0) -> None:
        super().__init__()
        if gate not in SHARED_GATES:
            raise ConfigError(f"experts.shared_gate {gate!r} is unknown; known: {', '.join(SHARED_GATES)}")
        self.num, self.constant = num, float(weight)
        self.weight = nn.Parameter(torch.zeros(num, dim)) if gate == "sigmoid" else None

    def forward(self, x: Tensor, like: Tensor) -> Tensor:
        """Return (B, S, num) for hidden states x (B, S, d) and gates `like` (B, S, E)."""
        if self.weight is None:
            return like.new_full((*like.shape[:-1], self.num), self.constant)
        return self.constant * torch.sigmoid(x @ self.weight.t())
