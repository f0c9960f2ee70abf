"""Pre-gating: one small causal router in front of the model decides for all of its layers (Read-ME, arXiv 2410.19123).

It knows a token's experts before the first layer runs, so that a server can fetch them and form batches by expert.
Used with `share: model`: the router stands at the first routed layer, whose input holds the token embeddings.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from .expert_losses import experts_of_ranks
from .features import Place, features
from .losses import Parts, losses, mean_over_tokens
from .mixing import _Mixing
from .types import Context, Routing


def rotated(x: Tensor) -> Tensor:
    """Return x (B, H, S, c) with rotary positions 0 to S - 1 (arXiv 2104.09864); c is even."""
    half = x.shape[-1] // 2
    speeds = 10000.0 ** (-torch.arange(half, device=x.device) / half)
    angles = torch.arange(x.shape[2], device=x.device)[:, None] * speeds
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angles.cos() - second * angles.sin(), first * angles.sin() + second * angles.cos()], -1)


class Block(nn.Module):
    """A transformer block of the router: rotary attention, not scaled by the head size, then an MLP.

    Args:
        width: size w of its states.
        heads: attention heads; divides w.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        """Return (B, S, w) for x (B, S, w); allowed (B, S, S) bool says who may look at whom."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(rotated(q), rotated(k), v, attn_mask=allowed[:, None], scale=1.0)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


@features.register("causal_blocks", given=("place",), remembers=True)
class CausalBlocks(_Mixing):
    """A few small causal transformer blocks over the first numbers of each state (Read-ME, arXiv 2410.19123).

    In cached decoding the states of the tokens in the cache are kept with it, `width` numbers per token, and the blocks
    run over them again. Where the model itself reads its whole input at once, the blocks do so too.

    Options:
        width: how many numbers of each state they read (all of them if there are fewer).
        blocks: how many blocks.
        heads: attention heads of each; the authors' numbers of blocks and heads are not known to us.
    """

    def __init__(self, dim: int, *, width: int = 64, blocks: int = 2, heads: int = 4, place: Place) -> None:
        super().__init__(min(width, dim), place)
        if blocks < 1 or heads < 1 or self.dim % (2 * heads):
            raise ConfigError(
                f"causal_blocks needs blocks >= 1 and a width that is a multiple of 2 x heads, got blocks={blocks}, "
                f"width={self.dim}, heads={heads}"
            )
        self.blocks = nn.ModuleList(Block(self.dim, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(self.dim)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """Return (B, S, width) for x (B, S, d)."""
        states, valid = self.seen(x[..., : self.dim], ctx)
        at = torch.arange(states.shape[1], device=x.device)
        allowed = (at[:, None] >= at) | (not ctx.causal)
        # a token of padding looks at itself, so that no row of the attention is empty
        allowed = (allowed & valid[:, None]) | torch.eye(len(at), dtype=torch.bool, device=x.device)
        for block in self.blocks:
            states = block(states, allowed)
        return self.norm(states[:, -x.shape[1] :])


def responses(router: Any, x: Tensor) -> Tensor:
    """Return `||B_e A_e x||` (B, S, E) of the experts at the layer that holds the router, for x (B, S, d)."""
    A, B = (factor.float() for factor in router.bank.stack())
    own = experts_of_ranks(router)  # (E, R)
    inner = x.float() @ A.t()
    inner = inner.repeat(1, 1, own.shape[1] // A.shape[0])  # one A for all experts: each has its own copy
    gram = (B.t() @ B) * (own.t() @ own)  # (R, R), zero between different experts
    return ((inner @ gram) * inner @ own.t()).clamp_min(0).sqrt()


def _why_not(router: Any) -> str | None:
    if router.bank is None or router.bank.num_experts < router.num_experts:
        return "it reads the experts' low-rank factors, which this router does not have"
    return None


@losses.register("response_match", at_balance=lambda experts: 0.0, given=("parts",), why_not=_why_not)
def response_match(
    routing: Routing,
    ctx: Context,
    *,
    hard: float = 0.75,
    soft: float = 0.25,
    smoothing: float = 0.5,
    parts: Parts,
) -> Tensor:
    """Return `hard CE(best expert) + soft CE(target)` of the router's scores (Read-ME, arXiv 2410.19123).

    Read-ME's targets are overlaps between the neurons a token uses and each expert's. For LoRA experts the target here
    is the softmax of how strongly each answers, `||B_e A_e x||`, which is inferred. It has no gradient. Tokens whose
    experts all answer alike (B = 0 at the start) teach nothing and do not count.

    Options:
        hard, soft: weights of the two cross-entropies.
        smoothing: label smoothing of the hard one.
    """
    with torch.no_grad():
        strength = responses(parts.router, parts.hidden)
        told = strength.amax(-1) > strength.amin(-1)
        target = torch.softmax(strength, -1)
    scores = routing.scores[..., : strength.shape[-1]]
    if scores.shape[1] != strength.shape[1]:
        raise ConfigError("loss 'response_match' compares token by token: set granularity: token")
    flat = scores.flatten(0, -2)
    value = hard * F.cross_entropy(flat, strength.argmax(-1).flatten(), reduction="none", label_smoothing=smoothing)
    value = value + soft * F.cross_entropy(flat, target.flatten(0, -2), reduction="none")
    return mean_over_tokens(value.view(told.shape), ctx.weights(scores) * told)
