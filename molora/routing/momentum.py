"""Contrast between tasks: a scorer with a slow copy of itself, and the loss that compares two halves of a batch."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from ..registry import Spec, split_spec
from .losses import Parts, losses
from .scorers import scorers
from .types import Context, Routing


@scorers.register("momentum", given=("notes",), beside=("compare",))
class Momentum(nn.Module):
    """A scorer with a slow copy of itself, for the loss `task_contrast` (T2MIR, arXiv 2506.05426).

    The note `key` holds the scores of the copy, without gradient and noise. Once per optimizer step the copy moves by
    `rate` towards the scorer; it is saved with it. `compare` (E, E) is the bilinear form of the loss, starting at the
    identity.

    Options:
        scorer: what makes the scores.
        rate: tau; 0.005 in a config of the authors, 0.05 their default.
    """

    def __init__(self, dim: int, num_experts: int, *, scorer: Spec = "linear", rate: float = 0.005) -> None:
        super().__init__()
        name = split_spec(scorer, "scorer")[0]
        if set(scorers.fact(name, "given", ())) - {"notes"} or scorers.fact(name, "reads"):
            raise ConfigError(f"scorer 'momentum' cannot copy '{name}'; use linear, mlp, cosine or noisy")
        if not 0 < rate <= 1:
            raise ConfigError(f"scorer 'momentum' needs 0 < rate <= 1, got {rate}")
        self._takes = scorers.fact(name, "given", ())
        self.inner, self.slow = (scorers.build(scorer, dim, num_experts) for _ in range(2))
        self.slow.load_state_dict(self.inner.state_dict())
        self.compare = nn.Parameter(torch.eye(num_experts))
        self.rate, self.used = float(rate), False
        self.freeze()

    def freeze(self) -> None:
        """Make sure that the copy is not trainable."""
        self.slow.requires_grad_(False)

    def forward(self, x: Tensor, ctx: Context, *, notes: dict[str, Tensor]) -> Tensor:
        """Score x (B, S, d) -> (B, S, E)."""
        given = {"notes": notes} if self._takes else {}
        if ctx.training:
            self.used = True
            with torch.no_grad():
                quiet = dataclasses.replace(ctx, training=False)
                notes["key"] = self.slow(x, quiet, **({"notes": {}} if self._takes else {}))
        return self.inner(x, ctx, **given)

    @torch.no_grad()
    def settle(self) -> None:
        """Move the copy, if there was a training forward since the last call."""
        if self.used:
            self.used = False
            for slow, fast in zip(self.slow.parameters(), self.inner.parameters(), strict=True):
                slow.lerp_(fast, self.rate)

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Put the experts in another order."""
        self.inner.permute(order)
        self.slow.permute(order)
        self.compare.copy_(self.compare[order][:, order])


@losses.register("task_contrast", at_balance=lambda experts: 0.0, given=("parts",), reads_notes=True)
def task_contrast(routing: Routing, ctx: Context, *, parts: Parts) -> Tensor:
    """Return the InfoNCE between the two halves of the batch, which are two views of the same tasks (T2MIR).

    Logits `q_i W k_j`: q the scores of the rows of one half, k the slow copy's of the other (see `momentum`); the mean
    of both directions, `ln(B / 2)` at chance. Row i and row i + B / 2 must belong to one task. Where the caller tells
    `task_ids`, pairs of different tasks do not count and other rows of the same task are no negatives. 0 for an odd
    number of rows, and without a `momentum` scorer. Whether q and k are scores or probs in the authors' code is not
    known to us.
    """
    key = (routing.notes or {}).get("key")
    half = routing.scores.shape[0] // 2
    if key is None or half == 0 or routing.scores.shape[0] != 2 * half:
        return routing.probs.sum() * 0.0
    query, key = routing.scores.mean(1), key.mean(1)
    pairs = torch.eye(half, dtype=torch.bool, device=query.device)
    counts = torch.ones(half, device=query.device)
    ignored = torch.zeros_like(pairs)
    if ctx.task_ids is not None and ctx.task_ids.numel() == 2 * half:
        first, second = ctx.task_ids.to(query.device).reshape(2, half)
        counts = (first == second).float()
        ignored = (first[:, None] == second[None]) & ~pairs
    compare = parts.router.scorer.compare.float()
    forward = query[:half] @ compare @ key[half:].t()
    backward = query[half:] @ compare @ key[:half].t()
    own = torch.arange(half, device=query.device)
    each = F.cross_entropy(forward.masked_fill(ignored, -1e9), own, reduction="none")
    each = each + F.cross_entropy(backward.masked_fill(ignored.t(), -1e9), own, reduction="none")
    return 0.5 * (each * counts).sum() / counts.sum().clamp_min(1.0)
