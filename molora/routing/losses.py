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

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError
from ..registry import Registry
from .entropy import shannon
from .entropy import tsallis as tsallis_entropy
from .recall import Recall
from .types import Context, Routing

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
