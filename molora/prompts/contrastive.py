"""Contrastive: one trained direction per adapter, after RouterDC (arXiv 2409.19886), over a frozen embedder.

RouterDC pulls a prompt's vector towards the models that answer it well and away from those that do not, with cosines
over a temperature. Here an adapter's own examples are what it answers well and all others of the set are what it does
not; the paper's loss between prompts trains its encoder, which is frozen here, so it is left out. The paper's
temperature is 1, at which cosines cannot be told apart with confidence (its loss cannot fall below 0.34 with three
negatives).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError
from .registry import prompt_selectors
from .scoring import Method


@prompt_selectors.register("contrastive", scores="cosine")
class Contrastive(Method):
    """The cosine with an adapter's trained direction, which starts at the mean of its examples (RouterDC).

    Minimises the cross entropy of softmax(cosines / tau), mean over adapters of the mean over their examples, by L-BFGS
    in float64. It has no other penalty: cosines are bounded, and so is what it can overfit.

    Args:
        tau: the temperature, of the loss and of the shares.
        rounds: of L-BFGS at most.
    """

    def __init__(self, *, tau: float = 0.1, rounds: int = 100) -> None:
        if not tau > 0 or rounds < 1:
            raise ConfigError(
                f"prompt selector 'contrastive': tau must be positive and rounds at least 1, got {tau} and {rounds}"
            )
        self.tau, self.rounds = tau, rounds
        self.temperature = tau

    def fit(self, groups: Sequence[Tensor]) -> None:
        """Find the directions."""
        x = torch.cat(list(groups)).double()
        sizes = torch.tensor([len(group) for group in groups])
        y = torch.repeat_interleave(sizes)
        share = (1.0 / (len(groups) * sizes.double()))[y]
        start = torch.stack([group.double().mean(0) for group in groups])
        free = F.normalize(start, dim=-1).requires_grad_()
        optimizer = torch.optim.LBFGS(
            [free], max_iter=self.rounds, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            logits = x @ F.normalize(free, dim=-1).t() / self.tau
            value = (share * F.cross_entropy(logits, y, reduction="none")).sum()
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(loss)
        self.directions = F.normalize(free.detach(), dim=-1).float()

    def score(self, vectors: Tensor) -> Tensor:
        """Return cosines."""
        return vectors @ self.directions.t()

    def state(self) -> dict[str, Tensor]:
        """Return the unit directions (E, D)."""
        return {"directions": self.directions}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back the directions."""
        self.directions = tensors["directions"]
