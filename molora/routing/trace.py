"""Trace: what one forward of one model knows and decides.

The tuner opens a pass before each forward of the base model and closes it after; every routed layer asks `decide` for
its gates. This is the only place that knows per-site, per-block, per-prompt, per-task and pinned routing apart.

A pass lives until the next one: gradient checkpointing runs layers again in backward, after the forward has closed,
and must find the same masks and decisions. The latest pass with gradients is kept apart, so that forwards without
gradients in between (a reference model, an evaluation) do not disturb it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import AuxLossError, RoutingError
from .auxiliary import AuxLoss
from .cached import Cached
from .losses import Parts
from .passes import Pass, Plan, Site
from .recompute import in_backward
from .reminders import Reminders
from .router import Router
from .rows import Rows
from .shapes import as_gates, as_input, as_rows, by_beam, fits_rows, fitting, part_of
from .types import Context, Memory, Routing

Reader = Callable[[Site, Routing, Context], None]


class Trace:
    """The decisions of a model, forward by forward.

    Attributes:
        plans: Plan per adapter.
        readers: functions called with each fresh decision; nothing is recorded for nobody.
        pins: gates that replace decisions: one tensor for all sites, or a dict from site name or group to tensor.
        edits: interventions on scores and gates (see edit.py), in the order they act.
        rows: per adapter of a served batch, what its rows get (see rows.py); only these adapters act then. None: PEFT's
            active adapters act.
        progress: training progress in [0, 1], read by schedules.
        cached: what was decided and seen of the tokens in key-value caches.
        seed: the seed of the next training forward's draws; None: one is drawn from torch's generator.
    """

    def __init__(self) -> None:
        self.plans: dict[str, Plan] = {}
        self.readers: list[Reader] = []
        self.pins: Tensor | dict[str, Tensor] | None = None
        self.edits: list[Any] = []
        self.rows: dict[str, Rows] | None = None
        self.progress = 0.0
        self._clear()

    def _clear(self) -> None:
        self._now = Pass()
        self._graded = self._now  # the latest pass with gradients
        self._is_open = False
        self._gathering = self.is_holding = False
        self._passes: list[tuple[int, Pass]] = []  # of the forwards gathered into one loss, and where each began
        self.seed: int | None = None
        self.reminders = Reminders()
        self.cached = Cached()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out everything that holds a graph: copies and pickles start with no pass."""
        return {"plans": self.plans, "pins": self.pins, "progress": self.progress}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, with no readers and no pass."""
        self.__dict__.update(state, readers=[], edits=[], rows=None)
        self._clear()

    # --- the life of a pass ---------------------------------------------------------------------------------------

    def open(self, new: Pass) -> None:
        """Begin a forward; raise AuxLossError if the previous training forward's auxiliary loss was never used."""
        if new.collecting:
            self.reminders.of_forward(self.plans)
            previous = self._graded.aux
            if previous.pending and not self._gathering:
                previous.used = True  # say it once
                raise AuxLossError(
                    "the auxiliary loss of the previous training forward was never added to a loss, so its routers "
                    "were trained without it. Pass labels to the model, or call molora.attach(trainer) once, or "
                    "loss = molora.add_aux(model, loss) in your own loop; molora.drop_aux(model) discards it on purpose"
                )
            if previous.pending:
                if previous.ghosts:
                    raise AuxLossError(
                        "two training forwards before one backward cannot be told apart under reentrant gradient "
                        'checkpointing; use gradient_checkpointing_kwargs={"use_reentrant": False}'
                    )
                new.aux.carry(previous)
            self._graded = new
            self._begin(new)
        new.is_read = bool(self.readers or self.edits)
        self._now = new
        self._is_open = True

    def close(self, cache: Any = None) -> None:
        """End a forward; remember its per-prompt decisions with the cache that continues it."""
        now = self._now
        now.aux.complete = True
        if now.collecting and self.reminders.called is not None:
            self.reminders.of_bypassed(self.plans)
        cache = cache if cache is not None else now.cache
        if cache is not None and not now.collecting:
            self.cached.keep(cache, now)
        # Layers that are called on their own, outside of the model's forward, must not see the masks of this one.
        self._now = Pass()
        self._is_open = False

    def _begin(self, new: Pass) -> None:
        """Note where a training forward begins, and settle what its routers will draw."""
        if not self._gathering:
            self._passes = []
            self.reminders.of_objective(self.plans)
        self._passes.append((_autograd_clock() if self._passes else 0, new))
        if any(plan.draws for plan in self.plans.values()):
            # now, not in a layer: the recompute of a checkpoint must find the same state of torch's generator
            new.memory.seed = int(torch.randint(2**62, ())) if self.seed is None else self.seed

    def _recomputed(self) -> Pass:
        """Return the pass whose layers a checkpoint is running again, inside of backward."""
        if len(self._passes) < 2:
            return self._graded
        # several forwards, one backward: the node that asks for the recompute was made in one of them
        node = torch._C._current_autograd_node()
        made = node._sequence_nr() if node is not None else self._passes[-1][0]
        return next(now for began, now in reversed(self._passes) if began <= made)

    @contextmanager
    def telling(self, reader: Reader) -> Iterator[None]:
        """Call `reader` with each fresh decision inside the block."""
        self.readers.append(reader)
        try:
            yield
        finally:
            self.readers.remove(reader)

    @contextmanager
    def gathering(self, hold: bool = False) -> Iterator[None]:
        """Let the auxiliary losses of several training forwards add up, for losses made of more than one forward.

        Args:
            hold: leave them out of the losses that the model itself computes; the caller adds them at the end.
        """
        self._gathering, self.is_holding, self._passes = True, hold, []
        try:
            yield
        finally:
            self._gathering = self.is_holding = False

    def tell_progress(self, progress: float) -> None:
        """Set the training progress in [0, 1] that schedules read."""
        self.progress, self.reminders.progress_told = progress, True

    def amend(self, stack: str, context: Context, shape: tuple[int, ...]) -> None:
        """Tell the masks of one stack (an encoder that runs inside or before the forward of its model)."""
        if not self._is_open:
            self._now = Pass()
        context = dataclasses.replace(context, memory=self._now.memory)
        self._now.contexts[stack], self._now.shape[stack] = context, shape

    @property
    def is_collecting(self) -> bool:
        """Whether the open pass collects auxiliary losses."""
        return self._is_open and self._now.collecting

    @property
    def memory(self) -> Memory:
        """What the routers of the open pass pass on; in a checkpoint's recompute, of the pass that runs again."""
        return (self._recomputed() if in_backward() else self._now).memory

    @property
    def aux(self) -> AuxLoss:
        """The auxiliary loss of the latest training forward."""
        return self._graded.aux

    def is_silent(self, site: Site) -> bool:
        """Whether a decision at `site` would reach nobody but the experts of its group, so that a kernel may take it.

        Where the group has other sites, they must be told of it (see `keep`).
        """
        told = self.readers or self.edits or self.pins is not None
        return not (told or self._now.collecting) and site.column is None and site.part is None

    def keep(self, site: Site, x: Tensor, gates: Tensor, probs: Tensor, scores: Tensor) -> None:
        """Take over a decision that a kernel took for the N tokens of x (..., d); its tables are (N, E)."""
        now = self._now
        lead = as_rows(x, now.shape.get(site.stack)).shape[:2]
        now.decisions[site.group] = Routing(*[table.view(*lead, -1) for table in (scores, probs, gates)])

    def is_private(self, site: Site) -> bool:
        """Whether a decision at `site` in training would reach nobody but its own experts, as it does for `is_silent`.

        The recompute of a checkpoint gets the answer that its first pass got.
        """
        plan = self.plans.get(site.adapter)
        is_read = self._recomputed().is_read if in_backward() else bool(self.readers or self.edits)
        alone = not (site.shared or site.edits or site.fixed or is_read) and site.column is None and self.pins is None
        return alone and (plan is None or not plan.losses)

    def notice(self, site: Site) -> None:
        """Note that a layer was called, when its decision was taken elsewhere."""
        if self.reminders.called is not None:
            self.reminders.called.add(site.name)

    # --- decisions ------------------------------------------------------------------------------------------------

    def decide(self, site: Site, router: Router | None, x: Tensor) -> Tensor:
        """Return the gates for x (..., d): (..., E) in the leading axes of x, or broadcastable to them.

        Raises:
            RoutingError: a shared decision is missing or does not fit this input.
        """
        now = self._recomputed() if in_backward() else self._now
        self.notice(site)
        if site.fixed and not (isinstance(self.pins, dict) and site.name in self.pins):
            return torch.ones((1,) * x.dim(), device=x.device)
        hidden = as_rows(x, now.shape.get(site.stack))
        gates = None if self.pins is None else self._pinned(site, x.device)
        if gates is None:
            gates = self._routing(site, router, hidden, now).applied
        else:
            gates = by_beam(gates, hidden, now)
        if site.column is not None:
            gates = gates[..., site.column : site.column + 1]
        return as_input(gates, hidden, x)

    def given(self, site: Site, router: Router | None, x: Tensor, rows: Rows) -> Tensor:
        """Return the gates of a served batch for x (..., d), broadcastable to its leading axes.

        Raises:
            RoutingError: the rows do not fit this input.
        """
        hidden = as_rows(x, self._now.shape.get(site.stack))
        told = rows.mask if rows.gates is None else rows.gates
        if told is not None and not fits_rows(told, hidden):
            raise RoutingError(
                f"a batch was described by {told.shape[0]} rows and {told.shape[1]} positions, but layer '{site.name}' "
                f"has {hidden.shape[0]} rows and {hidden.shape[1]} positions"
            )
        if rows.gates is not None:
            self.notice(site)
            return as_input(rows.gates, hidden, x)
        gates = self.decide(site, router, x)
        if rows.mask is None:
            return gates
        mask = as_input(rows.mask, hidden, x)
        # not a product alone: a router may fail with NaN on rows that are not its own
        return torch.where(mask == 0, 0.0, gates * mask)

    def rows_of(self, site: Site, x: Tensor) -> tuple[Tensor, Context]:
        """Return the input x (..., d) of a site as (B, S, d), and what the forward that is open knows about it."""
        hidden = as_rows(x, self._now.shape.get(site.stack))
        return hidden, self._now.contexts.get(site.stack, Context(progress=self.progress)).fit(hidden)

    def passes(self, site: Site, router: Router | None, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return what the experts are given, for a site with `edits`: pairs of an input (..., d_in) and its gates."""
        now = self._recomputed() if in_backward() else self._now
        hidden = as_rows(x, now.shape.get(site.stack))
        pinned = None if self.pins is None else self._pinned(site, x.device)
        self.notice(site)
        if pinned is not None:
            return [(x, as_input(by_beam(pinned, hidden, now), hidden, x))]
        routing = self._routing(site, router, hidden, now)
        return [
            (x if view is None else view.reshape(x.shape).to(x.dtype), as_input(gates, hidden, x))
            for view, gates in routing.passes or ((None, routing.applied),)
        ]

    def _pinned(self, site: Site, device: torch.device) -> Tensor | None:
        pinned = self.pins
        if isinstance(pinned, dict):
            pinned = pinned.get(site.name, pinned.get(site.group))
        if pinned is None or (pinned.device == device and pinned.dtype == torch.float32 and pinned.dim() == 3):
            return pinned  # as `pin` has laid it out
        return as_gates(pinned).to(device)

    def _routing(self, site: Site, router: Router | None, hidden: Tensor, now: Pass) -> Routing:
        if now.continuing and site.group in now.decisions:  # a per-prompt decision that came with the cache
            return fitting(part_of(now.decisions[site.group], site), site, hidden)
        if router is None:
            return self._shared(site, hidden, now)
        ctx = now.contexts.get(site.stack, Context(progress=self.progress)).fit(hidden)
        if self.edits:
            ctx = dataclasses.replace(ctx, edits=tuple((edit, site.name) for edit in self.edits))
        routing = router(hidden, ctx)
        if now.collecting:
            routing = self._collect(site, router, routing, ctx, now, hidden)
        if self.readers and not in_backward():
            for reader in self.readers:
                reader(site, routing, ctx)
        if router.granularity == "prompt":
            now.per_prompt.add(site.group)
        if site.shared or router.granularity == "prompt":
            now.decisions[site.group] = routing
            is_cut = router.has_gradient and not torch.is_grad_enabled()
            (now.cut.add if is_cut else now.cut.discard)(site.group)
        return part_of(routing, site)

    def _shared(self, site: Site, hidden: Tensor, now: Pass) -> Routing:
        if site.group not in now.decisions:
            raise RoutingError(
                f"layer '{site.name}' shares the decision of group '{site.group}', but ran before the layer that "
                "takes it (or outside of the model's own forward); use share: site for this model"
            )
        routing = now.decisions[site.group]
        if in_backward() and torch.is_grad_enabled() and now.collecting and site.group in now.cut:
            raise RoutingError(
                f"layer '{site.name}' shares a decision taken inside another reentrant checkpoint, through which no "
                'gradient reaches the router; use gradient_checkpointing_kwargs={"use_reentrant": False}, or share: '
                "block so that the decision is taken inside the same checkpoint"
            )
        return fitting(part_of(routing, site), site, hidden)

    def _collect(
        self, site: Site, router: Router, routing: Routing, ctx: Context, now: Pass, hidden: Tensor
    ) -> Routing:
        if not in_backward():
            router.observe(routing, ctx)
        plan = self.plans.get(site.adapter)
        if plan is None or not plan.losses:
            return routing
        parts = Parts(router, hidden)
        return now.aux.collect(site.group, routing, ctx, plan.losses, plan.decisions, parts)


def _autograd_clock() -> int:
    """Return the number that autograd gives its next node; it only grows."""
    return (torch.zeros((), requires_grad=True) * 1).grad_fn._sequence_nr() + 1  # type: ignore[union-attr]
