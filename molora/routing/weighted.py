"""WeightedLoss: one entry of a config's `losses`: a loss with its options, its weight, and how its sites add up."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .controllers import Controller, check_controller, is_controller
from .losses import Parts, losses
from .recall import Recall
from .recompute import in_backward
from .schedules import Scheduled, number
from .types import Context, Routing


class WeightedLoss:
    """One loss of a config: the function with its options, its weight, and how decisions of several sites add up.

    Args:
        spec: `{name, weight, over, branch, when, **options}`; weight may be a schedule or a controller; `over` is
            `mean` (default) or `sum` over the decisions of a forward. `branch` takes the decision of one branch, by its
            number; `when` counts only decisions that carry a note of this name.

    Attributes:
        controller: the Controller of the weight, which the tuner puts where it is saved; None for other weights.
        kept: mean loads of the latest forward, by number of experts (see Recall.over_layers).
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        options = dict(spec)
        self.name = options.pop("name")
        self.over = options.pop("over", "mean")
        self.branch, self.when = options.pop("branch", None), options.pop("when", None)
        weight = options.pop("weight", 1.0)
        self.controller = Controller(weight) if is_controller(weight) else None
        self.weight = number(1.0 if self.controller else weight)
        self.function = Scheduled(losses.get(self.name), options)
        self.takes = losses.fact(self.name, "given", ())
        self.kept: dict[int, tuple[Tensor, int]] = {}

    def why_not(self, router: Any) -> str | None:
        """Return why this loss cannot work with a router; None when it can."""
        if self.branch is not None:
            branches = getattr(router, "branches", ())
            if not 0 <= self.branch < len(branches):
                return f"loss '{self.name}' is of branch {self.branch}, but there are {len(branches)} branches"
            router = branches[self.branch]
        check = losses.fact(self.name, "why_not")
        reason = None if check is None else check(router)
        return None if reason is None else f"loss '{self.name}': {reason}"

    def __call__(self, routing: Routing, ctx: Context, decisions: int, parts: Parts | None = None) -> Tensor:
        """Return the weighted share of one decision among `decisions` of them."""
        if self.branch is not None and routing.branches:
            routing = routing.branches[self.branch]
            parts = None if parts is None else dataclasses.replace(parts, router=parts.router.branches[self.branch])
        if self.when is not None and self.when not in (routing.notes or {}):
            return routing.probs.sum() * 0.0
        given: dict[str, Any] = {}
        if "parts" in self.takes:
            given["parts"] = parts
        if "recall" in self.takes and parts is not None:
            given["recall"] = Recall(self.kept, ctx.memory, parts.router.place.name)
        value = self.function(routing, ctx, progress=ctx.progress, **given)
        share = decisions if self.over == "mean" else 1
        if self.controller is None:
            return self.weight(ctx.progress) / share * value
        if ctx.training and not in_backward():
            self.controller.observe(routing, ctx, value)
        return self.controller.weight(value) / share * value


def check_loss(spec: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with one entry of a config's `losses`."""
    if not isinstance(spec, Mapping) or "name" not in spec:
        return [f"loss {spec!r} must be a mapping with a 'name' and a 'weight'"]
    problems = losses.problems({k: v for k, v in spec.items() if k not in ("weight", "over", "branch", "when")})
    if "weight" not in spec:
        problems.append(f"loss '{spec['name']}' needs a 'weight'; its value at perfect balance times it is its size")
    elif is_controller(spec["weight"]):
        problems += [f"loss '{spec['name']}': {problem}" for problem in check_controller(spec["weight"])]
    if spec.get("over", "mean") not in ("mean", "sum"):
        problems.append(f"loss '{spec['name']}': over {spec['over']!r} is unknown; known: mean, sum")
    if spec.get("branch") is not None and (isinstance(spec["branch"], bool) or not isinstance(spec["branch"], int)):
        problems.append(f"loss '{spec['name']}': branch must be the number of a branch, got {spec['branch']!r}")
    if not isinstance(spec.get("when", ""), str):
        problems.append(f"loss '{spec['name']}': when must be the name of a note, got {spec['when']!r}")
    if not problems:
        even = torch.full((1, 1, 2), 0.5)
        try:
            loss = WeightedLoss(spec)
            # wrong options fail now, not in the first step
            for progress in () if "parts" in loss.takes else (0.0, 1.0):
                loss(Routing(even, even, even), Context(progress=progress), 1)
        except ConfigError as error:
            problems.append(f"loss '{spec['name']}': {error}")
    return problems
