"""Scorer `mixture`: several routers score the experts, and a main router weighs the routers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .scorers import _init_rows, scorers
from .types import Context

MODES = ("prob", "logit")


@scorers.register("mixture")
class Mixture(nn.Module):
    """A mixture of linear routers (MoR, arXiv 2503.23362; the equations are inferred, we have seen the abstract only).

    `m = softmax(W_0 x)` over M sub-routers W_j: (E, d). Mode `prob`: `scores = log sum_j m_j softmax(W_j x)`, so that
    the link softmax gives the mixture of their probabilities. Mode `logit`: `scores = sum_j m_j W_j x`; with weights m
    that do not depend on the input this is one linear router. Every sub-router is drawn on its own: sub-routers that
    start equal would stay equal.

    Options:
        routers: M, the number of sub-routers (not known from the paper).
        mode: `prob` or `logit`.
        init: of all rows, as for the scorer linear.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        routers: int = 4,
        mode: str = "prob",
        init: str | float = "kaiming",
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ConfigError(f"mixture mode {mode!r} is unknown; known: {', '.join(MODES)}")
        if routers < 1:
            raise ConfigError(f"mixture needs at least 1 sub-router, got {routers}")
        self.mode = mode
        self.main = nn.Parameter(torch.empty(routers, dim))
        self.weight = nn.Parameter(torch.empty(routers, num_experts, dim))
        _init_rows(self.main, init)
        for rows in self.weight.data:  # the start of a linear router depends on d, which 3-D rows would hide
            _init_rows(rows, init)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """Score x (B, S, d) -> (B, S, E)."""
        shares = torch.log_softmax(x @ self.main.t(), -1)  # (B, S, M)
        scores = torch.einsum("bsd,med->bsme", x, self.weight)
        if self.mode == "logit":
            return (shares.exp()[..., None] * scores).sum(-2)
        return torch.logsumexp(shares[..., None] + torch.log_softmax(scores, -1), -2)

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Put the experts in another order."""
        self.weight.copy_(self.weight[:, order])
