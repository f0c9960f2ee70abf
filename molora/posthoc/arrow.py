"""Arrow (arXiv 2405.11157): route to the expert whose update amplifies the hidden state most; no data, no training.

The prototype of an expert at a layer is v, the top right singular vector of its update `s B A`: the input direction
that it amplifies most. Scores are |h v| / temperature, the softmax runs over the top k. h is not normalised (as in
PEFT, whatever its documentation says), so the temperature belongs to the scale of the hidden states.

v comes from QR of both factors and the SVD of an r x r core, in float64: exact. PEFT runs 15 power iterations, which
do not converge where the first two singular values are close.

GenKnowSub (ACL 2025, short 54) takes the mean of general adapters away from each task adapter:

- `subtract="delta"`: `dW_e - mean dW_g`, as its text says. No weight changes: the general experts get the gate
  -1 / G (selector `subtract`), and prototypes are those of the differences.
- `subtract="factors"`: `(B_e - mean B_g)(A_e - mean A_g)`, as PEFT and the authors compute it; in place, once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..control import routed_layers, tuner_of
from ..errors import ConfigError, raise_all
from ..experts.bank import ExpertBank
from ..experts.merge import Pair, product_merge, svd
from ..registry import split_spec
from .base import install, put, slots_of
from .registry import posthoc_routers
from .rerouting import expert_names

MODES = ("delta", "factors")


def direction(A: Tensor, B: Tensor) -> Tensor | None:
    """Return the top right singular vector (d_in,) of B A, in float32; None when B A is zero.

    A: (r, d_in), B: (d_out, r). Costs O((d_in + d_out) r^2 + r^3), whatever the ranks. Its sign is chosen so that its
    largest entry is positive, so that the same expert always gives the same file.
    """
    _, values, V = svd(A.detach(), B.detach())
    if not values[0] > 0:
        return None
    v = V[:, 0]
    return (v * v[v.abs().argmax()].sign()).float()


def build(
    model: nn.Module,
    adapter: str = "default",
    *,
    top_k: int | None = 3,
    temperature: float = 1.0,
    share: str = "site",
    general: Sequence[int | str] = (),
    subtract: str = "delta",
) -> nn.Module:
    """Route a mixture by Arrow.

    Args:
        model: a wrapped model.
        adapter: the name of the mixture.
        top_k: how many experts act per token, at most all; None: all.
        temperature: divides |h v|.
        share: `site`, or `group`: layers that read the same input (q, k, v; gate, up) share one decision, from the
            prototype of their updates on top of each other.
        general: numbers or names of general experts, which are subtracted from the others and not routed to.
        subtract: `delta` or `factors`, see the top of this file. `factors` rewrites the experts: call it once. It
            needs equal ranks, and scales that differ between experts count as parts of their B.

    Returns:
        The model.

    Raises:
        ConfigError: the mixture cannot be routed so; nothing is changed.
    """
    names = expert_names(model, adapter)
    away = sorted(set(slots_of(names, general)))
    if share not in ("site", "group"):
        raise ConfigError(f"arrow knows share site and group, not '{share}'")
    if subtract not in MODES:
        raise ConfigError(f"arrow option subtract={subtract!r} is unknown; known: {', '.join(MODES)}")
    if len(away) == len(names):
        raise ConfigError("arrow needs an expert that is not general")
    left = len(names) - len(away)
    k = left if top_k is None else min(top_k, left)
    scorer = {"name": "prototypes", "measure": "abs"}
    selector = {"name": "top_k", "k": k, "normalise": "sum1"}
    if away and subtract == "factors":
        _check_factors(model, adapter)
        scorer["absent"] = away
    elif away:
        selector = {"name": "subtract", "k": k, "general": away}
    link = {"name": "softmax", "temperature": float(temperature)}
    install(model, adapter, scorer=scorer, link=link, selector=selector, share=share)
    if away and subtract == "factors":
        _subtract_factors(model, adapter, away)
    refresh(model, adapter)
    return model


def refresh(model: nn.Module, adapter: str = "default", *, slot: int | None = None) -> None:
    """Compute the prototypes of an Arrow mixture anew, after experts were written into its slots.

    With `subtract="factors"`, an expert that is written later has the general ones still in it.

    Args:
        model: a wrapped model.
        adapter: the name of the mixture.
        slot: the only expert that has changed; None: any may have.

    Raises:
        ConfigError: the mixture is not routed by Arrow.
    """
    config = tuner_of(model).peft_config.get(adapter)
    name, options = ("", {}) if config is None else split_spec(config.scorer)
    if name != "prototypes" or options.get("measure") != "abs":
        raise ConfigError(f"adapter '{adapter}' is not routed by Arrow; see molora.posthoc.arrow.build")
    general = split_spec(config.selector)[1].get("general", ())
    never = {*general, *options.get("absent", ())}
    groups: dict[str, list[ExpertBank]] = {}
    leaders = {}
    for layer in routed_layers(model, adapter).values():
        site = layer.sites[adapter]
        groups.setdefault(site.group, []).append(layer.molora_bank[adapter])
        if adapter in layer.molora_router:
            leaders[site.group] = layer.molora_router[adapter]
    for group, router in leaders.items():
        alone = slot is not None and slot not in general  # every prototype depends on the general experts
        for expert in [slot] if alone else range(router.num_experts):
            pairs = [] if expert in never else [_update(bank, expert, general) for bank in groups[group]]
            if pairs:
                stacked = torch.cat([A for A, _ in pairs]), torch.block_diag(*[B for _, B in pairs])
            put(router, expert, direction(*stacked) if pairs else None)


def _update(bank: ExpertBank, slot: int, away: Sequence[int]) -> Pair:
    """Return A and B of what an expert does, minus the mean of the general ones.

    An expert that does nothing at this layer has no direction of its own, so nothing is subtracted from it.
    """
    A, B = bank.pair(slot)
    if not away or not (B.any() and A.any()):
        return A, B
    others = [bank.pair(e) for e in away]
    return product_merge([(A, B), *others], [1.0, *[-1.0 / len(away)] * len(away)])


def _check_factors(model: nn.Module, adapter: str) -> None:
    problems = []
    for path, layer in routed_layers(model, adapter).items():
        ranks = sorted(set(layer.molora_bank[adapter].ranks))
        if len(ranks) > 1:
            problems.append(f"layer '{path}' has experts of ranks {ranks}")
    raise_all(problems, ConfigError, "factors of different ranks cannot be subtracted; use subtract='delta'")


def _subtract_factors(model: nn.Module, adapter: str, away: Sequence[int]) -> None:
    for layer in routed_layers(model, adapter).values():
        bank: ExpertBank = layer.molora_bank[adapter]
        general = [bank.pair(e) for e in away]
        mean_A = torch.stack([A for A, _ in general]).mean(0)
        mean_B = torch.stack([B for _, B in general]).mean(0)
        for slot in range(layer.molora_bank[adapter].num_experts):
            if slot not in away:
                A, B = bank.pair(slot)
                bank.write(slot, A - mean_A, B - mean_B, bank.scaling)


posthoc_routers.register("arrow", refresh=refresh)(build)
