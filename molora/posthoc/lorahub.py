"""LoraHub (arXiv 2307.13269): one weight per adapter, found on a few examples without gradients.

    minimise over w in [-bound, bound]^E:   loss(w) + penalty * mean |w|          starting from w = 0

`mode: exact` mixes what the adapters do, `sum_e w_e dW_e`. `mode: factors` is the paper's own mixing of A and B each,
`(sum_e w_e B_e) (sum_e w_e A_e)`: quadratic in w with cross terms between adapters, so that w = -1 equals w = 1 for a
single adapter and w = 0.5 gives a quarter of it; it needs equal ranks.

The search is CMA-ES (the package `cmaes`, in the extra `search`) and then the simplex of Nelder and Mead, instead of
the paper's NGOpt; its numbers (40 evaluations, +-1.5, 0.05) are the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from ..control import routed_layers
from ..errors import ConfigError, raise_all
from ..routing.router import Router
from .rerouting import expert_names, posthoc_routers, reroute
from .scoring import Batch, mean_loss

MODES = ("exact", "factors")
GLOBAL_SHARE = 0.6  # of the evaluations go to CMA-ES, the rest to a simplex around the best that it found


@dataclass
class Found:
    """What a search found.

    Attributes:
        weights: (E,) float64, the best weights that were tried.
        value: of the objective there, penalty included.
        history: the best value after each evaluation.
    """

    weights: Tensor
    value: float
    history: list[float] = field(default_factory=list)


def search(
    loss: Callable[[Tensor], float],
    num: int,
    *,
    budget: int = 40,
    bound: float = 1.5,
    penalty: float = 0.05,
    step: float = 0.5,
    seed: int = 0,
) -> Found:
    """Return the weights of smallest `loss(w) + penalty * mean |w|` that a search without gradients finds.

    Args:
        loss: of weights (num,) float64; NaN and infinity count as the worst.
        num: how many weights.
        budget: how often the loss is evaluated; w = 0 is the first.
        bound: every weight stays in +-bound.
        penalty: on the mean absolute weight.
        step: standard deviation of the first candidates.
        seed: of the candidates.

    Raises:
        ConfigError: arguments that cannot work, or the package `cmaes` is missing.
    """
    problems = [f"{name} must be positive, got {n}" for name, n in (("bound", bound), ("step", step)) if not n > 0]
    problems += [f"{name} must be at least 1, got {n}" for name, n in (("num", num), ("budget", budget)) if n < 1]
    if not penalty >= 0:
        problems.append(f"penalty must not be negative, got {penalty}")
    raise_all(problems, ConfigError, "these weights cannot be searched")
    try:
        from cmaes import CMA
    except ImportError:
        raise ConfigError("searching weights needs the package cmaes: pip install 'molora[search]'") from None

    best = torch.zeros(num, dtype=torch.float64)
    found = Found(best, math.inf)

    def objective(candidate: Tensor) -> float:
        value = float(loss(candidate)) + penalty * float(candidate.abs().mean())
        value = value if math.isfinite(value) else math.inf
        if value < found.value or not found.history:
            found.weights, found.value = candidate.clone(), value
        found.history.append(found.value)
        return value

    objective(best)
    if num > 2:  # with one or two weights the simplex alone is quicker
        bounds = numpy.tile([-bound, bound], (num, 1)).astype(float)
        strategy = CMA(mean=numpy.zeros(num), sigma=step, bounds=bounds, seed=seed)
        while len(found.history) + strategy.population_size <= GLOBAL_SHARE * budget and not strategy.should_stop():
            points = [strategy.ask() for _ in range(strategy.population_size)]
            told = [(point, min(objective(torch.from_numpy(point.copy())), 1e300)) for point in points]
            strategy.tell(told)
    generator = torch.Generator().manual_seed(seed)
    while len(found.history) < budget:  # again from the best, with another simplex, when one has shrunk to a point
        signs = torch.randint(2, (num,), generator=generator) * 2.0 - 1.0
        simplex(objective, found, signs * step, bound, budget)
    return found


def simplex(objective: Callable[[Tensor], float], found: Found, steps: Tensor, bound: float, budget: int) -> None:
    """Search from the best weights of `found` by the simplex of Nelder and Mead, held inside of +-bound.

    Args:
        objective: evaluates weights (E,) and notes them in `found`.
        found: what was found so far.
        steps: (E,), how far the corners of the first simplex lie from the best weights.
        bound: of every weight.
        budget: when to stop; it also stops where the corners lie closer together than 1e-9.
    """
    start, num = found.weights, len(found.weights)
    corners = [(found.value, start)]
    for axis in range(num):
        if len(found.history) >= budget:
            return
        corner = start.clone()
        corner[axis] += steps[axis] if abs(corner[axis] + steps[axis]) <= bound else -steps[axis]
        corners.append((objective(corner.clamp_(-bound, bound)), corner))
    while len(found.history) < budget:
        corners.sort(key=lambda pair: pair[0])
        best, worst = corners[0][1], corners[-1]
        if max(float((corner - best).abs().max()) for _, corner in corners) < 1e-9:
            return
        centre = torch.stack([corner for _, corner in corners[:-1]]).mean(0)

        def at(factor: float, centre: Tensor = centre, worst: Tensor = worst[1]) -> tuple[float, Tensor]:
            point = (centre + factor * (worst - centre)).clamp(-bound, bound)
            return objective(point), point

        mirrored = at(-1.0)
        if corners[0][0] <= mirrored[0] < corners[-2][0]:
            corners[-1] = mirrored
        elif mirrored[0] < corners[0][0]:
            further = at(-2.0) if len(found.history) < budget else mirrored
            corners[-1] = min(further, mirrored, key=lambda pair: pair[0])
        elif len(found.history) < budget:
            nearer = at(-0.5 if mirrored[0] < worst[0] else 0.5)
            if nearer[0] < min(mirrored[0], worst[0]):
                corners[-1] = nearer
                continue
            for position, (_, corner) in enumerate(corners[1:], 1):  # nothing helps: shrink towards the best
                if len(found.history) >= budget:
                    return
                moved = best + 0.5 * (corner - best)
                corners[position] = (objective(moved), moved)


@posthoc_routers.register("lorahub")
def build(
    model: nn.Module,
    adapter: str = "default",
    *,
    examples: Sequence[Batch] | None = None,
    loss: Callable[[nn.Module], float] | None = None,
    weights: Sequence[float] | Tensor | None = None,
    mode: str = "exact",
    sample: int | None = None,
    budget: int = 40,
    bound: float = 1.5,
    penalty: float = 0.05,
    seed: int = 0,
) -> nn.Module:
    """Weigh the experts of a mixture by constants that fit a few examples; afterwards it can be merged or exported.

    Args:
        model: a mixture, as `molora.import_peft` makes it.
        adapter: the name of the mixture.
        examples: batches with labels, five rows in the paper; the loss is the mean over rows of each row's mean
            cross-entropy (the authors' code divides a sum of batch means by the number of rows instead, so that the
            penalty weighs more in larger batches).
        loss: what to minimise instead, of the model as it is then.
        weights: take these, (E,), and search nothing.
        mode: `exact` or `factors` (the paper's).
        sample: draw so many of the experts and leave the others at 0; the paper draws 20 of its 196.
        budget, bound, penalty, seed: see `search`.

    Returns:
        The model; `weights_of(model, adapter)` are what was found.

    Raises:
        ConfigError: options that cannot work with this mixture; nothing is changed.
    """
    names, layers = expert_names(model, adapter), routed_layers(model, adapter)
    problems = [] if mode in MODES else [f"mode {mode!r} is unknown; known: {', '.join(MODES)}"]
    if sum(given is not None for given in (examples, loss, weights)) != 1:
        problems.append("give either examples, or a loss, or weights")
    if weights is not None and len(weights) != len(names):
        problems.append(f"it needs {len(names)} weights, one per expert, got {len(weights)}")
    if sample is not None and not 1 <= sample <= len(names):
        problems.append(f"sample must be between 1 and the number of experts {len(names)}, got {sample}")
    problems += _why_no_factors(layers, adapter, names) if mode == "factors" else []
    raise_all(problems, ConfigError, "LoraHub cannot weigh this mixture")
    routers = reroute(
        model,
        adapter,
        scorer={"name": "constant"},
        link="identity",
        selector="softmax",
        weights="frozen",
        experts={"frozen": "all", **({"form": "factor"} if mode == "factors" else {})},
    )
    if weights is not None:
        _set(routers, torch.as_tensor(weights))
        return model
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(names), generator=generator)[: sample or len(names)].sort().values

    def spread(found: Tensor) -> Tensor:
        return torch.zeros(len(names), dtype=torch.float64).index_copy(0, chosen, found)

    def of_weights(candidate: Tensor) -> float:
        _set(routers, spread(candidate))
        return mean_loss(model, examples) if loss is None else float(loss(model))  # type: ignore[arg-type]

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            found = search(of_weights, len(chosen), budget=budget, bound=bound, penalty=penalty, seed=seed)
    finally:
        model.train(was_training)
    _set(routers, spread(found.weights))
    return model


def weights_of(model: nn.Module, adapter: str = "default") -> Tensor:
    """Return the constant weights (E,) of a mixture that `build` has made."""
    routers = [layer.molora_router[adapter] for layer in routed_layers(model, adapter).values()]
    if not hasattr(routers[0].scorer, "weight") or routers[0].scorer.weight.dim() != 1:
        raise ConfigError(f"adapter '{adapter}' is not weighed by constants; call lorahub.build first")
    return routers[0].scorer.weight.detach().clone()


@torch.no_grad()
def _set(routers: Sequence[Router], weights: Tensor) -> None:
    for router in routers:
        router.scorer.weight.copy_(weights)


def _why_no_factors(layers: dict[str, Any], adapter: str, names: Sequence[str]) -> list[str]:
    """Return why the factors of these experts cannot be mixed each by itself."""
    found = []
    for path, layer in layers.items():
        bank = layer.molora_bank[adapter]
        idle = [name for expert, name in enumerate(names) if not bank.pair(expert)[1].any()]
        if len(set(bank.ranks)) > 1:
            found.append(
                f"layer '{path}' has experts of ranks {list(bank.ranks)}, and mode 'factors' needs equal ranks"
            )
        elif idle:
            found.append(
                f"layer '{path}' is not adapted by {', '.join(idle)}, so that its A would mix with random values"
            )
    return found
