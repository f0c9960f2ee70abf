"""Auxiliary losses: pure functions `(routing, ctx, *, options) -> scalar` of one routing decision.

Padding never counts. Papers differ by factors of k, E and the number of layers; here every loss is a mean over real
tokens, and is registered with its value at perfect balance (`at_balance(E)`), so that weights can be compared:
"perfect balance" means that every token spreads its probs evenly over all experts and all experts are chosen equally
often. P is the mean of probs over tokens, f the share of all choices that fell on an expert; both sum to 1.

Facts: `at_balance` (required); `given=` any of `parts` (Parts) and `recall` (Recall); `reads=` what a loss knows of a
token besides its decision: its `neighbours`, the `number` of tokens, their `tasks`, or nothing; `why_not(router)` says
why a loss cannot work with a router, or None.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError
from ..registry import Registry
from .controllers import Controller, check_controller, is_controller
from .entropy import shannon
from .entropy import tsallis as tsallis_entropy
from .recompute import in_backward
from .schedules import Scheduled, number
from .types import Context, Memory, Routing

losses = Registry("loss")
SCOPES = ("micro", "sequence", "global", "pool")


@dataclass(frozen=True)
class Parts:
    """What a loss may read besides the decision; given to losses registered with the fact `given=("parts",)`.

    Attributes:
        router: the Router that decided; `router.scorer` holds its weights, `router.bank` its experts (or None).
        hidden: (B, S, d) what the router was given.
    """

    router: Any
    hidden: Tensor


def shares(routing: Routing) -> Tensor:
    """Return probs over their sum over experts: a distribution whatever the link function, (B, S, N).

    Where a link lets probs fall below zero, their absolute values count.
    """
    sizes = routing.probs.abs()
    return sizes / sizes.sum(-1, keepdim=True).clamp_min(torch.finfo(sizes.dtype).tiny)


def mean_over_tokens(values: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean over the first two axes of values (B, S, ...), weights (B, S); 0 with no token."""
    weights = weights.reshape(weights.shape + (1,) * (values.dim() - weights.dim()))
    return (values * weights).flatten(0, 1).sum(0) / weights.sum().clamp_min(1.0)


def loads_of(routing: Routing, load: str) -> Tensor:
    """Return what counts as load at each token, (B, S, N): choices, gates or the top expert; see `load_share`."""
    if load == "gates":
        return F.pad(routing.gates, (0, routing.probs.shape[-1] - routing.num_experts))  # null experts have no gate
    if load == "argmax":
        return F.one_hot(routing.probs.argmax(-1), routing.probs.shape[-1]).to(routing.probs.dtype)
    if load == "selected":
        return routing.selected.to(routing.probs.dtype)
    raise ConfigError(f"load {load!r} is unknown; known: selected, gates, argmax")


def load_share(routing: Routing, ctx: Context, load: str = "selected") -> Tensor:
    """Return f (N,): the share of choices (`selected`), of gate mass (`gates`), or of top experts (`argmax`)."""
    return _as_shares(mean_over_tokens(loads_of(routing, load), ctx.weights(routing.gates)), load)


def _as_shares(counts: Tensor, load: str) -> Tensor:
    """Divide counts (..., N) by their sum and cut their gradient; gates stay as they are."""
    if load == "gates":
        return counts
    return (counts / counts.sum(-1, keepdim=True).clamp_min(torch.finfo(counts.dtype).tiny)).detach()


@losses.register("switch_balance", at_balance=lambda experts: 1.0, given=("recall",))
def switch_balance(
    routing: Routing,
    ctx: Context,
    *,
    load: str = "selected",
    scope: str = "micro",
    null: str = "each",
    of: str = "probs",
    recall: Recall | None = None,
) -> Tensor:
    """Return `E sum_e f_e P_e` (Switch, arXiv 2101.03961): 1 at perfect balance, E when one expert takes all.

    f is divided by the number of choices, so the value at balance is 1 for every k (Mixtral's code gives k instead).
    It is not a lower bound: f = (.9, .1) with P = (.459, .541) gives 0.934.

    Options:
        load: what f counts: `selected` experts, `argmax` (MiLoRA), both without gradient; or `gates`, the mean gate
            with its gradient and not divided by its sum (DynMoLE), which falls when gate mass is masked away.
        scope: over which tokens f is formed. `micro`: those of this decision. `sequence`: those of each row, whose
            losses are averaged (DeepSeek). `global`: those of all data-parallel ranks. `pool`: those of all layers with
            as many experts, in the training forward before (UniPool); the first forward has none before it and uses
            each layer's own.
        null: `each`, or `tied`: the f of null experts is replaced by their mean, so that the loss fixes how often
            tokens choose nothing, but not which nothing (AdaMoE, arXiv 2406.13233). E counts null experts too.
        of: what P averages: `probs`, or `gates` where the probs of the link play no part (LD-MoLE, arXiv 2509.25684).
    """
    if scope not in SCOPES or null not in ("each", "tied"):
        wrong = f"scope {scope!r} is unknown; known: {', '.join(SCOPES)}"
        raise ConfigError(wrong if scope not in SCOPES else f"null {null!r} is unknown; known: each, tied")
    if of not in ("probs", "gates"):
        raise ConfigError(f"of {of!r} is unknown; known: probs, gates")
    probs, weights = shares(routing) if of == "probs" else loads_of(routing, "gates"), ctx.weights(routing.probs)
    if scope == "sequence":
        f, mean_probs = (_mean_over_rows(v, weights) for v in (loads_of(routing, load), probs))
        counted = weights.any(-1).to(probs.dtype)
    else:
        f, mean_probs = mean_over_tokens(loads_of(routing, load), weights), mean_over_tokens(probs, weights)
        counted = None
    if scope in ("global", "pool") and recall is not None:
        f = recall.over_ranks(f * weights.sum()) if scope == "global" else recall.over_layers(_as_shares(f, "selected"))
    f = _as_shares(f, "selected" if scope in ("global", "pool") else load)
    real = routing.num_experts
    if null == "tied" and real < f.shape[-1]:
        f = torch.cat([f[..., :real], f[..., real:].mean(-1, keepdim=True).expand_as(f[..., real:])], -1)
    value = f.shape[-1] * (f * mean_probs).sum(-1)
    return value if counted is None else (value * counted).sum() / counted.sum().clamp_min(1.0)


def _mean_over_rows(values: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean of values (B, S, N) over the tokens of each row, (B, N); weights (B, S)."""
    return (values * weights[..., None]).sum(1) / weights.sum(1, keepdim=True).clamp_min(1.0)


@losses.register("router_z", at_balance=lambda experts: math.log(experts) ** 2)
def router_z(routing: Routing, ctx: Context) -> Tensor:
    """Return `mean (logsumexp scores)^2` (ST-MoE, arXiv 2202.08906): (ln E)^2 at scores 0, its balanced value."""
    return mean_over_tokens(torch.logsumexp(routing.scores, -1) ** 2, ctx.weights(routing.scores))


@losses.register("importance", at_balance=lambda experts: 1.0)
def importance(routing: Routing, ctx: Context) -> Tensor:
    """Return `E sum_e P_e^2`: from 1 at balance to E; minus 1 it is the squared variation of importance.

    SpeechMoE (arXiv 2105.03036); Shazeer et al. (arXiv 1701.06538) use the variation itself.
    """
    mean_probs = mean_over_tokens(shares(routing), ctx.weights(routing.probs))
    return routing.num_experts * (mean_probs**2).sum()


@losses.register("entropy", at_balance=lambda experts: 1.0)
def entropy(routing: Routing, ctx: Context, *, level: str = "token") -> Tensor:
    """Return the normalised Shannon entropy: of each token's probs, averaged, or of P; in [0, 1], 1 at balance.

    Options:
        level: `token` (minimising it makes tokens decide) or `batch` (with a negative weight it spreads the load).
    """
    return _entropy_at(level, routing, ctx, shannon)


@losses.register("tsallis", at_balance=lambda experts: 1.0)
def tsallis(routing: Routing, ctx: Context, *, q: float = 1.1, level: str = "token") -> Tensor:
    """Return the normalised Tsallis entropy of order q, in [0, 1], 1 at balance (DynMoLE, arXiv 2504.00661).

    Alone it is smallest when all tokens collapse on one expert: pair it with a balance loss.

    Options:
        level: `token` or `batch`, as in `entropy`.
    """
    return _entropy_at(level, routing, ctx, lambda probs: tsallis_entropy(probs, q=q))


def _entropy_at(level: str, routing: Routing, ctx: Context, measure: Callable[[Tensor], Tensor]) -> Tensor:
    probs, weights = shares(routing), ctx.weights(routing.probs)
    if level == "token":
        return mean_over_tokens(measure(probs), weights)
    if level == "batch":
        return measure(mean_over_tokens(probs, weights))
    raise ConfigError(f"entropy level {level!r} is unknown; known: token, batch")


class Recall:
    """What one loss knows beyond a single decision; given to losses registered with the fact `given=("recall",)`.

    Everything is formed once per forward and found again in a checkpoint's recompute, where no rank may be asked twice.

    Args:
        loss: whose it is.
        memory: that of the forward; None outside of a model, where each decision stands alone.
        place: the name of the decision.
    """

    def __init__(self, loss: WeightedLoss, memory: Memory | None, place: str) -> None:
        self.loss, self.memory, self.place = loss, memory, place
        self._key = f"loss:{id(loss)}"

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
        now, kept = self.memory.now, self.loss.kept
        if self._key not in now:  # the first decision of this forward: the one before is complete
            now[self._key] = {size: total / count for size, (total, count) in kept.items()}
            kept.clear()
        if f"{self._key}:{self.place}" not in now:
            now[f"{self._key}:{self.place}"] = True
            total, count = kept.get(load.shape[0], (torch.zeros_like(load), 0))
            kept[load.shape[0]] = (total + load.detach().to(total.device), count + 1)
        return now[self._key].get(load.shape[0], load).to(load.device)


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
            given["recall"] = Recall(self, ctx.memory, parts.router.place.name)
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
