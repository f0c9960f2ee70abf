"""PHATGOOSE (arXiv 2402.05859): train one gate per expert alone, then let the gates compete.

Stage 2, per expert and on its own data: the update of each layer is weighed by `sigmoid(h v)`, v: (d,), from v = 0
(a gate of 0.5), everything else frozen, 100 steps of the loss that the expert was trained with. Stage 3, the mixture:
`softmax_e(LN(h) LN(v_e) / sqrt(d))`, top 2, weights that sum to 1. In stage 2 h is not normalised, in stage 3 it is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..control import routed_layers
from ..errors import ConfigError, raise_all
from ..from_peft import import_peft
from ..to_peft import export_peft
from ..undo import Snapshot
from .base import fill, install, slot_of
from .gates import Gates, load_gates
from .registry import posthoc_routers
from .rerouting import expert_names, routers_of, sites_of

GivenGates = Mapping[int | str, Gates | str | Path] | Sequence[Gates | str | Path | None]
_ALONE = "phatgoose_stage_2"
# one expert, gated by sigmoid(h v) with v = 0 at first
_STAGE_2 = {"scorer": {"name": "linear", "init": 0.0}, "link": "sigmoid", "selector": "softmax"}


def train_gates(
    model: nn.Module,
    lora: str | Path | int,
    batches: Iterable[Mapping[str, Any]],
    *,
    steps: int = 100,
    lr: float = 5e-3,
    warmup: float = 0.06,
    weight_decay: float = 0.0,
    accumulate: int = 1,
    loss: Callable[[nn.Module, Mapping[str, Any]], Tensor] | None = None,
    tell: Callable[[int, float], None] | None = None,
    adapter: str = "default",
) -> dict[str, Tensor]:
    """Train the gates of one expert on its own data (stage 2); nothing else of the model changes.

    The defaults are the authors' (AdamW, lr 5e-3, 100 steps, constant after 6 % warmup), whose batches held 1024 rows.

    Args:
        model: the base model of the LoRA, or a mixture that holds it.
        lora: the LoRA's folder; or, in a mixture, the number or name of the expert.
        batches: what the model is called with; gone through again when they end before the last step.
        steps, lr, warmup, weight_decay: of the training; warmup is the share of steps in which lr rises.
        accumulate: batches per step.
        loss: (model, batch) -> scalar; by default `model(**batch).loss`.
        tell: called with the number of each step and its mean loss.
        adapter: the name of the mixture.

    Returns:
        Path of each layer -> its gate (d_in,); `save_gates(gates, folder)` puts them beside the adapter.

    Raises:
        ConfigError: steps, lr or warmup out of range, no batches, or a loss that is not finite.
        LoadError: the LoRA cannot be an expert of this model.
    """
    problems = [f"{n} must be at least 1, got {v}" for n, v in (("steps", steps), ("accumulate", accumulate)) if v < 1]
    problems += [] if lr > 0 else [f"lr must be positive, got {lr}"]
    problems += [] if 0 <= warmup < 1 else [f"warmup must be in [0, 1), got {warmup}"]
    raise_all(problems, ConfigError, "gates cannot be trained")
    feed = _endless(batches)
    with alone(model, lora, adapter) as gated:
        scorers = {path: layer.molora_router[_ALONE].scorer for path, layer in routed_layers(gated, _ALONE).items()}
        gated.requires_grad_(False)
        for scorer in scorers.values():
            scorer.weight.requires_grad_(True)
        weights = [scorer.weight for scorer in scorers.values()]
        optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=weight_decay)
        rising = max(1, round(warmup * steps))
        gated.train()
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / rising)
            total = 0.0
            for _ in range(accumulate):
                batch = next(feed)
                value = (loss(gated, batch) if loss is not None else _own_loss(gated, batch)) / accumulate
                value.backward()
                total += float(value.detach())
            if not torch.isfinite(torch.tensor(total)):
                raise ConfigError(f"the loss of step {step + 1} is {total}; the gates were not trained")
            optimizer.step()
            optimizer.zero_grad()
            if tell is not None:
                tell(step + 1, total)
        return {path: scorer.weight.detach()[0].float().cpu().clone() for path, scorer in scorers.items()}


@contextmanager
def alone(model: nn.Module, lora: str | Path | int, adapter: str = "default") -> Any:
    """Let one LoRA act alone, gated by sigmoid(h v), v = 0; afterwards the model is what it was."""
    snapshot = Snapshot(model)
    tuner = model.base_model if isinstance(model, PeftModel) else None
    modes = [(module, module.training) for module in model.modules()]
    try:
        with tempfile.TemporaryDirectory() as folder:
            in_mixture = tuner is not None and not Path(str(lora)).is_dir()
            if in_mixture:
                slot = slot_of(expert_names(model, adapter), lora)
                lora = export_peft(model, Path(folder, "expert"), expert=slot, adapter=adapter)
            elif isinstance(lora, int):
                raise ConfigError(f"expert {lora} needs a mixture; give the base model the folder of a LoRA")
            gated = import_peft(model, [lora], recipe=_STAGE_2, adapter_name=_ALONE, experts={"frozen": "all"})
        if tuner is not None:
            gated.set_adapter(_ALONE)
        yield gated
    finally:
        snapshot.restore()
        for module, mode in modes:
            module.training = mode
        if tuner is not None:
            tuner._forget(_ALONE)


def _own_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    value = getattr(model(**batch), "loss", None)
    if value is None:
        raise ConfigError(
            "the model returned no loss: put labels into the batches, or pass loss=(model, batch) -> scalar"
        )
    return value


def _endless(batches: Iterable[Mapping[str, Any]]) -> Any:
    while True:
        count = 0
        for batch in batches:
            count += 1
            yield batch
        if not count:
            raise ConfigError("the batches ended before the last step; give a list, or an iterable that starts again")


def gates_by_slot(model: nn.Module, gates: GivenGates | None, adapter: str) -> list[Gates | None]:
    """Return the gates of each expert, read from files where paths are given; None for those without.

    Raises:
        ConfigError, LoadError: unknown experts, gates that do not fit, or layers where no expert has one.
    """
    names, sizes = expert_names(model, adapter), {p: layer.d_in for p, layer in routed_layers(model, adapter).items()}
    if gates is None:
        raise ConfigError("this router needs gates= of the experts: what train_gates returns, or the folders it is in")
    found: list[Gates | None] = [None] * len(names)
    problems = []
    given = gates if isinstance(gates, Mapping) else {slot: one for slot, one in enumerate(gates) if one is not None}
    for expert, one in given.items():
        try:
            slot = slot_of(names, expert)
        except ConfigError as error:
            problems.append(str(error))
            continue
        found[slot] = own = load_gates(one) if isinstance(one, (str, Path)) else one
        problems += [f"'{names[slot]}': layer '{path}' is not routed" for path in own if path not in sizes]
        problems += [
            f"'{names[slot]}': gate of layer '{path}' has shape {tuple(v.shape)}, not ({sizes[path]},)"
            for path, v in own.items()
            if path in sizes and tuple(v.shape) != (sizes[path],)
        ]
    bare = [path for path in sizes if not any(own is not None and path in own for own in found)]
    if bare:
        problems.append(f"no expert has a gate at {len(bare)} layers, such as '{bare[0]}'; train_gates makes them")
    raise_all(problems, ConfigError, "these gates cannot route the mixture")
    return found


@posthoc_routers.register("phatgoose")
def build(
    model: nn.Module,
    adapter: str = "default",
    *,
    gates: GivenGates | None = None,
    top_k: int = 2,
) -> nn.Module:
    """Route a mixture by gates that were trained per expert (stage 3).

    Args:
        model: a wrapped model.
        adapter: the name of the mixture.
        gates: of each expert, by number or name, or a list with None for those without: what `train_gates` returns,
            or the folder or file that holds it. Experts without gates are never chosen. None: `molora.compose` takes
            those beside the adapters; without it there is no place to look.
        top_k: how many experts act per token, at most all.

    Returns:
        The model.

    Raises:
        ConfigError, LoadError: gates that do not fit; nothing is changed.
    """
    found = gates_by_slot(model, gates, adapter)
    selector = {"name": "top_k", "k": min(top_k, len(found)), "normalise": "sum1"}
    install(model, adapter, scorer={"name": "prototypes", "measure": "norm"}, selector=selector)
    fill_gates(model, found, adapter)
    return model


def fill_gates(model: nn.Module, gates: Sequence[Gates | None], adapter: str) -> None:
    """Give the routers of a mixture the gates of its experts."""
    for path, router in zip(sites_of(model, adapter), routers_of(model, adapter), strict=True):
        fill(router, [None if own is None else own.get(path) for own in gates])
