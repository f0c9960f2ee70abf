"""Noise in routers, in training only: on what they read (a feature) and, with a learned size, on scores (a scorer)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from ..registry import Spec, split_spec
from .features import features
from .scorers import scorers
from .types import Context

KINDS = ("jitter", "gaussian", "dropout")


@features.register("noise")
class Noise(nn.Module):
    """Noise on what the router reads, in training only; the experts see the states as they are.

    Options:
        kind: `jitter` multiplies each number by a draw from U(1 - size, 1 + size) (Switch, arXiv 2101.03961: 0.01),
            `gaussian` adds N(0, size^2), `dropout` drops with probability `size`.
        size: how much, see `kind`.
    """

    def __init__(self, dim: int, *, kind: str = "jitter", size: float = 0.01) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ConfigError(f"noise kind {kind!r} is unknown; known: {', '.join(KINDS)}")
        if size < 0 or (kind != "gaussian" and size >= 1):
            raise ConfigError(
                f"noise of kind '{kind}' needs 0 <= size{'' if kind == 'gaussian' else ' < 1'}, got {size}"
            )
        self.dim, self.kind, self.size = dim, kind, float(size)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """Return x (B, S, d) with noise in training, x itself otherwise."""
        if not ctx.training or self.size == 0:
            return x
        if self.kind == "jitter":
            return x * torch.empty_like(x).uniform_(1 - self.size, 1 + self.size)
        if self.kind == "gaussian":
            return x + self.size * torch.randn_like(x)
        return F.dropout(x, self.size, training=True)


@scorers.register("noisy", given=("notes",))
class Noisy(nn.Module):
    """Scores with Gaussian noise of a learned size, `z + N(0, 1) (softplus(W x) + eps)`, in training only.

    Noisy top-k gating (Shazeer et al., arXiv 1701.06538), also the routers of T2MIR. The size starts at ln 2 + eps
    for every token and expert (W = 0). The notes `clean` (z) and `noise` (the size), each (B, S, E), let a loss
    estimate the smooth load `Phi((z - threshold) / noise)`.

    Options:
        scorer: what makes the clean scores, a name or `{name, **options}`.
        eps: the smallest size of the noise.
    """

    def __init__(self, dim: int, num_experts: int, *, scorer: Spec = "linear", eps: float = 1e-2) -> None:
        super().__init__()
        name = split_spec(scorer, "scorer")[0]
        if scorers.fact(name, "given", ()) or scorers.fact(name, "reads"):
            raise ConfigError(
                f"scorer 'noisy' cannot add its noise to the scores of '{name}'; use linear, mlp or cosine"
            )
        if eps < 0:
            raise ConfigError(f"scorer 'noisy' needs eps >= 0, got {eps}")
        self.clean = scorers.build(scorer, dim, num_experts)
        self.size = nn.Parameter(torch.zeros(num_experts, dim))
        self.eps = float(eps)

    def forward(self, x: Tensor, ctx: Context, *, notes: dict[str, Tensor]) -> Tensor:
        """Score x (B, S, d) -> (B, S, E)."""
        clean = self.clean(x, ctx)
        if not ctx.training:
            return clean
        notes["clean"], notes["noise"] = clean, F.softplus(F.linear(x, self.size)) + self.eps
        return clean + notes["noise"] * torch.randn_like(clean)

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Put the experts in another order."""
        self.clean.permute(order)
        self.size.copy_(self.size[order])
