"""Link functions: scores (B, S, E) -> probs (B, S, E), both float32."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError
from ..registry import Registry

links = Registry("link")


def _cooled(scores: Tensor, temperature: float) -> Tensor:
    if not temperature > 0:
        raise ConfigError(f"link temperature must be positive, got {temperature}")
    return scores if temperature == 1.0 else scores / temperature


@links.register("softmax")
def softmax(scores: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Softmax over experts; `temperature` divides the scores."""
    return torch.softmax(_cooled(scores, temperature), dim=-1)


@links.register("sigmoid")
def sigmoid(scores: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Independent sigmoid per expert (SMoRA, arXiv 2501.15103); the probs do not sum to 1."""
    return torch.sigmoid(_cooled(scores, temperature))
