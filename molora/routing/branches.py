"""Branches: a router made of routers. Each branch decides by itself; their gates are added or mixed.

    y = W x + sum over branches b of w_b bank(x_b, g_b)

x_b is the input of the layer, or what the scorer of the branch made of it (see views.py). In a config, `branches` is a
list of mappings that hold what differs from the keys at the top: scorer, link, selector, price, pool, feature,
granularity. `mix` says what w_b is:

- `sum`: 1;
- `softmax`: softmax over the branches of a linear map of x (VQMoE);
- `gate`: gamma and 1 - gamma, gamma = sigmoid(w x + b), for two branches (S2MoE).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import did_you_mean
from .features import Place, features, listed
from .float32 import Float32, in_float32
from .links import links
from .pools import pools
from .price import check_price
from .router import GRANULARITIES, Router
from .schedules import is_schedule
from .scorers import scorers
from .selectors import selectors
from .shared import Shared
from .types import Context, Routing

MIXES = ("sum", "softmax", "gate")
KEYS = ("scorer", "link", "selector", "price", "pool", "feature", "granularity")
LIKE = "like"  # the number of an earlier branch, whose scorer this one uses


class Branches(Float32):
    """Several routers that decide together; stands in for a Router wherever one is expected.

    Args:
        dim: hidden size d of what it reads.
        num_experts: E, the experts to choose from.
        branches: what each branch has of its own.
        mix: what weighs the branches.
        null, shared, weights, place, splits: as in Router; shared experts belong to no branch.
        common: keyword arguments of Router for what a branch does not name.
    """

    price = link = selector = None  # what belongs to the branches
    feature: tuple[()] = ()
    granularity = "token"  # a branch that decides per prompt keeps its own decision

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        branches: Sequence[Mapping[str, Any]],
        mix: str = "sum",
        null: int = 0,
        shared: Mapping[str, Any] | None = None,
        weights: str = "own",
        place: Place | None = None,
        splits: int = 1,
        **common: Any,
    ) -> None:
        super().__init__()
        self.num_experts, self.null, self.splits, self.weights = num_experts, null, splits, weights
        self.place, self.mix = place or Place(), mix
        self.branches = nn.ModuleList()
        for number, own in enumerate(branches):
            named = dataclasses.replace(
                self.place,
                name=f"{self.place.name}#{number}",
                before=None if self.place.before is None else f"{self.place.before}#{number}",
            )
            options = {**common, **{key: value for key, value in own.items() if key != LIKE}}
            router = Router(dim, num_experts, null=null, weights=weights, place=named, splits=splits, **options)
            if LIKE in own:
                router.scorer.borrow(self.branches[own[LIKE]].scorer)
            self.branches.append(router)
        outputs = {"sum": 0, "softmax": len(branches), "gate": 1}[mix]
        self.weigh = nn.Linear(dim, outputs, bias=mix == "gate") if outputs else None
        self.shared = Shared(dim, **shared) if shared else None

    # --- what others ask of a router ------------------------------------------------------------------------------

    @property
    def bank(self) -> Any:
        """The experts that the gates multiply; None when the router stands alone."""
        return self.branches[0].bank

    @property
    def scorer(self) -> tuple[nn.Module, ...]:
        """The scorers of the branches."""
        return tuple(branch.scorer for branch in self.branches)

    @property
    def sparse(self) -> bool:
        """Whether no gradient needs a gate that is zero (see Router.sparse)."""
        return all(branch.sparse for branch in self.branches)

    @property
    def has_gradient(self) -> bool:
        """Whether gradients go through decisions."""
        return self.weigh is not None or any(branch.has_gradient for branch in self.branches)

    @property
    def draws(self) -> bool:
        """Whether a training forward draws at random from the seed of the forward."""
        return any(branch.draws for branch in self.branches)

    @property
    def edits_input(self) -> bool:
        """Whether experts may get another input than that of their layer."""
        return any(branch.edits_input for branch in self.branches)

    @property
    def remembers(self) -> bool:
        """Whether a decision outlives a forward (see Memory.past)."""
        return any(branch.granularity == "prompt" for branch in self.branches)

    def plain_form(self) -> None:
        """Return None: no kernel decides for several branches."""

    def reads(self, bank: Any) -> None:
        """Tell the branches which experts their gates multiply."""
        for branch in self.branches:
            branch.reads(bank)

    def borrow(self, scorer: tuple[nn.Module, ...]) -> None:
        """Score with the scorers of other branches, which alone hold, train and save the weights."""
        for branch, lender in zip(self.branches, scorer, strict=True):
            branch.borrow(lender)

    def add_controller(self, position: int, controller: nn.Module) -> None:
        """Keep the controller of a loss weight."""
        self.branches[0].add_controller(position, controller)

    def freeze(self) -> None:
        """Make sure that frozen weights are not trainable."""
        for branch in self.branches:
            branch.freeze()

    def observe(self, routing: Routing, ctx: Context) -> None:
        """Let the prices take one training forward into account."""
        for branch, own in zip(self.branches, routing.branches, strict=True):
            branch.observe(own, ctx)

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Put the experts in another order."""
        for branch in self.branches:
            branch.permute(order)

    # --- the decision ---------------------------------------------------------------------------------------------

    @in_float32
    def forward(self, x: Tensor, ctx: Context) -> Routing:
        """Decide for x (B, S, d) -> Routing of (B, S, E); scores and probs are the weighted sums of the branches'."""
        with torch.autocast(x.device.type, enabled=False):
            hidden = x.float()
            own = tuple(self._ask(branch, hidden, ctx) for branch in self.branches)
            weighed = list(zip(self._weights(hidden), own, strict=True))
            mixed = [weight * routing.gates for weight, routing in weighed]
            always = None if self.shared is None else self.shared(hidden, hidden)
            passes = self._passes(own, mixed, always) if self.edits_input else ()
            return Routing(
                scores=_sum([weight * routing.scores for weight, routing in weighed]),
                probs=_sum([weight * routing.probs for weight, routing in weighed]),
                gates=_sum(mixed),
                always=always,
                choices=_any([routing.selected for routing in own]) if self.null else None,
                branches=own,
                passes=passes,
            )

    def _ask(self, branch: Router, x: Tensor, ctx: Context) -> Routing:
        """Return what a branch decides; a decision per prompt is taken once and goes with the cache."""
        if branch.granularity != "prompt" or ctx.training or ctx.memory is None:
            return branch(x, ctx)
        past, name = ctx.memory.past, branch.place.name
        if name in past:
            return past[name]
        routing = branch(x, ctx)
        past[name] = routing.detach()
        return routing

    def _weights(self, x: Tensor) -> list[Tensor | float]:
        """Return what each branch weighs, (B, S, 1) or 1."""
        if self.weigh is None:
            return [1.0] * len(self.branches)
        if self.mix == "gate":
            gamma = torch.sigmoid(self.weigh(x))
            return [gamma, 1 - gamma]
        return list(torch.softmax(self.weigh(x), -1).split(1, -1))

    def _passes(
        self, own: tuple[Routing, ...], mixed: list[Tensor], always: Tensor | None
    ) -> tuple[tuple[Tensor | None, Tensor], ...]:
        """Return what the experts are given: the layer's input once, for all branches that leave it, then the views."""
        plain = [gates for routing, gates in zip(own, mixed, strict=True) if not routing.passes]
        plain = plain or [torch.zeros_like(mixed[0])]
        passes: list[tuple[Tensor | None, Tensor]] = [(None, _with(_sum(plain), always))]
        for routing, gates in zip(own, mixed, strict=True):
            if routing.passes:
                passes.append((routing.passes[0][0], _with(gates, None if always is None else 0 * always)))
        return tuple(passes)


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total


def _any(masks: Sequence[Tensor]) -> Tensor:
    found = masks[0]
    for mask in masks[1:]:
        found = found | mask
    return found


def _with(gates: Tensor, always: Tensor | None) -> Tensor:
    """Put the weights of shared experts (B, S, n) after gates (B, 1|S, E)."""
    return gates if always is None else torch.cat([gates.expand(*always.shape[:-1], -1), always], -1)


def check_branches(branches: Any, mix: Any, top: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with `branches` and `mix` of a config whose other keys are `top`."""
    found = [f"mix '{mix}' is unknown{did_you_mean(str(mix), MIXES)}"] if mix not in MIXES else []
    if branches is None:
        return found + ([f"mix: {mix} mixes branches, but there are none"] if not found and mix != "sum" else [])
    if not isinstance(branches, (list, tuple)) or len(branches) < 2:
        return [*found, f"branches must be a list of two or more mappings, got {branches!r}"]
    if mix == "gate" and len(branches) != 2:
        found.append(f"mix: gate weighs two branches, got {len(branches)}; use softmax")
    for number, own in enumerate(branches):
        if not isinstance(own, Mapping):
            found.append(f"branches[{number}] must be a mapping, got {own!r}")
            continue
        known = (*KEYS, LIKE)
        found += [f"branches[{number}] has no key '{key}'{did_you_mean(key, known)}" for key in own if key not in known]
        found += [f"branches[{number}]: {problem}" for problem in _part_problems({**top, **own}, number)]
    return found


def _part_problems(spec: Mapping[str, Any], number: int) -> list[str]:
    found: list[str] = []
    for kind, registry in (("scorer", scorers), ("link", links), ("selector", selectors), ("pool", pools)):
        found += registry.problems(spec[kind])
        if (
            kind in ("scorer", "pool")
            and isinstance(spec[kind], Mapping)
            and any(map(is_schedule, spec[kind].values()))
        ):
            found.append(f"{kind} cannot follow a schedule; link and selector options and loss weights can")
    found += check_price(spec["price"])
    for feature in listed(spec["feature"]):
        found += features.problems(feature)
        if features.fact(feature if isinstance(feature, str) else feature["name"], "remembers", False):
            found.append("features that need earlier tokens cannot stand in a branch")
    if spec["granularity"] not in GRANULARITIES:
        found.append(
            f"granularity '{spec['granularity']}' is unknown{did_you_mean(spec['granularity'], GRANULARITIES)}"
        )
    name = spec["scorer"] if isinstance(spec["scorer"], str) else spec["scorer"].get("name")
    if name in scorers:
        by_task = scorers.fact(name, "reads") == "task"
        if (spec["granularity"] == "task") != by_task:
            found.append(f"granularity '{spec['granularity']}' does not go with scorer '{name}'")
        if LIKE in spec and not (isinstance(spec[LIKE], int) and 0 <= spec[LIKE] < number):
            found.append(f"like must be the number of an earlier branch, got {spec[LIKE]!r}")
        elif LIKE in spec and not hasattr(scorers.get(name), "borrow"):
            found.append(f"like needs a scorer that can use another's weights, such as noisy_view, not '{name}'")
    return found
