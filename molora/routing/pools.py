"""Pools: what a per-prompt decision reads, made of the hidden states of the prompt: (B, S, d) -> (B, 1, d)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..registry import Registry
from .types import Context

pools = Registry("pool")


@pools.register("mean")
class MeanPool(nn.Module):
    """Mean over the prompt."""

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        """Pool x (B, S, d) over inside (B, S) bool -> (B, 1, d)."""
        weights = inside.to(x.dtype)[..., None]
        return (x * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp_min(1.0)


@pools.register("last")
class LastPool(nn.Module):
    """The last prompt token."""

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        """Pool x (B, S, d) over inside (B, S) bool -> (B, 1, d)."""
        positions = torch.arange(x.shape[1], device=x.device).expand(inside.shape)
        last = torch.where(inside, positions, torch.zeros_like(positions)).amax(1)
        return x.gather(1, last[:, None, None].expand(-1, 1, x.shape[-1]))


@pools.register("max")
class MaxPool(nn.Module):
    """Largest value over the prompt, per feature."""

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        """Pool x (B, S, d) over inside (B, S) bool -> (B, 1, d)."""
        lowest = torch.finfo(x.dtype).min
        return x.masked_fill(~inside[..., None], lowest).amax(1, keepdim=True)


@pools.register("attention")
class AttentionPool(nn.Module):
    """Softmax attention of one learned query over the prompt (the self-attention pool of MiLoRA, arXiv 2410.18035)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(dim))  # zero: starts as the mean

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        """Pool x (B, S, d) over inside (B, S) bool -> (B, 1, d)."""
        weights = (x @ self.query / x.shape[-1] ** 0.5).masked_fill(~inside, torch.finfo(x.dtype).min)
        return torch.softmax(weights, -1)[:, None] @ x


def prompt_tokens(x: Tensor, ctx: Context) -> Tensor:
    """Return (B, S) bool: the tokens that a per-prompt decision may read.

    These are the valid prompt tokens; a row without any (everything in it is supervised) reads its first valid token,
    so that no decision ever looks at an answer. A row of padding only reads its first position, which nothing counts.
    """
    ones = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    valid = ones if ctx.valid is None else ctx.valid.to(x.device)
    inside = valid if ctx.prompt is None else valid & ctx.prompt.to(x.device)
    valid = torch.where(valid.any(1, keepdim=True), valid, ones)
    first = valid & (valid.long().cumsum(1) == 1)
    return torch.where(inside.any(1, keepdim=True), inside, first)
