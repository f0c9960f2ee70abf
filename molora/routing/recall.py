"""Recall: what a loss knows of other ranks, and of the forward before."""

from __future__ import annotations

import torch
from torch import Tensor

from .types import Memory


class Recall:
    """What one loss knows beyond a single decision; given to losses registered with the fact `given=("recall",)`.

    Everything is formed once per forward and found again in a checkpoint's recompute, where no rank may be asked twice.

    Args:
        kept: mean loads of the latest forward by number of experts; the loss's own, and changed here.
        memory: that of the forward; None outside of a model, where each decision stands alone.
        place: the name of the decision.
    """

    def __init__(self, kept: dict[int, tuple[Tensor, int]], memory: Memory | None, place: str) -> None:
        self.kept, self.memory, self.place = kept, memory, place
        self._key = f"loss:{id(kept)}"  # each loss has its own

    def over_ranks(self, load: Tensor) -> Tensor:
        """Return the load (N,) summed over data-parallel ranks, without gradient."""
        now = {} if self.memory is None else self.memory.now
        key = f"{self._key}:{self.place}"
        if key not in now:
            now[key] = load.detach().clone()
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(now[key])
        return now[key]

    def over_layers(self, load: Tensor) -> Tensor:
        """Return the mean load (N,) over the layers of the forward before; the given one when there was none."""
        if self.memory is None:
            return load
        now, kept = self.memory.now, self.kept
        if self._key not in now:  # the first decision of this forward: the one before is complete
            now[self._key] = {size: total / count for size, (total, count) in kept.items()}
            kept.clear()
        if f"{self._key}:{self.place}" not in now:
            now[f"{self._key}:{self.place}"] = True
            total, count = kept.get(load.shape[0], (torch.zeros_like(load), 0))
            kept[load.shape[0]] = (total + load.detach().to(total.device), count + 1)
        return now[self._key].get(load.shape[0], load).to(load.device)
