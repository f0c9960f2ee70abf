"""Real training steps on one small batch, measured and then undone: what `molora.doctor` looks at.

Every step starts from the same random state, so that two of them differ only in what was changed between them. After
`restoring`, parameters, gradients, prices, random state and mode of the model are as they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..control import add_aux, drop_aux, routed_layers, trace_of
from ..errors import ConfigError
from ..routing.metrics import Usage
from ..routing.router import Router
from .objectives import objective_loss

STEP_SIZE = 1e-3  # how far the largest entry of each tensor moves: B leaves zero, and nothing else goes far


@dataclass
class Step:
    """What one forward and backward did.

    Attributes:
        loss: the value that was differentiated.
        aux: the auxiliary loss in it, None when none was collected.
        has_loss: whether the model formed a loss itself.
        A, B, router: largest absolute gradient per site; 0 when there is none, sites without trainable ones left out.
        flat: all router gradients in one vector.
    """

    loss: float
    aux: float | None
    has_loss: bool
    A: dict[str, float]
    B: dict[str, float]
    router: dict[str, float]
    flat: Tensor


class Probe:
    """Runs steps of one adapter on one batch.

    Args:
        model: the wrapped model.
        batch: keyword arguments of its forward, with labels.
        adapter: whose gradients are measured.
    """

    def __init__(self, model: nn.Module, batch: dict[str, Any], adapter: str) -> None:
        self.model, self.batch, self.adapter = model, batch, adapter
        self.layers = routed_layers(model, adapter)
        self.trace = trace_of(model)

    def forward(self, *, losses: bool = True, usage: Usage | None = None, **more: Any) -> tuple[Tensor, Any, bool]:
        """Run a training forward; returns (loss, aux value or None, whether the model formed the loss)."""
        drop_aux(self.model)
        self.model.train()
        torch.manual_seed(0)
        with self._without_losses() if not losses else nullcontext():
            with usage.reading(self.trace) if usage is not None else nullcontext():
                if self.trace.plans[self.adapter].objective is not None and not more:
                    return objective_loss(self.model, self.batch), self.trace.aux.value(), True
                outputs = self.model(**self.batch, **more)
            loss = outputs.get("loss") if hasattr(outputs, "get") else None
            has_loss = loss is not None
            if loss is None:
                # whatever the outputs are, their size is something to differentiate
                first = next(value for value in outputs.values() if isinstance(value, Tensor))
                loss = add_aux(self.model, first.float().pow(2).mean())
            return loss, self.trace.aux.value(), has_loss

    def step(self, *, losses: bool = True, usage: Usage | None = None) -> Step:
        """Run a training forward and backward from zero gradients."""
        self.model.zero_grad(set_to_none=True)
        loss, aux, has_loss = self.forward(losses=losses, usage=usage)
        if loss.requires_grad:  # it has none when checkpointing hides everything that is trained
            with self._without_losses() if not losses else nullcontext():
                loss.backward()
        parts: dict[str, dict[str, float]] = {"A": {}, "B": {}, "router": {}}
        flat = []
        for site, layer in self.layers.items():
            bank = layer.molora_bank[self.adapter]
            for name, parameters in bank.gradients().items():
                parts[name][site] = _largest(parameters)
            if self.adapter in layer.molora_router:
                trained = [p for p in layer.molora_router[self.adapter].parameters() if p.requires_grad]
                if trained:
                    parts["router"][site] = _largest(trained)
                    flat += [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        everything = torch.cat([grad.float().flatten().cpu() for grad in flat]) if flat else torch.zeros(0)
        return Step(float(loss.detach()), None if aux is None else float(aux), has_loss, flat=everything, **parts)

    @torch.no_grad()
    def update(self) -> None:
        """Take one step of gradient descent with the gradients that are there.

        Not Adam: its first step is nearly the sign of the gradient, which makes experts that share their A equal, so
        that the routers between them really get no gradient for a while.
        """
        for parameter in self.model.parameters():
            if parameter.requires_grad and parameter.grad is not None:
                largest = parameter.grad.abs().max()
                if largest > 0:
                    parameter -= STEP_SIZE * parameter.grad / largest

    def idle(self, usage: Usage) -> set[str]:
        """Return the sites none of whose experts was chosen in the forwards that `usage` counted."""
        sites = {name: layer.sites[self.adapter] for name, layer in self.layers.items()}
        leaders = {site.group: name for name, site in sites.items() if site.leads}
        found = set()
        for name, site in sites.items():
            figures = usage.figures(leaders[site.group]) if leaders[site.group] in usage.sites else None
            if figures is not None and sum(figures.load if site.column is None else [figures.load[site.column]]) == 0:
                found.add(name)
        return found

    def scale(self, step: Step, site: str) -> float:
        """Return the largest gradient of the experts that the router at `site` decides about."""
        group = self.layers[site].sites[self.adapter].group
        mine = [name for name, layer in self.layers.items() if layer.sites[self.adapter].group == group]
        return max((max(step.A.get(name, 0.0), step.B.get(name, 0.0)) for name in mine), default=0.0)

    @contextmanager
    def _without_losses(self) -> Iterator[None]:
        plans = {name: plan.losses for name, plan in self.trace.plans.items()}
        for plan in self.trace.plans.values():
            plan.losses = []
        try:
            yield
        finally:
            for name, losses in plans.items():
                self.trace.plans[name].losses = losses


def _largest(parameters: list[nn.Parameter]) -> float:
    return max(0.0 if p.grad is None else float(p.grad.abs().max()) for p in parameters)


@contextmanager
def restoring(model: nn.Module) -> Iterator[None]:
    """Put the model back afterwards: parameters, gradients, prices, train or eval mode, and the random state."""
    modes = [(module, module.training) for module in model.modules()]
    trained = [(p, p.detach().clone(), p.grad) for p in model.parameters() if p.requires_grad]
    prices = [module.price for module in model.modules() if isinstance(module, Router) and module.price is not None]
    kept = [(price, price.value.clone(), price.chosen) for price in prices]
    trace = trace_of(model)
    told = trace.reminders.progress_told
    trace.tell_progress(trace.progress)  # a user who forgets to tell it is warned in training, not here
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for parameter, value, grad in trained:
                parameter.copy_(value)
                parameter.grad = grad
            for price, value, chosen in kept:
                price.value.copy_(value)
                price.chosen = chosen
        for module, mode in modes:
            module.training = mode
        trace.reminders.progress_told = told
        drop_aux(model)


def checkpointed(base: nn.Module) -> list[nn.Module]:
    """Return the modules that recompute their activations in backward."""
    return [module for module in base.modules() if getattr(module, "gradient_checkpointing", False)]


def is_reentrant(base: nn.Module) -> bool:
    """Tell whether checkpointing is of the reentrant kind, which is torch's default when nothing is said."""
    functions = [getattr(module, "_gradient_checkpointing_func", None) for module in checkpointed(base)]
    keywords = [getattr(function, "keywords", {}) for function in functions if function is not None]
    return any(words.get("use_reentrant", True) is not False for words in keywords)


@contextmanager
def without_checkpointing(base: nn.Module) -> Iterator[None]:
    """Store activations instead of computing them again, inside the block."""
    modules = checkpointed(base)
    for module in modules:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in modules:
            module.gradient_checkpointing = True


def make_batch(base: nn.Module, rows: int = 4, length: int = 16, num_tasks: int = 0) -> dict[str, Any]:
    """Return a random batch with labels that a transformers model can be trained on.

    Args:
        base: the base model; token ids, images and labels follow its config.
        rows, length: B and S; the last quarter of the first row is padding.
        num_tasks: give task ids below this number.

    Raises:
        ConfigError: this model needs another kind of input.
    """
    config, device = base.config, next(base.parameters()).device
    generator = torch.Generator().manual_seed(0)

    def numbers(top: int, *shape: int) -> Tensor:
        return torch.randint(0, top, shape, generator=generator).to(device)

    name, kind = getattr(base, "main_input_name", "input_ids"), type(base).__name__
    classes = getattr(config, "num_labels", 2)
    batch: dict[str, Any] = {}
    if name == "pixel_values":
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        pixels = torch.randn(rows, config.num_channels, size, size, generator=generator)
        batch = {"pixel_values": pixels.to(device), "labels": numbers(classes, rows)}
    elif name == "input_ids":
        ids = numbers(config.get_text_config().vocab_size, rows, length)
        mask = torch.ones_like(ids)
        mask[0, length - length // 4 :] = 0
        batch = {"input_ids": ids, "attention_mask": mask}
        if kind.endswith("ForSequenceClassification"):
            batch["labels"] = numbers(classes, rows)
        else:
            labels = ids.clone()
            if not getattr(config, "is_encoder_decoder", False):
                labels[:, : length // 4] = -100  # the prompt
                labels[mask == 0] = -100
            batch["labels"] = labels
    else:
        raise ConfigError(f"{kind} takes '{name}', of which no example can be made up; give doctor(model, batch)")
    if num_tasks:
        batch["task_ids"] = numbers(num_tasks, rows)
    return batch
