"""What a user tells a wrapped model from outside: tasks, pinned gates, progress; and what he reads from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .errors import ConfigError, did_you_mean, raise_all
from .hooks import OWN_ARGUMENTS
from .layers import RoutedLayer
from .plan import Report
from .routing.edit import Edit
from .routing.shapes import as_gates
from .routing.trace import Site, Trace
from .routing.types import Context, Routing
from .tuner import MoloraModel


def tuner_of(model: nn.Module) -> MoloraModel:
    """Return the MoloraModel inside a wrapped model, through PeftModel, DDP, compile and the like.

    Raises:
        ConfigError: the model was not wrapped by molora.
    """
    found = next((module for module in model.modules() if isinstance(module, MoloraModel)), None)
    if found is None:
        raise ConfigError(f"{type(model).__name__} holds no molora adapter; call molora.wrap(model, recipe) first")
    return found


def trace_of(model: nn.Module) -> Trace:
    """Return the trace of a wrapped model."""
    return tuner_of(model).trace


def report(model: nn.Module, adapter: str = "default") -> Report:
    """Return what wrapping did: layers wrapped and skipped, decisions per forward, parameters."""
    reports = tuner_of(model).reports
    if adapter not in reports:
        raise ConfigError(f"adapter '{adapter}' is unknown; the model has: {', '.join(reports)}")
    return reports[adapter]


def routed_layers(model: nn.Module, adapter: str = "default") -> dict[str, RoutedLayer]:
    """Return the routed layers of one adapter by the path of the layer in the base model."""
    layers = {
        module.sites[adapter].name: module
        for module in model.modules()
        if isinstance(module, RoutedLayer) and adapter in module.sites
    }
    if not layers:
        raise ConfigError(f"adapter '{adapter}' is unknown; the model has: {', '.join(tuner_of(model).reports)}")
    return layers


@contextmanager
def using(model: nn.Module, **own: Any) -> Iterator[None]:
    """Give every forward inside the block what routers may ask for, also those of generate().

    The block is of the thread, or the task of asyncio, that runs it: others are not given it, unless they run in a copy
    of its context (`contextvars.copy_context().run`, as `asyncio.to_thread` does).

    Args:
        model: a wrapped model.
        own: `task_ids` (B,), `prompt_mask` (B, S), `expert_ids` (B,) or (B, S), the expert that a label asks for (-1
            for none), or `router_extra` (B, m) or (B, S, m), features that routers read beside the hidden states.
    """
    hooks = tuner_of(model).hooks
    unknown = set(own) - set(OWN_ARGUMENTS)
    if unknown:
        raise ConfigError(f"using() knows {', '.join(OWN_ARGUMENTS)}, not {', '.join(sorted(unknown))}")
    with hooks.calls.inside(own):
        yield


@contextmanager
def pin(model: nn.Module, gates: Tensor | Mapping[str, Tensor]) -> Iterator[None]:
    """Replace every routing decision inside the block by fixed gates.

    Args:
        model: a wrapped model.
        gates: (E,), (B, 1, E) or (B, S, E) for all layers, or a mapping from layer path to such a tensor.
    """
    trace = trace_of(model)
    before = trace.pins
    # laid out once, not in every layer of every forward
    by_layer = isinstance(gates, Mapping)
    trace.pins = {name: as_gates(given) for name, given in gates.items()} if by_layer else as_gates(gates)
    try:
        yield
    finally:
        trace.pins = before


@contextmanager
def edit(model: nn.Module, *edits: Edit) -> Iterator[None]:
    """Let edits of `molora.routing.edit` (Boost, Steer, Forbid, Pin) act on every decision inside the block, in order.

    Raises:
        ConfigError: an edit names a layer that takes no decision.
    """
    trace = trace_of(model)
    layers = [module for module in model.modules() if isinstance(module, RoutedLayer)]
    leaders = {site.name for layer in layers for site in layer.sites.values() if site.leads}
    unknown = {name for one in edits for name in one.by_site or () if name not in leaders}
    problems = [f"site '{name}' takes no decision{did_you_mean(name, leaders)}" for name in sorted(unknown)]
    raise_all(problems, ConfigError, "these edits would do nothing")
    before = trace.edits
    trace.edits = [*before, *edits]
    try:
        yield
    finally:
        trace.edits = before


def write_expert(
    model: nn.Module,
    slot: int,
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    scale: float | Mapping[str, float] = 1.0,
    adapter: str = "default",
) -> None:
    """Replace one expert of a live model in place, whatever the number of experts: a few milliseconds for megabytes.

    Nothing is allocated and no other expert is touched; the next forward reads the new one. Layers that `pairs` does
    not name get a zero expert in this slot. Everything is checked before anything is written.

    Args:
        model: a wrapped model.
        slot: which expert.
        pairs: A (r, d_in) and B (d_out, r) by the path of the layer in the base model, r at most the slot's rank.
        scale: what multiplies B A, such as alpha / r; one number, or one per layer path.
        adapter: the name of the mixture.

    Raises:
        ConfigError: unknown layers, or tensors that do not fit.
    """
    layers = routed_layers(model, adapter)
    problems = [f"layer '{path}' is not routed{did_you_mean(path, layers)}" for path in pairs if path not in layers]
    # layers that decide nothing (outside of the MLPs under `form: block`) have one LoRA and no slot unless named
    routed = {path: layer for path, layer in layers.items() if path in pairs or not layer.sites[adapter].fixed}
    banks = {path: layer.molora_bank[adapter] for path, layer in routed.items()}
    for path, bank in banks.items():
        wrong = bank.why_not_write(slot, *pairs.get(path, (None, None)))
        problems += [f"layer '{path}': {wrong}"] if wrong else []
    scales = scale if isinstance(scale, Mapping) else dict.fromkeys(pairs, scale)
    problems += [f"scale names no number for layer '{path}'" for path in pairs if path not in scales]
    raise_all(problems, ConfigError, f"expert {slot} cannot be written")
    for path, bank in banks.items():
        if path in pairs:
            bank.write(slot, *pairs[path], scales[path])
        else:
            bank.clear(slot)


@contextmanager
def record(model: nn.Module) -> Iterator[dict[str, Routing]]:
    """Collect the decisions of the forwards inside the block: a dict from layer path to its latest Routing."""
    log: dict[str, Routing] = {}

    def reader(site: Site, routing: Routing, ctx: Context) -> None:
        log[site.name] = routing.detach()

    with trace_of(model).telling(reader):
        yield log


def add_aux(model: nn.Module, loss: Tensor, share: Tensor | float = 1.0) -> Tensor:
    """Add the auxiliary loss of the latest training forward to `loss`, for loops without a Trainer.

    Exact under both kinds of gradient checkpointing. A forward that was given labels has added it to `outputs.loss`
    already, and then `loss` comes back as it is.

    Args:
        model: a wrapped model.
        loss: the scalar that will be differentiated.
        share: this micro-batch's part of the optimizer batch. Pass 1 (the default) when you divide the result by the
            number of micro-batches; pass tokens here / tokens in all when your loss is scaled that way already.
    """
    return trace_of(model).aux.add_to(loss, share)


def drop_aux(model: nn.Module) -> None:
    """Discard the auxiliary loss of the latest training forward on purpose."""
    trace_of(model).aux.used = True


def set_progress(model: nn.Module, progress: float) -> None:
    """Tell schedules how far training is, in [0, 1]; `molora.attach(trainer)` does this for you."""
    if not 0 <= progress <= 1:
        raise ConfigError(f"progress must be in [0, 1], got {progress}")
    trace_of(model).tell_progress(float(progress))


def settle(model: nn.Module) -> None:
    """Move all that moves between steps: prices, the weights that controllers hold, running state of scorers.

    Call it after each optimizer step of your own loop; `molora.attach(trainer)` does this for you. Saving an adapter
    moves prices too.
    """
    routers = [router for m in model.modules() if isinstance(m, RoutedLayer) for router in m.molora_router.values()]
    for part in {id(part): part for router in routers for part in router.modules()}.values():
        if hasattr(part, "settle"):
            part.settle()
