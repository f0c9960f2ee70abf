"""Routing by input and task together: a gate per task, and the experts that a task may use (MMoE, HoME)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import ConfigError, RoutingError
from .scorers import scorers
from .selectors import selectors, weigh
from .types import Context


def tasks_of(ctx: Context, rows: int, num_tasks: int, device: torch.device) -> Tensor:
    """Return the task (B,) of each row, -1 for unknown; raise RoutingError when none was given or it does not exist."""
    if ctx.task_ids is None:
        raise RoutingError(
            "this adapter routes by task, but no task_ids reached the forward; pass task_ids=(B,) to the model, or set "
            "them with `with molora.using(model, task_ids=...)` around generate()"
        )
    ids = ctx.task_ids.to(device).reshape(-1)
    if ids.numel() not in (1, rows):
        raise RoutingError(
            f"task_ids holds {ids.numel()} ids for a batch of {rows}; give one per row, and leave out layers that "
            "read something else (in DeBERTa, query_proj and key_proj read positions too) with exclude_modules"
        )
    if ids.numel() and int(ids.max()) >= num_tasks:
        raise RoutingError(f"task id {int(ids.max())} is out of range; this adapter knows {num_tasks}")
    return ids.expand(rows)


@scorers.register("multi_gate")
class MultiGate(nn.Module):
    """A linear scorer per task, `scores = W_task x` (MMoE, the gates of HoME, arXiv 2408.05430).

    A row whose task is unknown (-1) is scored by the mean of all tasks.

    Options:
        num_tasks: how many tasks there are.
    """

    def __init__(self, dim: int, num_experts: int, *, num_tasks: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_tasks, num_experts, dim))
        nn.init.uniform_(self.weight, -1 / math.sqrt(dim), 1 / math.sqrt(dim))  # as nn.Linear draws its rows

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """Score x (B, S, d) -> (B, S, E)."""
        ids = tasks_of(ctx, x.shape[0], self.weight.shape[0], x.device)
        rows = torch.where((ids >= 0)[:, None, None], self.weight[ids.clamp_min(0)], self.weight.mean(0))
        return x @ rows.mT

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Put the experts in another order."""
        self.weight.copy_(self.weight[:, order])


@selectors.register("task_mask", given=("scores",))
class TaskMask(nn.Module):
    """A task uses the experts that are its own or shared with it, and no others (HoME, arXiv 2408.05430; inferred).

    The probs of the experts in `allowed` are divided by their sum, which is the softmax among them. Those in `own` are
    left out of that mixture and get `sigmoid(score)` beside it (the self-gate). A row whose task is unknown (-1) may
    use all experts and owns none.

    Options:
        allowed: per task, the numbers of the experts that it may mix.
        own: per task, the numbers of the experts with a gate of their own; none for nobody.
    """

    def __init__(
        self,
        dim: int,
        num_choices: int,
        *,
        allowed: Sequence[Sequence[int]],
        own: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        own = [[] for _ in allowed] if own is None else own
        lists = {"allowed": allowed, "own": own}
        for name, experts in lists.items():
            far = sorted({e for row in experts for e in row if not 0 <= e < num_choices})
            if far:
                raise ConfigError(f"task_mask.{name} names expert {far[0]}, but there are {num_choices}, from 0")
        if len(own) != len(allowed) or not len(allowed):
            raise ConfigError(f"task_mask needs one list per task, got {len(allowed)} in allowed, {len(own)} in own")
        idle = [task for task, pair in enumerate(zip(allowed, own, strict=True)) if not any(pair)]
        if idle:
            raise ConfigError(f"task_mask leaves task {idle[0]} without any expert")
        for name, experts in lists.items():
            mask = torch.zeros(len(allowed), num_choices, dtype=torch.bool)
            for task, row in enumerate(experts):
                mask[task, list(row)] = True
            self.register_buffer(name, mask)

    def forward(self, probs: Tensor, ctx: Context, *, progress: float, scores: Tensor) -> Tensor:
        """Return gates (B, S, E) for probs and scores (B, S, E)."""
        ids = tasks_of(ctx, probs.shape[0], self.allowed.shape[0], probs.device)
        known, rows = (ids >= 0)[:, None], ids.clamp_min(0)
        own = (self.own[rows] & known)[:, None]
        mixed = (self.allowed[rows] | ~known)[:, None] & ~own
        return weigh(probs, mixed, normalise="sum1") + own * torch.sigmoid(scores)

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Put the experts in another order."""
        self.allowed.copy_(self.allowed[:, order])
        self.own.copy_(self.own[:, order])
