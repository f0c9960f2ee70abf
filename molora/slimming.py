"""A policy made after training: how many experts each layer keeps at inference, from what its router was seen to do.

The idea is LaDiMo's (its second stage: a training-free policy per layer from profiled routing weights). For each
decision the smallest k is kept whose best k experts hold at least a given share of the probability, in the mean over
the tokens that were profiled. The policy is part of the adapter's configuration, so it is saved with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .control import routed_layers, trace_of, tuner_of
from .errors import ConfigError, did_you_mean, raise_all
from .plan import regex_of
from .routing.losses import mean_over_tokens, shares
from .routing.schedules import Scheduled
from .routing.selectors import selectors
from .routing.trace import Site
from .routing.types import Context, Routing


@torch.no_grad()
def profile_mass(
    model: nn.Module, batches: Iterable[Any], adapter: str = "default", run: Callable[[Any], Any] | None = None
) -> dict[str, Tensor]:
    """Return the mean share of the best expert, of the second, ..., (N,) float32 by the layer that decides.

    Args:
        model: a wrapped model; it is run as it is (call `model.eval()` first).
        batches: mappings of inputs of the model. Padding does not count.
        adapter: the name of the mixture.
        run: runs one batch; by default `model(**batch)`.
    """
    trace, sums = trace_of(model), {}

    def reader(site: Site, routing: Routing, ctx: Context) -> None:
        if site.adapter == adapter:
            weights = ctx.weights(routing.probs)
            ranked = shares(routing).sort(-1, descending=True).values
            total, count = sums.get(site.name, (0.0, 0.0))
            sums[site.name] = (total + mean_over_tokens(ranked, weights) * weights.sum(), count + weights.sum())

    with trace.telling(reader):
        for batch in batches:
            run(batch) if run is not None else model(**batch)
    if not sums:
        raise ConfigError(f"no decision of adapter '{adapter}' was seen: give at least one batch, and make it active")
    return {name: total / count.clamp_min(1.0) for name, (total, count) in sums.items()}


def smallest_k(mass: Mapping[str, Tensor], threshold: float = 0.9) -> dict[str, int]:
    """Return, per layer, the smallest k whose best k experts hold at least `threshold` of the probability."""
    if not 0 < threshold <= 1:
        raise ConfigError(f"threshold must be in (0, 1], got {threshold}")
    policy = {}
    for name, ranked in mass.items():
        held = ranked.double().cumsum(0) >= threshold - 1e-6  # the shares of float32 sum to 1 only so far
        policy[name] = int(held.long().argmax()) + 1 if bool(held.any()) else len(ranked)
    return policy


def keep_k(model: nn.Module, policy: Mapping[str, int], adapter: str = "default") -> None:
    """Let each layer of a policy use its own k from now on, and write that into the adapter's configuration.

    Args:
        model: a wrapped model.
        policy: k by the layer that decides, as `smallest_k` returns it.
        adapter: the name of the mixture.

    Raises:
        ConfigError: a layer takes no decision, a k does not fit, or the selector has no option `k`.
    """
    config = tuner_of(model).peft_config[adapter]
    layers = routed_layers(model, adapter)
    leaders = {name: layer for name, layer in layers.items() if adapter in layer.molora_router}
    problems = [f"layer '{n}' takes no decision{did_you_mean(n, leaders)}" for n in policy if n not in leaders]
    name = config.selector if isinstance(config.selector, str) else config.selector["name"]
    if "k" not in selectors.options(name) or isinstance(selectors.get(name), type):
        problems.append(f"selector '{name}' has no k to choose per layer; use top_k or soft_train")
    for layer, k in policy.items():
        experts = leaders[layer].molora_router[adapter].num_experts if layer in leaders else k
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= experts:
            problems.append(f"layer '{layer}' has {experts} experts, so it cannot keep {k!r}")
    raise_all(problems, ConfigError, "this policy cannot be used")
    entries = [{"match": regex_of([layer]), "selector": {"k": k}} for layer, k in policy.items()]
    matches = {entry["match"] for entry in entries}
    config.layers = entries + [e for e in config.layers if e["match"] not in matches or "experts" in e]
    for layer, k in policy.items():
        spec = config.selector_at({"k": k})
        options = {key: value for key, value in spec.items() if key != "name"}
        leaders[layer].molora_router[adapter].selector = Scheduled(selectors.get(name), options)
    for layer in layers.values():
        layer.forget_calls()  # prepared calls know the old k
