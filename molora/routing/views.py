"""Views: scorers that also change what the experts read, and the losses that belong to them.

A scorer that leaves the note `view` (B, S, d) gives the experts this input instead of the layer's own, under the gates
of its router: `y = W x + bank(view, gates)`. Beside an ordinary router it stands in a branch (see branches.py), and
then the same experts run twice. Such scorers have `edits_input = True`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from ..registry import Spec, split_spec
from .losses import Parts, losses, mean_over_tokens
from .recompute import in_backward
from .scorers import scorers
from .types import Context, Routing

_TOKENS_ONLY = "reads the hidden states of tokens: leave `feature` out, and set granularity: token"


@scorers.register("codebook", given=("x", "notes"), beside=("norm",))
class Codebook(nn.Module):
    """Score by the nearest code, and show the experts x pulled towards it (VQMoE, arXiv 2411.19402).

    With codes V (N, d), expert e owns the codes j with j mod E = e and scores `-min ||x - v_j||^2` over them, so that
    the best expert is `j* mod E`, j* = argmin ||x - v_j||^2. The experts read `LayerNorm(x + pull * sg(v_j* - x))`; its
    gradient goes straight through to x. The codes learn from the loss `commitment` alone: sg cuts them off here.

    Options:
        codes: N, rounded up to a multiple of E.
        pull: c, 0.05 to 0.1 in the authors' code.
        init: standard deviation of the codes at the start.
    """

    edits_input = True

    def __init__(self, dim: int, num_experts: int, *, codes: int = 512, pull: float = 0.05, init: float = 1.0) -> None:
        super().__init__()
        if codes < 1 or not init > 0:
            raise ConfigError(f"scorer 'codebook' needs codes >= 1 and init > 0, got codes={codes}, init={init}")
        self.num_experts, self.pull = num_experts, float(pull)
        self.weight = nn.Parameter(init * torch.randn(math.ceil(codes / num_experts) * num_experts, dim))
        self.norm = nn.LayerNorm(dim)

    def forward(self, read: Tensor, ctx: Context, *, x: Tensor, notes: dict[str, Tensor]) -> Tensor:
        """Score x (B, S, d) -> (B, S, E); leaves the nearest code as note `code` (B, S, d), and the view."""
        if read.shape != x.shape:
            raise ConfigError(f"scorer 'codebook' {_TOKENS_ONLY}")
        distance = (x**2).sum(-1, keepdim=True) - 2 * F.linear(x, self.weight) + (self.weight**2).sum(-1)
        nearest = distance.detach().argmin(-1)
        code = notes["code"] = self.weight[nearest]
        notes["view"] = self.norm(x + self.pull * (code - x).detach())
        return -distance.unflatten(-1, (-1, self.num_experts)).amin(-2)

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Put the experts, with the codes they own, in another order."""
        by_expert = self.weight.unflatten(0, (-1, self.num_experts))
        self.weight.copy_(by_expert[:, order].flatten(0, 1))


@losses.register("commitment", at_balance=lambda experts: 0.0, given=("parts",), reads_notes=True)
def commitment(routing: Routing, ctx: Context, *, beta: float = 0.25, parts: Parts) -> Tensor:
    """Return `||v - sg x||^2 + beta ||x - sg v||^2` for the nearest code v of x, a mean over features (VQMoE).

    0 for a decision without a codebook. Whether the authors sum or average over features is not known to us; the
    average does not depend on the width of the layer.
    """
    code = (routing.notes or {}).get("code")
    if code is None:
        return routing.probs.sum() * 0.0
    x = parts.hidden.float()
    apart = (code - x.detach()) ** 2 + beta * (x - code.detach()) ** 2
    return mean_over_tokens(apart.mean(-1), ctx.weights(code))


@scorers.register("noisy_view", given=("x", "notes", "generator"))
class NoisyView(nn.Module):
    """Decide on a noisy copy of the states, which the experts read too, in training (S2MoE, arXiv 2503.23007).

    `x' = x * e1 + e2` with `e1 ~ N(1, size^2)` and `e2 ~ N(0, (size * sigma)^2)`, sigma (d,) the standard deviation of
    the states. This fit of the noise is inferred: the paper's formula is not known to us. sigma is a running average
    over real tokens that moves once per optimizer step and starts at 0, so that no token sees others of its batch. In
    evaluation x' = x, the mean of the noisy view.

    Options:
        scorer: what scores x'; with `like` in a branch, that of another branch is used.
        size: of the noise.
        momentum: of the running average.
    """

    edits_input = True
    variance: Tensor
    mean: Tensor
    steps: Tensor

    def __init__(
        self, dim: int, num_experts: int, *, scorer: Spec = "linear", size: float = 0.1, momentum: float = 0.99
    ) -> None:
        super().__init__()
        name = split_spec(scorer, "scorer")[0]
        if scorers.fact(name, "given", ()) or scorers.fact(name, "reads"):
            raise ConfigError(f"scorer 'noisy_view' cannot score with '{name}'; use linear, mlp or cosine")
        if size < 0 or not 0 <= momentum < 1:
            raise ConfigError(f"scorer 'noisy_view' needs size >= 0 and 0 <= momentum < 1, got {size} and {momentum}")
        self.inner = scorers.build(scorer, dim, num_experts)
        self.size, self.momentum = float(size), float(momentum)
        for name in ("mean", "variance"):
            self.register_buffer(name, torch.zeros(dim))
        self.register_buffer("steps", torch.zeros(()))
        self.seen: list[Tensor] | None = None  # count, sum and sum of squares since the last step

    def borrow(self, scorer: nn.Module) -> None:
        """Score with another router's scorer, which alone holds, trains and saves the weights."""
        del self._modules["inner"]
        self.__dict__["inner"] = scorer  # not through nn.Module, which would register it a second time

    def forward(
        self, read: Tensor, ctx: Context, *, x: Tensor, notes: dict[str, Tensor], generator: torch.Generator | None
    ) -> Tensor:
        """Score x (B, S, d) -> (B, S, E); leaves the view in training."""
        if read.shape != x.shape:
            raise ConfigError(f"scorer 'noisy_view' {_TOKENS_ONLY}")
        if not ctx.training:
            return self.inner(read, ctx)
        self._observe(x, ctx)
        first, second = torch.randn(2, *x.shape, generator=generator, device=x.device)
        notes["view"] = x * (1 + self.size * first) + self.size * self.variance.sqrt() * second
        return self.inner(notes["view"], ctx)

    @torch.no_grad()
    def _observe(self, x: Tensor, ctx: Context) -> None:
        if in_backward():
            return
        real = x.detach() * ctx.weights(x)[..., None]
        found = [ctx.weights(x).sum(), real.flatten(0, 1).sum(0), (real**2).flatten(0, 1).sum(0)]
        self.seen = found if self.seen is None else [a + b for a, b in zip(self.seen, found, strict=True)]

    @torch.no_grad()
    def settle(self) -> None:
        """Move the running averages by what was seen since the last call; does nothing when nothing was."""
        if self.seen is None:
            return
        seen, self.seen = torch.cat([part.reshape(-1) for part in self.seen]).to(self.mean.device), None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(seen)
        count, dim = seen[0].clamp_min(1.0), len(self.mean)
        mean, square = seen[1 : dim + 1] / count, seen[dim + 1 :] / count
        self.steps += 1
        rate = torch.clamp(1 / self.steps, min=1 - self.momentum)  # a plain average at first
        self.variance.lerp_((square - mean**2).clamp_min(0.0), rate)
        self.mean.lerp_(mean, rate)

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Put the experts in another order."""
        if "inner" in self._modules:  # a borrowed scorer is permuted where it lives
            self.inner.permute(order)

    def __getstate__(self) -> dict[str, Any]:
        """Leave pending counts out of copies and pickles."""
        return self.__dict__ | {"seen": None}


@losses.register("output_contrast", at_balance=lambda experts: 0.0, given=("parts",), reads_notes=True)
def output_contrast(routing: Routing, ctx: Context, *, temperature: float = 0.1, parts: Parts) -> Tensor:
    """Return the InfoNCE between what the experts give for x and for its noisy view (S2MoE; its details are inferred).

    Both outputs of a token belong together; the other tokens of its row are the negatives. Cosine similarity over a
    temperature, symmetric, `ln S` at chance for S real tokens in a row. 0 for a decision with a single input.
    """
    if not temperature > 0:
        raise ConfigError(f"output_contrast needs temperature > 0, got {temperature}")
    if len(routing.passes) < 2 or parts.router.bank is None:
        return routing.probs.sum() * 0.0
    sides = []
    for view, gates in routing.passes[:2]:
        x = parts.hidden.float() if view is None else view
        sides.append(F.normalize(parts.router.bank(x, gates).float(), dim=-1, eps=1e-6))
    real = ctx.weights(parts.hidden)
    similar = sides[0] @ sides[1].transpose(1, 2) / temperature  # (B, S, S)
    similar = similar.masked_fill(~real.bool()[:, None], -1e9)  # padding is nobody's negative
    back = (sides[1] @ sides[0].transpose(1, 2) / temperature).masked_fill(~real.bool()[:, None], -1e9)
    own = torch.arange(similar.shape[1], device=similar.device).expand(similar.shape[:2])
    each = [F.cross_entropy(one.transpose(1, 2), own, reduction="none") for one in (similar, back)]
    return mean_over_tokens((each[0] + each[1]) / 2, real)
