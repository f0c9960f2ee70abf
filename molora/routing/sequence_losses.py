"""Auxiliary losses of neighbouring tokens: what makes the experts of a stretch of text few (BlockFFN, 2507.08771).

They need the order of tokens, so they read decisions per token, and a decision per row costs nothing. Padding is left
out wherever it stands: neighbours are valid tokens side by side, and chunks are counted in valid tokens. Documents that
are packed into one row are not told apart, since a model is not told where they begin.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError
from .losses import losses, shares
from .types import Context, Routing


@losses.register("locality", at_balance=lambda experts: math.log(2), reads="neighbours")
def locality(routing: Routing, ctx: Context, *, sharpness: float = 100.0) -> Tensor:
    """Return the cross-entropy of each token's gates with those of the token before, as soft switches.

    `mean BCE(sigmoid(s z_{t-1}), target sigmoid(s z_t))` over neighbours and experts; both sides get a gradient. 0 when
    neighbours agree with saturated switches; ln 2 at scores 0; about 0.4 s for random scores of variance 1, so keep
    its weight small (1e-3 to 2e-3).

    Options:
        sharpness: s.
    """
    if not sharpness > 0:
        raise ConfigError(f"locality needs sharpness > 0, got {sharpness}")
    weights = ctx.weights(routing.scores)
    both = weights[:, 1:] * weights[:, :-1]
    before, after = sharpness * routing.scores[:, :-1], sharpness * routing.scores[:, 1:]
    loss = (F.softplus(before) - before * torch.sigmoid(after)).mean(-1)
    return (loss * both).sum() / both.sum().clamp_min(1.0)


@losses.register("chunk", at_balance=lambda experts: 1 - (1 - 1 / experts) ** 64, reads="neighbours")
def chunk(routing: Routing, ctx: Context, *, size: int = 64) -> Tensor:
    """Return the soft share of experts that a chunk of tokens uses: `1 - mean_{chunk,e} prod_t (1 - q_te)`.

    q are the probs over their sum. 1 / E when one expert serves a whole chunk, `1 - (1 - 1/E)^size` at uniform, 0 when
    nothing is on. The last chunk of a row may be shorter and counts as much as any other.

    Options:
        size: valid tokens per chunk.
    """
    if size < 1:
        raise ConfigError(f"chunk needs size >= 1, got {size}")
    weights = ctx.weights(routing.probs)
    # valid tokens first, in order; what follows multiplies by 1
    order = (weights == 0).to(torch.uint8).argsort(dim=1, stable=True)
    valid = weights.gather(1, order)
    off = 1 - shares(routing).gather(1, order[..., None].expand_as(routing.probs)) * valid[..., None]
    missing = -off.shape[1] % size
    off = F.pad(off, (0, 0, 0, missing), value=1.0).unflatten(1, (-1, size))
    used = F.pad(valid, (0, missing)).unflatten(1, (-1, size)).amax(-1)  # (B, chunks): holds a valid token
    share = 1 - off.prod(2).mean(-1)
    return (share * used).sum() / used.sum().clamp_min(1.0)
