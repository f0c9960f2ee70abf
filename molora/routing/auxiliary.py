"""The auxiliary loss of a forward: collected at the routers, added to the task loss with an exact gradient.

Three kinds of router calls happen in training, and each needs its own path (measured in tests/test_aux_exact.py):

- a plain call, or the first call under non-reentrant checkpointing: the loss has a graph and is added to the task loss;
- the first call under reentrant checkpointing runs without grad: its loss has a value but no graph. Its recompute, in
  the middle of backward, has the graph but comes after the task loss was formed. There the loss is tied to the gates
  by `_Inject`, whose backward adds the gradient scale that `_Tap` caught at the task loss when backward began;
- the recompute under non-reentrant checkpointing: computed again, so that the same tensors are saved, and dropped.

The scale is never guessed: the tap sees whatever divided or multiplied the loss afterwards (accumulation, GradScaler,
world size). `share` is this micro-batch's part of the supervised tokens of the whole optimizer batch.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..errors import AuxLossError
from .losses import Parts
from .recompute import in_backward
from .types import Context, Routing
from .weighted import WeightedLoss


class _Scale:
    """The gradient scale of one forward: what backward brought to the task loss, times the token share."""

    def __init__(self) -> None:
        self.share: Tensor | float = 1.0
        self.arrived: Tensor | None = None


class _Tap(torch.autograd.Function):
    """Identity on the task loss that remembers the gradient arriving at it; backward reaches it before any layer."""

    @staticmethod
    def forward(ctx, loss: Tensor, scale: _Scale) -> Tensor:
        ctx.scale = scale
        return loss.clone()  # not a view: Trainer multiplies the loss in place under DDP

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        ctx.scale.arrived = grad.detach()
        return grad, None


class _Inject(torch.autograd.Function):
    """Identity on the gates that also sends the tapped scale into an auxiliary loss."""

    @staticmethod
    def forward(ctx, gates: Tensor, aux: Tensor, scale: _Scale) -> Tensor:
        ctx.scale = scale
        return gates.view_as(gates)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        if ctx.scale.arrived is None:
            raise AuxLossError(
                "reentrant checkpointing: the auxiliary loss of this forward was never added to the loss that is "
                "differentiated; call molora.attach(trainer), or loss = molora.add_aux(model, loss) before backward()"
            )
        return grad, ctx.scale.arrived * ctx.scale.share, None


class AuxLoss:
    """Collects the auxiliary loss of one forward and adds it to the task loss once."""

    def __init__(self) -> None:
        self.live: list[Tensor] = []  # with graph
        self.ghosts: list[Tensor] = []  # values of reentrant first passes, without graph
        self.reentrant: set[str] = set()  # the decisions that ran without grad and will be injected
        self.carried: list[Tensor] = []  # one sum per earlier forward of the same loss (see Trace.gathering)
        self.scale = _Scale()
        self.complete = False  # the forward that collected reached its end
        self.used = False

    @property
    def pending(self) -> bool:
        """Whether something was collected by a whole forward and not yet added to a loss."""
        return self.complete and not self.used and bool(self.live or self.ghosts)

    def collect(
        self, key: str, routing: Routing, ctx: Context, losses: list[WeightedLoss], decisions: int, parts: Parts
    ) -> Routing:
        """Take the losses of one decision; returns the routing to use, whose gates may carry the loss."""
        aux = sum(loss(routing, ctx, decisions, parts) for loss in losses)
        if in_backward():
            if key not in self.reentrant:
                return routing
            if routing.passes:
                (x, gates), *rest = routing.passes
                return dataclasses.replace(routing, passes=((x, _Inject.apply(gates, aux, self.scale)), *rest))
            return dataclasses.replace(routing, gates=_Inject.apply(routing.gates, aux, self.scale))
        if torch.is_grad_enabled():
            self.live.append(aux)
        else:
            self.reentrant.add(key)
            self.ghosts.append(aux)
        return routing

    def value(self) -> Tensor | None:
        """Return the collected loss without its graph, or None when nothing was collected."""
        terms = self.live + self.ghosts
        return sum(term.detach() for term in terms) if terms else None

    def carry(self, previous: AuxLoss) -> None:
        """Take over what an earlier forward of the same loss collected."""
        self.carried = [*previous.carried, sum(previous.live)]
        previous.used = True

    def add_to(self, loss: Tensor, share: Tensor | float = 1.0) -> Tensor:
        """Return `loss + share * aux`, exact in value and gradient for every kind of router call.

        When a loss was made of several forwards, aux is the mean over them, as if they had been one batch.
        """
        if self.used or not (self.live or self.ghosts):
            return loss
        self.used = True
        self.scale.share = share
        if self.live:
            loss = loss + share * (sum(self.live) + sum(self.carried)) / (1 + len(self.carried))
        if self.ghosts:
            loss = _Tap.apply(loss, self.scale) + share * sum(self.ghosts)
        return loss
