"""What a router is told and what it answers: `Context` and `Routing`.

Shape letters used in this folder: B rows of the batch, S positions, d hidden size, E experts.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Context:
    """What is known about one forward besides the hidden states.

    Attributes:
        valid: (B, S) bool, False at padding; None means that every position is a real token.
        prompt: (B, S) bool, True at prompt tokens; None means that every valid token belongs to the prompt.
        task_ids: (B,) long, the task of each row, -1 for unknown; None when no tasks were given.
        progress: how far training is, in [0, 1]; schedules read it.
        pinned: gates that replace every decision, broadcastable to (B, S, E); None lets routers decide.
        training: whether this is a training forward (noise and exploration are allowed).
    """

    valid: Tensor | None = None
    prompt: Tensor | None = None
    task_ids: Tensor | None = None
    progress: float = 0.0
    pinned: Tensor | None = None
    training: bool = False

    def fit(self, x: Tensor) -> Context:
        """Return the context with the masks that do not describe the leading axes of `x` (B, S, d) removed."""

        def fitting(mask: Tensor | None) -> Tensor | None:
            return mask if mask is not None and mask.shape == x.shape[:-1] else None

        valid, prompt = fitting(self.valid), fitting(self.prompt)
        if valid is self.valid and prompt is self.prompt:
            return self
        return dataclasses.replace(self, valid=valid, prompt=prompt)

    def weights(self, like: Tensor) -> Tensor:
        """Return (B, S) float32 weights of the decisions in `like` (B, S, E): 1 at real tokens, 0 at padding.

        A decision per row (S = 1) counts unless the row is all padding.
        """
        valid = self.valid
        if valid is not None and like.shape[1] == 1 and valid.shape[0] == like.shape[0]:
            valid = valid.any(1, keepdim=True)
        if valid is not None and valid.shape == like.shape[:-1]:
            return valid.to(device=like.device, dtype=torch.float32)
        return torch.ones(like.shape[:-1], dtype=torch.float32, device=like.device)


@dataclass(frozen=True)
class Routing:
    """One routing decision, all float32.

    Attributes:
        scores: (B, S, E) raw scores of the scorer; S is 1 when the decision is per prompt or per task.
        probs: (B, S, E) scores after the link function.
        gates: (B, S, E) weights that multiply the experts; zero means "not routed".
    """

    scores: Tensor
    probs: Tensor
    gates: Tensor

    @property
    def num_experts(self) -> int:
        """The number of experts E."""
        return self.gates.shape[-1]

    @property
    def selected(self) -> Tensor:
        """(B, S, E) bool: which experts are routed to."""
        return self.gates != 0

    def detach(self) -> Routing:
        """Return the same decision without its graph."""
        return Routing(self.scores.detach(), self.probs.detach(), self.gates.detach())
