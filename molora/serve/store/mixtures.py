"""Routed mixtures in a served model: which ones a batch of many requests can hold, and how they come and go.

A mixture is a PEFT adapter of its own beside the slots, with its own router. Its modules can only be added and removed
while no forward runs, so a store checks its files on a loader thread, and the engine's thread puts it in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from ...checkpoint import FREE, load
from ...config import MoloraConfig
from ...control import routed_layers, trace_of
from ...errors import LoadError, RoutingError, raise_all
from ...experts.bank import FORMS
from ...layers import RoutedLayer, RoutedLinear
from ...plan import form_of
from ...registry import split_spec
from ...routing.branches import KEYS
from ...routing.features import attend, look_ahead, remember
from ...routing.rows import Rows
from ...routing.scorers import scorers
from ...routing.selectors import selectors
from ...routing.trace import Pass
from ...routing.types import Context
from .slots import rest

_SERVED_FORMS = (*FORMS, "module")


def why_not_served(config: MoloraConfig) -> str | None:
    """Return why a mixture cannot run beside others in one batch, as far as its config tells; None when it can.

    What only the model tells, such as experts on embeddings, is found when it is put in (see `insert`).
    """
    return "; ".join(_reasons(config)) or None


def needs_whole_prompt(config: MoloraConfig) -> bool:
    """Whether the routing of a token looks at other tokens, so that a mixture cannot run where tokens are packed.

    Batch-coupled selectors do so in training only; they are counted all the same, since a part from elsewhere may not.
    """
    routers = _routers(config)
    if any(router["granularity"] == "prompt" for router in routers):
        return True
    if any(look(router["feature"]) for router in routers for look in (remember, look_ahead, attend)):
        return True
    parts = [(scorers, router["scorer"]) for router in routers] + [(selectors, one["selector"]) for one in routers]
    return any(registry.fact(split_spec(spec)[0], "is_batch_coupled", False) for registry, spec in parts)


def _routers(config: MoloraConfig) -> list[Mapping[str, Any]]:
    """Return what each router of a layer is made of: one, or one per branch."""
    top = {key: getattr(config, key) for key in KEYS}
    return [{**top, **own} for own in config.branches] if config.branches else [top]


def _reasons(config: MoloraConfig) -> Iterator[str]:
    if config.modules_to_save:
        yield f"it brings modules of its own (modules_to_save: {', '.join(config.modules_to_save)}), which have no rows"
    if config.native_experts:
        yield "its experts are inside native experts (native_experts), where the rows of requests are mixed"
    specs = [config.experts, *(entry["experts"] for entry in config.layers if "experts" in entry)]
    forms = {form_of(spec) for spec in specs if "form" in spec}
    for form in sorted(forms - set(_SERVED_FORMS)):
        what = "whole MLPs" if form == "block" else "no sums of low-rank pairs"
        yield f"its experts of form '{form}' are {what}; rows know {', '.join(_SERVED_FORMS)}"
    free = sum(name.startswith(FREE) for name in config.experts["names"] or ())
    if free:
        yield f"it has {free} slots for experts to come, which its router would weigh as if they were experts"
    for router in _routers(config):
        scorer = split_spec(router["scorer"])[0]
        if getattr(scorers.get(scorer), "edits_input", False):
            yield f"its scorer '{scorer}' changes what the experts read"
        if router["granularity"] == "task":
            yield "it routes by task, and a request names none"
        if attend(router["feature"]):
            yield "its routers read attention weights, for which the whole model would have to leave its fast attention"


# --- in the model -----------------------------------------------------------------------------------------------------


def insert(model: PeftModel, folder: Path, adapter: str) -> None:
    """Put a mixture into a served model; only between two forwards. Others in the model do what they did.

    Args:
        model: the PeftModel of the slots.
        folder: of the mixture, checked.
        adapter: what PEFT will call it.

    Raises:
        LoadError: it does not fit the model, or cannot run beside others; the model is as it was.
    """
    load(model, folder, adapter)
    try:
        raise_all(misplaced(model, adapter), LoadError, "this mixture cannot run beside others in one batch")
        try_out(model, adapter)
    except BaseException:
        remove(model, adapter)
        raise
    for layer in routed_layers(model, adapter).values():
        layer.molora_bank[adapter].requires_grad_(False)
        if adapter in layer.molora_router:
            layer.molora_router[adapter].requires_grad_(False)


def remove(model: PeftModel, adapter: str) -> None:
    """Take a mixture out of a served model; only between two forwards."""
    model.delete_adapter(adapter)
    rest(model)
    for module in model.modules():
        if isinstance(module, RoutedLayer):
            module.forget_calls()  # prepared calls would keep its weights in memory


def misplaced(model: PeftModel, adapter: str) -> list[str]:
    """Return what in a mixture that is in the model no row of a batch can have for itself."""
    found = []
    for path, layer in routed_layers(model, adapter).items():
        bank, site = layer.molora_bank[adapter], layer.sites[adapter]
        if not isinstance(layer, RoutedLinear):
            found.append(f"layer '{path}' is no linear layer ({type(layer.get_base_layer()).__name__})")
        elif not bank.in_kernels or bank.on_input or adapter in layer.roles:
            found.append(f"the experts of layer '{path}' (form '{bank.form}') are no sum of low-rank pairs")
        elif site.edits:
            found.append(f"the router of layer '{path}' changes what its experts read")
    return found


@torch.no_grad()
def try_out(model: PeftModel, adapter: str) -> None:
    """Let every router decide for two tokens: one that cannot would fail the batch of everybody.

    Raises:
        LoadError: a router asks for what no request has, or its gates are not finite.
    """
    trace = trace_of(model)
    plan = trace.plans[adapter]
    if plan.remembers or plan.looks_ahead:
        return  # they ask for the pass of a whole forward
    device = next(model.parameters()).device
    new = Pass()
    context = Context(
        valid=None, token_ids=torch.zeros(1, 2, dtype=torch.long, device=device), progress=1.0, memory=new.memory
    )
    new.contexts, new.shape = dict.fromkeys(("main", "encoder", "cross"), context), {}
    trace.open(new)
    try:
        for path, layer in routed_layers(model, adapter).items():
            x = torch.ones(1, 2, layer.d_read, device=device)
            gates = trace.given(layer.sites[adapter], layer.molora_router._modules.get(adapter), x, Rows())
            if not torch.isfinite(gates).all():
                raise LoadError(f"the router of layer '{path}' decides NaN or Inf")
    except RoutingError as error:
        raise LoadError(f"its routers cannot decide in a server: {error}") from error
    finally:
        trace.close(None)
