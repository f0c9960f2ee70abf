"""Link functions: scores (B, S, E) -> probs (B, S, E), both float32."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import Registry

links = Registry("link")


@links.register("softmax")
def softmax(scores: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Softmax over experts; `temperature` divides the scores."""
    return torch.softmax(scores if temperature == 1.0 else scores / temperature, dim=-1)


@links.register("sigmoid")
def sigmoid(scores: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Independent sigmoid per expert (SMoRA, arXiv 2501.15103); the probs do not sum to 1."""
    return torch.sigmoid(scores if temperature == 1.0 else scores / temperature)
