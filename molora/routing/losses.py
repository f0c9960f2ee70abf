"""Auxiliary losses: pure functions `(routing, ctx, *, options) -> scalar` of one routing decision.

Padding never counts. Papers differ by factors of k, E and the number of layers; here every loss is a mean over real
tokens, and is registered with its value at perfect balance (`at_balance(E)`), so that weights can be compared:
"perfect balance" means that every token spreads its probs evenly over all experts and all experts are chosen equally
often. P is the mean of probs over tokens, f the share of all choices that fell on an expert; both sum to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError
from ..registry import Registry
from .entropy import shannon
from .entropy import tsallis as tsallis_entropy
from .schedules import Scheduled, number
from .types import Context, Routing

losses = Registry("loss")


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
    """Return probs divided by their sum over experts: a distribution whatever the link function, (B, S, E)."""
    return routing.probs / routing.probs.sum(-1, keepdim=True).clamp_min(torch.finfo(routing.probs.dtype).tiny)


def mean_over_tokens(values: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean over the first two axes of values (B, S, ...), weights (B, S); 0 with no token."""
    weights = weights.reshape(weights.shape + (1,) * (values.dim() - weights.dim()))
    return (values * weights).flatten(0, 1).sum(0) / weights.sum().clamp_min(1.0)


def load_share(routing: Routing, ctx: Context, load: str = "selected") -> Tensor:
    """Return f (E,): the share of choices (`selected`), of gate mass (`gates`), or of top experts (`argmax`)."""
    weights = ctx.weights(routing.gates)
    if load == "gates":
        return mean_over_tokens(routing.gates, weights)
    if load == "argmax":
        chosen = F.one_hot(routing.probs.argmax(-1), routing.num_experts).to(routing.probs.dtype)
    elif load == "selected":
        chosen = routing.selected.to(routing.probs.dtype)
    else:
        raise ConfigError(f"load {load!r} is unknown; known: selected, gates, argmax")
    counts = mean_over_tokens(chosen, weights)
    return (counts / counts.sum().clamp_min(torch.finfo(counts.dtype).tiny)).detach()


@losses.register("switch_balance", at_balance=lambda experts: 1.0)
def switch_balance(routing: Routing, ctx: Context, *, load: str = "selected") -> Tensor:
    """Return `E sum_e f_e P_e` (Switch, arXiv 2101.03961): 1 at perfect balance, E when one expert takes all.

    f is divided by the number of choices, so the value at balance is 1 for every k (Mixtral's code gives k instead).
    It is not a lower bound: f = (.9, .1) with P = (.459, .541) gives 0.934.

    Options:
        load: what f counts: `selected` experts, `argmax` (MiLoRA), both without gradient; or `gates`, the mean gate
            with its gradient and not divided by its sum (DynMoLE), which falls when gate mass is masked away.
    """
    mean_probs = mean_over_tokens(shares(routing), ctx.weights(routing.probs))
    return routing.num_experts * (load_share(routing, ctx, load) * mean_probs).sum()


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


class WeightedLoss:
    """One loss of a config: the function with its options, its weight, and how decisions of several sites add up.

    Args:
        spec: `{name, weight, over, **options}`; weight may be a schedule; `over` is `mean` (default) or `sum` over
            the decisions of a forward.
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        options = dict(spec)
        self.name = options.pop("name")
        self.over = options.pop("over", "mean")
        self.weight = number(options.pop("weight", 1.0))
        self.function = Scheduled(losses.get(self.name), options)
        self.needs_parts = "parts" in losses.fact(self.name, "given", ())

    def __call__(self, routing: Routing, ctx: Context, decisions: int, parts: Parts | None = None) -> Tensor:
        """Return the weighted share of one decision among `decisions` of them."""
        weight = self.weight(ctx.progress) / (decisions if self.over == "mean" else 1)
        given = {"parts": parts} if self.needs_parts else {}
        return weight * self.function(routing, ctx, progress=ctx.progress, **given)


def check_loss(spec: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with one entry of a config's `losses`."""
    if not isinstance(spec, Mapping) or "name" not in spec:
        return [f"loss {spec!r} must be a mapping with a 'name' and a 'weight'"]
    problems = losses.problems({k: v for k, v in spec.items() if k not in ("weight", "over")})
    if "weight" not in spec:
        problems.append(f"loss '{spec['name']}' needs a 'weight'; its value at perfect balance times it is its size")
    if spec.get("over", "mean") not in ("mean", "sum"):
        problems.append(f"loss '{spec['name']}': over {spec['over']!r} is unknown; known: mean, sum")
    if not problems:
        even = torch.full((1, 1, 2), 0.5)
        try:
            loss = WeightedLoss(spec)
            for progress in () if loss.needs_parts else (0.0, 1.0):  # wrong options fail now, not in the first step
                loss(Routing(even, even, even), Context(progress=progress), 1)
        except ConfigError as error:
            problems.append(f"loss '{spec['name']}': {error}")
    return problems
