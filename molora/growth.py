"""Changing a mixture that is trained already: more experts for a new task, and few-shot adaptation of Poly and MHR.

Both keep the model and every other adapter as they are and make routers anew, with what the old ones have learned in
their place. Parameters are new objects afterwards, so the optimizer must be made anew, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .config import MoloraConfig, build_config
from .control import routed_layers, tuner_of
from .errors import ConfigError, raise_all
from .experts.bank import ExpertBank
from .layers import RoutedLinear
from .plan import form_of
from .routing.router import Router
from .sites import Blocks
from .undo import undone_on_error

MODES = ("full", "z", "mu")


def grow(model: nn.Module, num: int, *, adapter: str = "default", freeze: bool = True) -> None:
    """Add experts to a mixture, behind the routed ones that it has; what it has learned stays bit by bit.

    For one task after another (MoRA, arXiv 2506.21035): the experts of earlier tasks are frozen, the new ones start
    with B = 0, and routers that score experts by rows get new rows. The old experts' weights stay, but their gates do
    not: whatever compares experts (a softmax, a norm over all responses) now compares them with the new ones, too.

    Args:
        model: a wrapped model; its experts must have form lora or rank.
        num: how many experts to add in each layer.
        adapter: which of the model's adapters.
        freeze: freeze the experts that are there; otherwise the new ones are trained beside them.

    Raises:
        ConfigError: the experts cannot grow; nothing is changed.
    """
    tuner = tuner_of(model)
    layers = routed_layers(model, adapter)
    config: MoloraConfig = tuner.peft_config[adapter]
    experts = config.experts
    problems = _why_not_grow(layers, experts, config, num)
    raise_all(problems, ConfigError, f"adapter '{adapter}' cannot grow")
    old, shared = experts["num"], experts["shared"]
    frozen = list(range(old)) if freeze else experts["frozen"]
    if not freeze and frozen != "all":  # shared experts move behind the new ones
        frozen = [e if e < old else e + num for e in frozen]
    names = experts["names"]
    if names is not None:
        fresh = [f"expert_{old + i}" for i in range(num)]
        names = [*names[:old], *fresh, *names[old:]]
    changed = build_config(config, {"experts": {"num": old + num, "frozen": frozen, "names": names}})
    with undone_on_error(model):
        for layer in layers.values():
            bank: ExpertBank = layer.molora_bank[adapter]
            rank = bank.ranks[0]
            options = {"form": bank.form, "scaling": bank.scaling, "init": experts["init"], "frozen": frozen}
            dropout = bank.dropout.p if bank.dropout is not None else 0.0
            new = ExpertBank(bank.d_in, bank.d_out, [rank] * (old + num + shared), dropout=dropout, **options)
            for slot in range(old + shared):
                new.write(slot if slot < old else slot + num, *bank.pair(slot), scale=bank.scaling)
            layer.molora_bank[adapter] = new.train(bank.training)
        replan(model, adapter, changed)


def _why_not_grow(
    layers: Mapping[str, nn.Module], experts: Mapping[str, Any], config: MoloraConfig, num: int
) -> list[str]:
    problems = []
    if isinstance(num, bool) or not isinstance(num, int) or num < 1:
        problems.append(f"it needs a whole number of experts >= 1, got {num!r}")
    if form_of(experts) not in ("lora", "rank"):
        problems.append(f"experts of form '{form_of(experts)}' have no slots to add; forms lora and rank have")
    if not isinstance(experts["num"], int) or not isinstance(experts["rank"], int) or config.layers:
        problems.append("its layers have different numbers or ranks of experts; grow() knows one number for all")
    return problems + _not_linear(layers, experts)


def _not_linear(layers: Mapping[str, nn.Module], experts: Mapping[str, Any]) -> list[str]:
    """Return why the layers of an adapter are not all linear layers with experts of their own."""
    others = [path for path, layer in layers.items() if not isinstance(layer, RoutedLinear) or layer.roles]
    problems = [f"layer '{others[0]}' is no linear layer with experts of its own"] if others else []
    if experts.get("pool", "none") != "none":
        problems.append("its layers draw their experts from one pool")
    return problems


def few_shot(model: nn.Module, mode: str, *, num_tasks: int = 1, adapter: str = "default") -> None:
    """Prepare a mixture that routes by task for new tasks with few examples (Poly, MHR; arXiv 2211.03831).

    Args:
        model: a wrapped model whose scorer is a table.
        mode: `full` (a new table and the experts are trained), `z` (the new table alone: h * E numbers per task and
            layer), or `mu` (the experts alone, under fixed equal gates). In mode `mu` all E experts of a layer get
            the same gradient, each 1 / E of what their mean would get under plain gradient descent.
        num_tasks: rows of the new table, one per new task, numbered from 0; they start nearly equal.
        adapter: which of the model's adapters.

    Raises:
        ConfigError: the adapter does not route by task, or the mode is unknown; nothing is changed.
    """
    config: MoloraConfig = tuner_of(model).peft_config[adapter]
    scorer = config.scorer if isinstance(config.scorer, Mapping) else {"name": config.scorer}
    if mode not in MODES:
        raise ConfigError(f"few-shot mode '{mode}' is unknown; known: {', '.join(MODES)}")
    if scorer["name"] != "table":
        raise ConfigError(f"few_shot() replaces the table of tasks, but this adapter has scorer '{scorer['name']}'")
    if isinstance(config.experts["frozen"], (list, tuple)) and config.experts["frozen"]:
        raise ConfigError("few_shot() trains all experts or none, but this adapter has some of them frozen")
    problems = _not_linear(routed_layers(model, adapter), config.experts)
    raise_all(problems, ConfigError, f"adapter '{adapter}' cannot be adapted")
    changes: dict[str, Any] = {"experts": {"frozen": "all" if mode == "z" else []}}
    if mode == "mu":
        changes |= {"scorer": {"name": "constant", "learn": False}, "link": "softmax", "selector": "softmax"}
        changes["granularity"] = "token"
    else:
        changes["scorer"] = {**scorer, "num_tasks": num_tasks}
    with undone_on_error(model):
        for layer in routed_layers(model, adapter).values():
            layer.molora_bank[adapter].all_frozen = mode == "z"
        replan(model, adapter, build_config(config, changes), keep=False)


def replan(model: nn.Module, adapter: str, config: MoloraConfig, keep: bool = True) -> None:
    """Make the routers of an adapter anew for a changed config, with what the old ones know unless told otherwise."""
    tuner = tuner_of(model)
    config.fingerprint, config.inference_mode = tuner.peft_config[adapter].fingerprint, False
    layers = routed_layers(model, adapter)
    old = {name: layer.molora_router.pop(adapter) for name, layer in layers.items() if adapter in layer.molora_router}
    tuner.peft_config[adapter] = config
    tuner.plan_decisions(adapter, Blocks(tuner.model), fixed=())
    for name, layer in layers.items():
        layer._move_adapter_to_device_of_base_layer(adapter)
        if keep and name in old:
            _inherit(layer.molora_router[adapter], old[name])
        layer.molora_bank[adapter].requires_grad_(adapter in tuner.active_adapters)
        layer._freeze_non_trainable_peft_weights()
        for router in layer.molora_router.values():
            router.train(layer.training)


@torch.no_grad()
def _inherit(new: Router, old: Router) -> None:
    """Copy what an old router has learned; where an axis has grown, old experts keep their places."""
    moved = torch.cat([_places(old, new) + block * (new.num_experts + new.null) for block in range(new.splits)])
    before = old.state_dict()
    for key, tensor in new.state_dict().items():
        if key in before:
            _copy(tensor, before[key].to(tensor.device), moved.to(tensor.device), key)


def _places(old: Router, new: Router) -> Tensor:
    """Return where each choice of the old router is in the new one: null experts stay last."""
    experts = torch.arange(old.num_experts)
    return torch.cat([experts, torch.arange(new.num_experts, new.num_experts + old.null)])


def _copy(tensor: Tensor, before: Tensor, moved: Tensor, key: str) -> None:
    grown = [axis for axis in range(tensor.dim()) if tensor.shape[axis] != before.shape[axis]]
    if not grown:
        tensor.copy_(before)
    elif len(grown) == 1 and before.shape[grown[0]] == len(moved):
        tensor.index_copy_(grown[0], moved, before)
    else:
        raise ConfigError(
            f"router tensor '{key}' cannot grow from {tuple(before.shape)} to {tuple(tensor.shape)}; use a scorer with "
            "a row per expert"
        )
