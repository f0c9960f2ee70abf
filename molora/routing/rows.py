"""Rows: what the rows of a served batch get from one adapter.

A server's batch mixes requests: one wants a LoRA by name, another a weighted mix, a third a routed mixture, a fourth
the base model. `Trace.rows` says it all: for each adapter that occurs in the batch, either gates for every row, or
which rows its own router decides for. Adapters that do not occur cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """What each row, or each token of a packed batch, gets from one adapter.

    Shapes: (B, 1, E) with one row per request, or (1, T, E) for the T tokens of all requests in one packed row. The
    two exclude each other; without either, the adapter's router decides for every row.

    Attributes:
        gates: (B, 1, E) or (1, T, E) float32 in place of the router's, 0 for what a row does not get.
        mask: (B, 1, 1) or (1, T, 1) float32 that multiplies the router's gates: 1 for its rows, 0 for the others.
    """

    gates: Tensor | None = None
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        for name, given in (("gates", self.gates), ("mask", self.mask)):
            if given is not None and (given.dim() != 3 or given.dtype != torch.float32):
                raise ValueError(
                    f"{name} must be float32 (B, 1, n) or (1, T, n), got {given.dtype} {tuple(given.shape)}"
                )
        if self.gates is not None and self.mask is not None:
            raise ValueError("rows have gates, or a mask of the router's gates, not both")

    @cached_property
    def chosen(self) -> tuple[int, Tensor] | None:
        """The axis and the places along it of the ones in the mask; None when there is no mask of ones and zeros."""
        if self.mask is None:
            return None
        axis = int(self.mask.shape[0] == 1)
        places = self.mask.flatten().nonzero()[:, 0]
        return (axis, places) if bool((self.mask.flatten()[places] == 1).all()) else None
