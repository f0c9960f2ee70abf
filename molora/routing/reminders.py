"""Reminders: what a trace says once when training leaves something out that an adapter asks for."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from .passes import Plan

SETTLED_AFTER = 64  # training forwards without an optimizer step: longer than gradients are usually accumulated


class Reminders:
    """What was said, and what has to be known to say the rest.

    Attributes:
        progress_told: whether something tells the progress of training, or it was said that nothing does.
        called: layers seen in the first training forward; None after it.
    """

    def __init__(self) -> None:
        self.progress_told = False
        self.called: set[str] | None = set()
        self._objective_told = False
        self._forwards = 0  # training forwards so far

    def of_forward(self, plans: Mapping[str, Plan]) -> None:
        """Say what a training forward that begins shows to be missing."""
        if not self.progress_told and any(plan.scheduled for plan in plans.values()):
            self.progress_told = True
            warnings.warn(
                "this adapter has schedules, but nothing tells it the progress of training, so they stay at their "
                "start; call molora.attach(trainer) once, or molora.set_progress(model, p) in your own loop",
                stacklevel=3,
            )
        held = [loss.controller for plan in plans.values() for loss in plan.losses if loss.controller is not None]
        self._forwards += 1
        if held and self._forwards == SETTLED_AFTER and not any(controller.settled for controller in held):
            warnings.warn(
                f"this adapter has loss weights that a controller moves, but after {SETTLED_AFTER} training forwards "
                "nothing has moved them, so they stay at their start; call molora.attach(trainer) once, or "
                "molora.settle(model) after each optimizer step in your own loop",
                stacklevel=3,
            )

    def of_objective(self, plans: Mapping[str, Plan]) -> None:
        """Say that training goes past the objective of an adapter."""
        names = [plan.objective.name for plan in plans.values() if plan.objective is not None]
        if names and not self._objective_told:
            self._objective_told = True
            warnings.warn(
                f"this adapter has the objective '{names[0]}', but this training forward is not part of it, so only "
                "the plain loss is trained; call molora.attach(trainer) once, or use "
                "loss = molora.objective_loss(model, inputs) in your own loop",
                stacklevel=3,
            )

    def of_bypassed(self, plans: Mapping[str, Plan]) -> None:
        """Say which layers the first training forward never called: some models read a weight and skip its layer."""
        called, self.called = self.called or set(), None
        idle = sorted({name for plan in plans.values() for name in plan.sites} - called)
        if idle and called:
            leaves = sorted({name.rpartition(".")[2] for name in idle})
            warnings.warn(
                f"{len(idle)} routed layers were not called in the first training forward, so their experts act on "
                f"nothing (for example '{idle[0]}'); leave them out with exclude_modules={leaves}",
                stacklevel=3,
            )
