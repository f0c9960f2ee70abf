"""What every recipe costs: a training step and a decoding step of each, beside the frozen base of one small Llama.

All recipes run as they come, with their own number of experts and their own ranks, so rows differ in size too; that is
why each row also names its trainable parameters. A recipe that several forwards belong to is timed with all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

import molora
from molora.routing.router import Router

from .models import Shape, randomise, twin
from .sections import Decoding, Field, section
from .timing import Plain, Work

SHAPE = Shape(256, 512, 4, 2, 4, 2048)
TOKENS = 256


def told(model: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """Return what gives routers that read more than hidden states something to read: a task, and features."""
    features = [f for module in model.modules() if isinstance(module, Router) for f in module.feature]
    size = next((f.extra for f in features if hasattr(f, "extra")), 1)
    own = {"task_ids": torch.zeros(1, dtype=torch.long), "router_extra": torch.zeros(1, size)}
    return lambda: molora.using(model, **own)


def recipes(field: Field, shape: Shape) -> dict[str, nn.Module]:
    """Return every recipe on a twin of the base."""
    base = field.base(shape)
    return {name: randomise(molora.wrap(twin(base), name)) for name in field.sizes.recipes or molora.recipes()}


def training_step(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    """Return a step: forward, backward, and what prices and controllers do after it."""
    around = told(model)

    def step() -> None:
        with around():
            molora.objective_loss(model, {"input_ids": ids, "labels": ids, "use_cache": False}).backward()
        molora.settle(model)
        model.zero_grad(set_to_none=True)

    return step


def base_step(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    """Return a step of the frozen base, whose backward goes through all of its layers as well."""
    embedded = model.get_input_embeddings()(ids).detach()

    def step() -> None:
        model(inputs_embeds=embedded.requires_grad_(), labels=ids, use_cache=False).loss.backward()
        embedded.grad = None

    return step


def mechanisms(field: Field, shape: Shape, until: float, *, decode: bool) -> dict[str, Any]:
    """Time every recipe's training step, or its decoding step."""
    entries, base = recipes(field, shape), field.base(shape)
    tokens = min(field.sizes.tokens, TOKENS)
    ids = torch.randint(0, shape.vocab, (1, tokens))
    if decode:
        works: dict[str, Work] = {"frozen base": Decoding(base, ids)}
        works |= {name: Decoding(model, ids, told(model)) for name, model in entries.items()}
        title = f"Decode step of every recipe, batch 1, {tokens} tokens in the cache"
    else:
        works = {"frozen base": Plain(base_step(base.train(), ids))}
        for name, model in entries.items():
            molora.set_progress(model.train(), 0.5)
            works[name] = Plain(training_step(model, ids))
        title = f"Training step of every recipe, {tokens} tokens"
    rows = field.sizes.race(works, until)
    base.eval()
    for row in rows:
        model = entries.get(row["name"])
        trainable = 0 if model is None else sum(p.numel() for p in model.parameters() if p.requires_grad)
        row["trainable_k"] = trainable / 1e3
    note = "Recipes as they come: they differ in experts, ranks and layers, so this is no ranking."
    return section(title, shape, rows, note=note)
