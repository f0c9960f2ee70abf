"""Changing how a mixture is routed: the common ground of all routers in this folder, and their registry.

A router made after training is a function `build(model, adapter="default", **options)`, registered by name in
`posthoc_routers`. It gives the mixture other routers with `reroute`, fills them, and returns the model; what it has
made is saved with the adapter, since routers are configuration and tensors like any other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..config import MoloraConfig
from ..control import routed_layers, tuner_of
from ..errors import ConfigError, raise_all
from ..experts.bank import ExpertBank
from ..experts.forms import build_experts, form_name
from ..growth import replan
from ..routing.router import Router
from ..undo import undone_on_error
from .registry import posthoc_routers

# What says how a mixture is routed, and its values for a router without anything special.
PLAIN: dict[str, Any] = {
    "scorer": "linear",
    "link": "softmax",
    "selector": "softmax",
    "price": None,
    "pool": "mean",
    "feature": None,
    "weights": "own",
    "granularity": "token",
    "share": "site",
    "per_site": False,
    "losses": [],
    "objective": None,
    "branches": None,
    "mix": "sum",
}


def reroute(model: nn.Module, adapter: str = "default", **changes: Any) -> list[Router]:
    """Give a mixture new routers; its experts stay bit by bit, and nothing of the old routers is left.

    Args:
        model: a wrapped model.
        adapter: which of its adapters.
        changes: fields of MoloraConfig that say how it is routed (the keys of PLAIN; what is not named is as there),
            and of `experts`: `frozen`, `form`, `null`.

    Returns:
        The new routers, in the order of the layers that decide. Parameters are new objects: make the optimizer anew.

    Raises:
        ConfigError: the configuration cannot work with these experts; nothing is changed.
    """
    layers = routed_layers(model, adapter)
    config: MoloraConfig = tuner_of(model).peft_config[adapter]
    experts = changes.pop("experts", {})
    known = {*PLAIN}
    problems = [f"'{key}' does not say how a mixture is routed" for key in changes if key not in known]
    problems += [f"experts.{key} stays as it is" for key in experts if key not in ("frozen", "form", "null")]
    if any(layer.roles or layer.molora_bank[adapter].frozen for layer in layers.values()):
        problems.append("some of its experts are frozen, or whole blocks; only all experts alike can be rerouted")
    raise_all(problems, ConfigError, f"adapter '{adapter}' cannot be routed in another way")
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.init}
    fields.pop("peft_type", None)
    fields |= {**PLAIN, **changes, "recipe": None, "experts": {**config.experts, **experts}}
    if changes:
        entries = ({k: v for k, v in entry.items() if k != "selector"} for entry in config.layers)
        fields["layers"] = [entry for entry in entries if "experts" in entry]
    changed = MoloraConfig(**fields)
    with undone_on_error(model):
        _reshape_experts(layers, adapter, config, changed)
        replan(model, adapter, changed, keep=False)
    for layer in layers.values():
        layer.forget_calls()
    return routers_of(model, adapter)


def _reshape_experts(layers: dict[str, Any], adapter: str, old: MoloraConfig, new: MoloraConfig) -> None:
    """Give the banks the form and the frozen flag of the new config, with the same A and B."""
    moves = old.experts["form"] != new.experts["form"]
    for layer in layers.values():
        bank = layer.molora_bank[adapter]
        if moves:
            dropout = bank.dropout.p if bank.dropout is not None else 0.0
            given = {"scaling": bank.scaling, "dropout": dropout, "frozen": (), "init": new.experts["init"]}
            fresh = build_experts(new.experts["form"], bank.d_in, bank.d_out, bank.ranks, **given)
            with torch.no_grad():
                for name in ("A", "Bt"):
                    getattr(fresh, name).copy_(getattr(bank, name))
            layer.molora_bank[adapter] = bank = fresh.to(bank.A.device).train(bank.training)
        bank.all_frozen = new.experts["frozen"] == "all"


def route(model: nn.Module, name: str, adapter: str = "default", **options: Any) -> nn.Module:
    """Route a mixture that is there by the post-hoc router called `name`; `molora.compose` does it from LoRAs.

    Args:
        model: a wrapped model.
        name: as registered, such as `arrow`.
        adapter: which of its adapters.
        options: of the router's `build`.

    Returns:
        The model.

    Raises:
        ConfigError: unknown router or options, or what its `build` refuses; nothing is changed.
    """
    problems = posthoc_routers.problems({"name": name, **options})
    raise_all(problems, ConfigError, f"adapter '{adapter}' cannot be routed by '{name}'")
    posthoc_routers.get(name)(model, adapter, **options)
    tuner_of(model).peft_config[adapter].recipe = f"posthoc/{name}"  # where a live mixture looks who refreshes it
    return model


def routers_of(model: nn.Module, adapter: str = "default") -> list[Router]:
    """Return the routers of an adapter, in the order of the layers that decide."""
    layers = routed_layers(model, adapter).values()
    return [layer.molora_router[adapter] for layer in layers if adapter in layer.molora_router]


def sites_of(model: nn.Module, adapter: str = "default") -> list[str]:
    """Return the paths of the layers that decide, in the order of `routers_of`."""
    layers = routed_layers(model, adapter)
    return [path for path, layer in layers.items() if adapter in layer.molora_router]


def expert_names(model: nn.Module, adapter: str = "default") -> list[str]:
    """Return what the experts of a mixture are called; `expert_0`, ... where they have no names.

    Raises:
        ConfigError: layers have different numbers of experts, so that no name means the same everywhere.
    """
    counts = {layer.molora_bank[adapter].num_experts for layer in routed_layers(model, adapter).values()}
    config: MoloraConfig = tuner_of(model).peft_config[adapter]
    if len(counts) > 1:
        raise ConfigError(f"adapter '{adapter}' has {sorted(counts)} experts in its layers; they need the same number")
    names = config.experts["names"]
    return list(names) if names else [f"expert_{number}" for number in range(counts.pop())]


def keep_experts(model: nn.Module, experts: Sequence[int], adapter: str = "default") -> None:
    """Leave only some experts in a mixture, in the given order, and route them by a fresh linear router.

    Args:
        model: a wrapped model whose experts have form lora.
        experts: their numbers, each once.
        adapter: which of the model's adapters.

    Raises:
        ConfigError: an expert does not exist, is named twice, or the experts cannot be taken apart.
    """
    config: MoloraConfig = tuner_of(model).peft_config[adapter]
    names, chosen = expert_names(model, adapter), [int(expert) for expert in experts]
    problems = [f"there is no expert {e}, only 0 to {len(names) - 1}" for e in chosen if not 0 <= e < len(names)]
    if not chosen or len(set(chosen)) < len(chosen):
        problems.append(f"experts must be different numbers, at least one, got {chosen}")
    if form_name(config.experts["form"]) != "lora" or config.experts["shared"] or config.experts["pool"] != "none":
        problems.append("only experts of form lora, without shared ones or a pool, can be taken apart")
    raise_all(problems, ConfigError, f"adapter '{adapter}' cannot keep these experts")

    def picked(rank: Any) -> Any:
        return [rank[e] for e in chosen] if isinstance(rank, (list, tuple)) else rank

    own = {**config.experts, "num": len(chosen), "rank": picked(config.experts["rank"])}
    own["names"] = [names[e] for e in chosen] if config.experts["names"] else None
    entries = [
        {**entry, "experts": {**entry["experts"], "rank": picked(entry["experts"]["rank"])}}
        if "rank" in entry.get("experts", {})
        else entry
        for entry in config.layers
    ]
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.init}
    fields.pop("peft_type", None)
    changed = MoloraConfig(**{**fields, **PLAIN, "experts": own, "layers": entries})
    with undone_on_error(model):
        for layer in routed_layers(model, adapter).values():
            bank: ExpertBank = layer.molora_bank[adapter]
            dropout = bank.dropout.p if bank.dropout is not None else 0.0
            ranks = [bank.ranks[e] for e in chosen]
            fresh = ExpertBank(bank.d_in, bank.d_out, ranks, scaling=bank.scaling, dropout=dropout)
            for slot, expert in enumerate(chosen):
                fresh.write(slot, *bank.pair(expert), scale=bank.scaling)
            fresh.all_frozen = bank.all_frozen
            layer.molora_bank[adapter] = fresh.to(bank.A.device).train(bank.training)
        replan(model, adapter, changed, keep=False)
    for layer in routed_layers(model, adapter).values():
        layer.forget_calls()
