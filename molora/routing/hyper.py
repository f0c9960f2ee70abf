"""A scorer whose weights are made by a frozen random network from one learned vector."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from .scorers import Linear, scorers
from .types import Context


@scorers.register("hyper")
class Hyper(nn.Module):
    """Linear scores whose weights a frozen random MLP makes from a learned vector (HyperRouter, arXiv 2312.07035).

    `[W | b] = reshape(MLP(e), (E, d + 1))`, `scores = W x + b`: between a trained and a random router, only the d
    numbers of e learn. The MLP (d -> hidden -> E (d + 1), ReLU) is drawn once, never trained, and saved with the
    adapter, `hidden * E * (d + 1)` numbers per router: use `share: block`. W does not depend on x, so `fold()` returns
    an ordinary linear scorer that decides alike.

    The draw is nn.Linear's, and e starts as N(0, 1), as in the authors' code. For inputs of unit variance the scores
    then start with a variance near d / 18, so that the softmax is almost one-hot at d = 4096. A temperature of the link
    cools them, and slows e down by as much.

    Options:
        hidden: width of the MLP (256 in the authors' code, 64 in their scripts).
    """

    def __init__(self, dim: int, num_experts: int, *, hidden: int = 256) -> None:
        super().__init__()
        if hidden < 1:
            raise ConfigError(f"scorer 'hyper' needs hidden >= 1, got {hidden}")
        self.num_experts, self.size = num_experts, dim
        self.embedding = nn.Parameter(torch.randn(dim))
        inner, outer = nn.Linear(dim, hidden), nn.Linear(hidden, num_experts * (dim + 1))
        # buffers: saved with the adapter, and never trained, whatever PEFT switches on
        self.register_buffer("inner_weight", inner.weight.detach())
        self.register_buffer("inner_bias", inner.bias.detach())
        self.register_buffer("outer_weight", outer.weight.detach())
        self.register_buffer("outer_bias", outer.bias.detach())

    def made(self) -> tuple[Tensor, Tensor]:
        """Return the weights W (E, d) and b (E,) that the MLP makes."""
        hidden = torch.relu(F.linear(self.embedding, self.inner_weight, self.inner_bias))
        made = F.linear(hidden, self.outer_weight, self.outer_bias).view(self.num_experts, self.size + 1)
        return made[:, :-1], made[:, -1]

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """Score x (B, S, d) -> (B, S, E)."""
        return F.linear(x, *self.made())

    @torch.no_grad()
    def fold(self) -> Linear:
        """Return a linear scorer with a bias that decides as this one does now, without the MLP."""
        folded = Linear(self.size, self.num_experts, bias=True).to(self.embedding.device)
        weight, bias = self.made()
        folded.weight.copy_(weight)
        folded.bias.copy_(bias)
        return folded

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Put the experts in another order."""
        for tensor in (self.outer_weight, self.outer_bias):
            rows = tensor.view(self.num_experts, self.size + 1, -1)
            rows.copy_(rows[order])
