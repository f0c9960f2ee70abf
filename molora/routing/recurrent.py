"""The recurrent feature: routers read a state that one GRU carries from router to router through the depth."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import RoutingError
from .features import Place, features
from .recompute import in_backward
from .types import Context


@features.register("gru", given=("place",))
class GRU(nn.Module):
    """Recurrence over layers, per token: `h_l = GRU(W_l x, h_{l-1})` with h_0 = 0 (RMoE, arXiv 2408.06793).

    W_l: (size, d) belongs to each router; the GRU cell is one for all routers of the adapter, of every stack, and is
    held, trained and saved by the first of them. h_{l-1} comes from the router that runs before this one in its stack
    (encoder, decoder, encoder states read by a decoder), so use `share: block`: then h advances once per block, as in
    the paper, and not once per wrapped layer. A router that sees other positions than the one before it (a pooler
    after the blocks) starts from 0 again.

    The state lives for one forward; no token reads another token, so generation with a cache needs nothing more. The
    gradient crosses layers through h: exact without checkpointing and under the non-reentrant kind, refused under the
    reentrant kind.

    Options:
        size: size of u and h (256 in the authors' code).
    """

    def __init__(self, dim: int, *, size: int = 256, place: Place) -> None:
        super().__init__()
        self.dim, self.place = size, place
        self.project = nn.Linear(dim, size, bias=False)
        self.cell = nn.GRUCell(size, size)

    def borrow(self, owner: GRU) -> None:
        """Use the cell of another router, which alone holds, trains and saves it."""
        del self._modules["cell"]
        self.__dict__["cell"] = owner.cell  # not through nn.Module, which would register it a second time

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """Return h (B, S, size) for x (B, S, d)."""
        u = self.project(x)
        before = self._before(u, ctx)
        h = self.cell(u.flatten(0, 1), None if before is None else before.flatten(0, 1)).view_as(u)
        if ctx.memory is not None:
            ctx.memory.now[f"{self.place.name}:gru"] = h
        return h

    def _before(self, u: Tensor, ctx: Context) -> Tensor | None:
        """Return the state (B, S, size) of the router before this one, None for 0."""
        if ctx.memory is None or self.place.before is None:
            return None
        h = ctx.memory.now.get(f"{self.place.before}:gru")
        if h is None or h.shape != u.shape:
            return None
        trained = any(parameter.requires_grad for parameter in self.cell.parameters())
        if in_backward() and torch.is_grad_enabled() and trained and not h.requires_grad:
            raise RoutingError(
                f"feature 'gru': the router '{self.place.name}' reads the state of '{self.place.before}', which ran "
                "inside another reentrant checkpoint, through which no gradient reaches it; use "
                'gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        return h.to(u.device)
