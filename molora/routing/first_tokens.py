"""The pool `first_tokens`: a prompt's decision reads its first tokens one by one, not their mean."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .pools import pools


@pools.register("first_tokens")
class FirstTokens(nn.Module):
    """The first n prompt tokens, laid end to end: (B, S, d) -> (B, 1, n d) (Union of Experts, arXiv 2503.02495).

    Shorter prompts are filled up with zeros.

    Options:
        tokens: n; the authors' number is not known to us.
    """

    def __init__(self, dim: int, *, tokens: int = 4) -> None:
        super().__init__()
        if tokens < 1:
            raise ConfigError(f"pool 'first_tokens' needs tokens >= 1, got {tokens}")
        self.tokens, self.dim = tokens, dim * tokens

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        """Pool x (B, S, d) over inside (B, S) bool -> (B, 1, n d)."""
        rank = inside.long().cumsum(1) - 1
        # the place of each token among the n; what is not among them goes to an n + 1st, which is cut off
        place = torch.where(inside & (rank < self.tokens), rank, torch.full_like(rank, self.tokens))
        x = torch.where(inside[..., None], x, torch.zeros_like(x))
        laid = x.new_zeros(x.shape[0], self.tokens + 1, x.shape[-1])
        laid = laid.scatter_add(1, place[..., None].expand_as(x), x)
        return laid[:, : self.tokens].flatten(1)[:, None]
