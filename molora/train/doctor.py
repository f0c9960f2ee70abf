"""doctor: takes real training steps and says whether routers and experts learn, and what stands in their way.

Nothing is guessed from settings where it can be measured: two steps are taken on a small batch (in the very first one,
A gets no gradient and the routers none from the task, since B is zero), once with and once without the auxiliary loss
and gradient checkpointing. Afterwards the model is as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint import peft_model_of
from ..config import MoloraConfig
from ..control import trace_of
from ..registry import split_spec
from ..routing.metrics import Usage
from ..routing.tasks import tasks_in
from .findings import Finding, folder_findings, parameters_findings, structure_findings
from .probe import Probe, Step, checkpointed, is_reentrant, make_batch, restoring, without_checkpointing
from .scaling import ignores_token_count, takes_loss_arguments

TINY = 1e-7  # relative to the experts' gradient: what is smaller is rounding, not learning


def doctor(
    model: nn.Module,
    batch: dict[str, Any] | None = None,
    *,
    adapter: str = "default",
    folder: str | Path | None = None,
    accumulation: int = 1,
) -> list[Finding]:
    """Look at a wrapped model as it is about to be trained.

    Args:
        model: from `molora.wrap` or `molora.load(..., is_trainable=True)`.
        batch: keyword arguments of a forward, with labels; by default a random one is made up.
        adapter: which adapter.
        folder: a saved adapter whose tensors must fit this model.
        accumulation: gradient accumulation steps of the training that is planned.

    Returns:
        findings; nothing is wrong when none has the level `fail`.

    Raises:
        ConfigError: the model has no such adapter.
    """
    config = peft_model_of(model, adapter).peft_config[adapter]
    found = [*structure_findings(model, adapter), *parameters_findings(model, adapter)]
    can_step = not any(finding.level == "fail" for finding in found)
    if folder is not None:
        found += folder_findings(model, adapter, folder)
    if not can_step:
        return found
    with restoring(model):
        try:
            found += _training(model, batch, adapter, config, accumulation)
        except Exception as error:  # whatever training would meet, too
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            found.append(Finding("fail", f"a training step stops with {reason}", "mend this first; then ask again"))
    return found


def _training(
    model: nn.Module, batch: dict[str, Any] | None, adapter: str, config: MoloraConfig, accumulation: int
) -> Iterator[Finding]:
    base = peft_model_of(model, adapter).get_base_model()
    if batch is None:
        batch = make_batch(base, num_tasks=tasks_in(config.scorer))
    probe, usage = Probe(model, batch, adapter), Usage(adapter=adapter)
    first = probe.step(usage=usage)
    if not all(torch.isfinite(torch.tensor(value)) for value in (first.loss, first.aux or 0.0)):
        yield Finding("fail", f"the loss is not finite: {first.loss}", "check the batch, and the base in this dtype")
        return
    if not first.has_loss:
        yield Finding(
            "warn",
            "the model forms no loss from this batch, so its outputs' size stood in for one",
            "pass labels; or form the loss yourself and call molora.attach(trainer) or molora.add_aux(model, loss)",
        )
    probe.update()
    chosen = Usage(adapter=adapter)
    second = probe.step(usage=chosen)
    task_only = probe.step(losses=False)
    has_losses = bool(trace_of(model).plans[adapter].losses)
    yield from _experts(first, second, probe.idle(chosen))
    yield from _routers(probe, config, second, task_only)
    yield from _auxiliary(probe, base, second, task_only, has_losses)
    yield from _checkpointing(probe, base, second)
    yield from _scaling(model, base, batch, accumulation)
    if second.router or config.price is not None:  # what cannot learn cannot spread its load either
        yield from _dead(usage, config, has_losses)


HIDES = (
    "checkpointing may hide them: use gradient_checkpointing_kwargs={'use_reentrant': False}, or call "
    "model.enable_input_require_grads(); else look whether the forward uses these layers"
)


def _experts(first: Step, second: Step, idle: set[str]) -> Iterator[Finding]:
    if not second.B:
        yield Finding("ok", "all experts are frozen, as the recipe says: only routers are trained")
        return
    used = [site for site in second.B if site not in idle]
    silent = [site for site in used if second.B[site] == 0]
    if silent:
        yield Finding("fail", f"experts get no gradient in {_some(silent, second.B)}", HIDES)
        return
    # an A that was not used in the first step has a B that is still zero
    still = [site for site in used if first.B[site] > 0 and second.A.get(site) == 0]
    if still:
        yield Finding("fail", f"A of the experts gets no gradient in {_some(still, second.A)}, B does", HIDES)
        return
    fresh = all(grad == 0 for grad in first.A.values())
    why = ": A from the second step on, since B starts at zero" if fresh else ""
    rest = f"; the other {len(idle)} were not chosen by this batch" if idle else ""
    yield Finding("ok", f"experts get gradients in {len(used)} of {len(second.B)} layers{why}{rest}")


def _routers(probe: Probe, config: MoloraConfig, second: Step, task_only: Step) -> Iterator[Finding]:
    adapter = probe.adapter
    routers = {s: layer.molora_router[adapter] for s, layer in probe.layers.items() if adapter in layer.molora_router}
    choosing = [site for site, router in routers.items() if router.num_experts > 1]
    if not choosing:
        yield Finding("ok", "one expert per layer: the routers have nothing to decide")
        return
    # scorers without parameters, or frozen ones, learn nothing on purpose
    learning = [site for site in choosing if site in second.router]
    if not learning:
        yield Finding(
            "warn", "no router is trainable: routing stays as it is", "choose another scorer if it shall learn"
        )
        return
    least = {site: TINY * (probe.scale(task_only, site) or 1.0) for site in learning}
    by_task = [site for site in learning if task_only.router[site] > least[site]]
    by_any = [site for site in learning if second.router[site] > least[site]]
    none = [site for site in learning if site not in by_any]
    only_aux = [site for site in by_any if site not in by_task]
    why, advice = _why_no_task_gradient(config, second)
    if none:
        yield Finding("fail", f"routers get no gradient in {_some(none, learning)}{why}", advice)
    if only_aux:
        what = f"the task teaches no router in {_some(only_aux, learning)}, only the auxiliary loss does{why}"
        yield Finding("warn", what, advice)
    if not none and not only_aux:
        yield Finding("ok", f"all {len(learning)} routers get gradients from the task, once B has left zero")


def _why_no_task_gradient(config: MoloraConfig, second: Step) -> tuple[str, str]:
    """(what in the config or in the experts explains it, the next step)."""
    if not second.B and config.experts["frozen"] == "all":
        return (
            ": all experts are frozen, and those that are new change nothing",
            "give it trained experts: molora.import_peft(model, [...], recipe=...), or molora.load a trained mixture",
        )
    name, options = split_spec(config.selector)
    grad = options.get("grad", "soft")
    if grad in ("none", "policy"):
        return f": selector.grad is '{grad}'", "set selector.grad to soft or straight_through"
    if name == "top_k" and options.get("k", 2) == 1 and options.get("normalise", "sum1") == "sum1":
        return ": one expert whose gate is normalised to 1 has no gradient", "set selector.normalise: none"
    if options.get("weight", "prob") == "const" and grad == "soft":
        return ": gates of constant weight have no gradient", "set selector.grad: straight_through"
    return "", HIDES


def _auxiliary(probe: Probe, base: nn.Module, second: Step, task_only: Step, has_losses: bool) -> Iterator[Finding]:
    if not has_losses:
        yield Finding("ok", "this recipe has no auxiliary loss")
        return
    if second.aux is None:
        yield Finding("fail", "an auxiliary loss is configured, but none was collected", "report this: it is a bug")
        return
    added = second.loss - task_only.loss
    if abs(added - second.aux) > 1e-4 * max(1.0, abs(second.loss)):
        yield Finding(
            "fail",
            f"the auxiliary loss is {second.aux:.4g}, but the loss grew by {added:.4g}",
            "call molora.attach(trainer), or molora.add_aux(model, loss) in your own loop",
        )
        return
    yield Finding("ok", f"the auxiliary loss is in the loss: {second.aux:.4g} of {second.loss:.4g}")
    if second.flat.numel() and torch.equal(second.flat, task_only.flat):
        yield Finding("fail", "the auxiliary loss has no gradient at the routers", HIDES)
    if second.has_loss and takes_loss_arguments(base):
        shares = []
        for items in (1000, 2000):
            losses = [probe.forward(losses=on, num_items_in_batch=torch.tensor(items))[0] for on in (True, False)]
            shares.append(float(losses[0].detach() - losses[1].detach()))
        # float32 differences of losses: a few digits are enough to tell a factor of two
        good = abs(shares[0] - 2 * shares[1]) <= 0.02 * abs(shares[0]) + 2e-6 * abs(second.loss)
        if good:
            yield Finding("ok", "under gradient accumulation it counts by each micro-batch's share of the labels")
        else:
            yield Finding(
                "fail",
                f"the auxiliary loss does not follow num_items_in_batch: {shares[0]:.3g}, at twice it {shares[1]:.3g}",
                "report this: it is a bug",
            )


def _checkpointing(probe: Probe, base: nn.Module, second: Step) -> Iterator[Finding]:
    if not checkpointed(base):
        return
    kind = "reentrant" if is_reentrant(base) else "non-reentrant"
    with without_checkpointing(base):
        plain = probe.step()
    scale = float(plain.flat.abs().max()) if plain.flat.numel() else 0.0
    apart = float((plain.flat - second.flat).abs().max()) if plain.flat.numel() else 0.0
    if apart > 1e-3 * scale:
        yield Finding(
            "fail",
            f"{kind} gradient checkpointing changes the routers' gradients by {apart / scale:.0%}",
            "use gradient_checkpointing_kwargs={'use_reentrant': False}",
        )
    else:
        yield Finding("ok", f"{kind} gradient checkpointing: the routers' gradients are those without it")


def _scaling(model: nn.Module, base: nn.Module, batch: dict[str, Any], accumulation: int) -> Iterator[Finding]:
    if "labels" not in batch or not takes_loss_arguments(base):
        return
    with torch.no_grad():
        ignores = ignores_token_count(model, base, batch)
    if ignores:
        times = f"{accumulation} times" if accumulation > 1 else "as many times as there are accumulation steps"
        yield Finding(
            "warn",
            f"{type(base).__name__} ignores num_items_in_batch, and Trainer then does not divide: under gradient "
            f"accumulation its task loss counts {times}, and the auxiliary loss weighs that much less beside it; the "
            "same holds for the number of processes under DDP",
            "set trainer.model_accepts_loss_kwargs = False after making the Trainer (molora train does so)",
        )


def _dead(usage: Usage, config: MoloraConfig, has_losses: bool) -> Iterator[Finding]:
    name, _ = split_spec(config.selector)
    sites = [(site, usage.figures(site)) for site in usage.sites]
    choosing = [(site, one) for site, one in sites if one is not None and one.num_experts > 1]
    if not choosing:
        return
    # an expert that gets its even share must be expected often enough to be missed
    told = [(s, f) for s, f in choosing if f.tokens * f.experts_per_token / f.num_experts >= 10]
    dead = [site for site, figures in told if figures.dead]
    if dead:
        count = sum(len(figures.dead) for _, figures in told)
        yield Finding(
            "warn",
            f"{count} experts are dead on this batch, in {_some(dead, choosing)}",
            "look again with real data: molora inspect ADAPTER --data ...; a balance loss or a price spreads the load",
        )
    elif told:
        yield Finding("ok", "no expert is dead on this batch")
    else:
        yield Finding("ok", "too few tokens in this batch to tell dead experts")
    if name == "top_k" and not has_losses and config.price is None:
        yield Finding(
            "warn",
            "top_k has neither a balance loss nor a price: a few experts may take everything",
            "add losses: [{name: switch_balance, weight: 0.01}], or price: sign",
        )


def _some(sites: Sequence[str], among: Any) -> str:
    every = f"all {len(among)}" if len(sites) == len(among) else f"{len(sites)} of {len(among)}"
    return f"{every} layers (first: '{sites[0]}')"
