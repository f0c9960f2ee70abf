"""Scorers and pools with attention: Yuan's attention over experts, SCOPE's cross-attention, the bidirectional MoS."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from .pools import pools
from .scorers import scorers
from .types import Context


@scorers.register("attention")
class Attention(nn.Module):
    """Attention among the experts of one token (Yuan 2.0-M32, arXiv 2405.17976): `z_i = sum_j softmax_j(q_i k_j) v_j`.

    q, k, v = Wq x, Wk x, Wv x in R^E, one number per expert, no scale. Each score lies between the least and the
    largest v. No token reads another. With q = 0 all scores are equal, so the three maps start at random.
    """

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(num_experts, dim))
        self.key = nn.Parameter(torch.empty(num_experts, dim))
        self.value = nn.Parameter(torch.empty(num_experts, dim))
        for weight in (self.query, self.key, self.value):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """Score x (B, S, d) -> (B, S, E)."""
        query, key, value = (F.linear(x, weight) for weight in (self.query, self.key, self.value))
        mixing = torch.softmax(query[..., :, None] * key[..., None, :], -1)  # (B, S, E, E)
        return (mixing @ value[..., None])[..., 0]

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Put the experts in another order."""
        for weight in (self.query, self.key, self.value):
            weight.copy_(weight[order])


@pools.register("cross_attention")
class CrossAttentionPool(nn.Module):
    """Prompt tokens attend to shared features, and the result is averaged (SCOPE, arXiv 2510.12974; inferred).

    SCOPE's text prompt attends to the image features of its shared encoder. Adapters of a language model have no such
    features, so here they are learned, `mean_t softmax(Q x_t K^T / sqrt(width)) V`, with K: (features, width) and
    V: (features, d). How SCOPE pools, and how many heads it has, is not known to us.

    Options:
        features: how many shared features.
        width: size of queries and keys.
    """

    def __init__(self, dim: int, *, features: int = 16, width: int = 64) -> None:
        super().__init__()
        if features < 1 or width < 1:
            raise ConfigError(f"pool 'cross_attention' needs features, width >= 1, got {features}, {width}")
        self.query = nn.Linear(dim, width, bias=False)
        self.key = nn.Parameter(torch.randn(features, width) / math.sqrt(width))
        self.value = nn.Parameter(torch.randn(features, dim))

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        """Pool x (B, S, d) over inside (B, S) bool -> (B, 1, d)."""
        attention = torch.softmax(self.query(x) @ self.key.t() / math.sqrt(self.key.shape[-1]), -1)
        weights = inside.to(x.dtype)[..., None]
        attention = (attention * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp_min(1.0)
        return attention @ self.value


@pools.register("transformer")
class TransformerPool(nn.Module):
    """Bidirectional transformer blocks over the prompt, then the mean of what they return (Mixture of States).

    MoS (arXiv 2511.12207) reads prompt, latent and timestep with two such blocks. They look ahead, so they read prompt
    tokens only. Pre-norm blocks of torch.nn, without positions; width and heads are our choice.

    Options:
        layers: how many blocks.
        width: their size, also the size of what the scorer reads.
        heads: attention heads; they divide width.
    """

    def __init__(self, dim: int, *, layers: int = 2, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        if layers < 1 or width < 1 or heads < 1 or width % heads:
            raise ConfigError(f"pool 'transformer' needs heads that divide width, got {layers=}, {width=}, {heads=}")
        self.dim = width
        self.project = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True)
            for _ in range(layers)
        )

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        """Pool x (B, S, d) over inside (B, S) bool -> (B, 1, width)."""
        # junk at padding must not turn into NaN on its way to a weight of 0
        x = self.project(x.masked_fill(~inside[..., None], 0.0))
        for block in self.blocks:
            x = block(x, src_key_padding_mask=~inside)
        weights = inside.to(x.dtype)[..., None]
        x = x.masked_fill(~inside[..., None], 0.0)
        return x.sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp_min(1.0)
