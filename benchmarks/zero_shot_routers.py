"""The contenders of the zero-shot benchmark: how each router is made from what it may know.

nothing    the adapters alone
texts      unlabelled texts of each adapter's own task, a description of it, or gates that were trained on it
training   labelled rows of the tasks of the adapters, joined, to train a router on
examples   a few labelled rows of the very task that is asked
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import pointing
import torch
from peft import ArrowConfig, XLoraConfig, create_arrow_model, get_peft_model
from peft.tuners.lora import LoraLayer
from pointing import Batch
from torch import Tensor, nn

import molora
from molora.posthoc import describing, prompted, route
from molora.posthoc.glider import Describer
from molora.posthoc.roma import Roma

from .zero_shot_field import Field

TOP_2 = {"scorer": "linear", "selector": {"name": "top_k", "k": 2, "normalise": "sum1"}, "granularity": "prompt"}
Around = Callable[[Batch], AbstractContextManager[Any]] | None

Made = tuple[nn.Module, Around]
Maker = Callable[[Field, list[str], list[str]], Made]  # (field, adapters, tasks that are asked)


def mix(data: Field, names: list[str], router: Any = "uniform") -> nn.Module:
    """Return a mixture of these adapters, in eval mode."""
    return molora.compose(pointing.base_model(), {name: data.folders[name] for name in names}, router=router).eval()


def uniform(data: Field, names: list[str], asked: list[str]) -> Made:
    """All adapters with the weight 1 / E: the mean of their updates."""
    return mix(data, names), None


def arrow(data: Field, names: list[str], asked: list[str]) -> Made:
    """Arrow, top 3, by its defaults."""
    return mix(data, names, {"name": "arrow", "top_k": min(3, len(names))}), None


def average(data: Field, names: list[str], asked: list[str]) -> Made:
    """The mean activations of each adapter's texts, top 2."""
    return mix(data, names, {"name": "average", "data": {name: data.read(name) for name in names}}), None


def mol_moe(data: Field, names: list[str], asked: list[str]) -> Made:
    """Mol-MoE's start (mergekit's hidden gates): last states of each adapter's texts; nothing is trained."""
    return mix(data, names, {"name": "mol_moe", "prompts": {name: data.read(name) for name in names}}), None


def phatgoose(data: Field, names: list[str], asked: list[str]) -> Made:
    """The gates that the library holds beside each adapter, top 2."""
    return mix(data, names, "phatgoose"), None


def glider(data: Field, names: list[str], asked: list[str]) -> Made:
    """The same gates, and the cosine of each text with the adapters' descriptions (gamma 3; no writer)."""
    said = {name: data.tasks[name].said for name in names}
    model = mix(data, names, {"name": "glider", "descriptions": said})
    describer = Describer(model, data.pointer.vectors)
    return model, lambda batch: describing(model, batch.texts, describer)


def retrieval(data: Field, names: list[str], asked: list[str]) -> Made:
    """The adapter that owns the nearest text."""
    examples = {name: [row.text for row in data.texts(name)] for name in names}
    model = mix(data, names, {"name": "retrieval", "embed": data.pointer.vectors, "examples": examples})
    return model, lambda batch: prompted(model, batch.texts)


def router_retriever(data: Field, names: list[str], asked: list[str]) -> Made:
    """The adapter with the nearest pilots: centroids of the texts that it answers best."""
    rows = [(number, owner) for number, owner in enumerate(data.owners) if owner in names]
    columns = [list(data.folders).index(name) for name in names]
    queries = [row.text for name in data.tasks for row in data.texts(name)]
    options = {
        "queries": [queries[number] for number, _ in rows],
        "quality": data.quality[[number for number, _ in rows]][:, columns],
        "groups": [owner for _, owner in rows],
    }
    model = mix(data, names, {"name": "router_retriever", "embed": data.pointer.vectors, **options})
    return model, lambda batch: prompted(model, batch.texts)


def trained(router: Mapping[str, Any]) -> Maker:
    """A router that is trained on rows of the adapters' tasks, which are mixed and not named."""

    def make(data: Field, names: list[str], asked: list[str]) -> Made:
        torch.manual_seed(0)
        model = mix(data, names, dict(router))  # its experts are frozen
        _fit(model, data, names)
        return model, None

    return make


def _fit(model: nn.Module, data: Field, names: list[str]) -> None:
    """Train the routers of a mixture, of molora or of PEFT, on the joined rows of some tasks."""
    is_molora = any(config.peft_type == "MOLORA" for config in model.peft_config.values())

    def objective(model: nn.Module, batch: Batch) -> Tensor:
        value = pointing.loss(model, batch)
        return molora.add_aux(model, value) if is_molora else value

    feed = data.joined(names)
    pointing.fit(model, feed, steps=data.sizes.router_steps, lr=1e-2, weight_decay=0.0, objective=objective)


def prompt_level(data: Field, names: list[str], asked: list[str]) -> Made:
    """A plain linear router, trained on the tasks of these adapters: top 2 per text and layer."""
    torch.manual_seed(0)
    model = mix(data, names, TOP_2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("molora_router" in name)
    _fit(model, data, names)
    return model, None


def roma(data: Field, names: list[str], asked: list[str]) -> Made:
    """The former, then RoMA on its routers of the last 3 blocks: texts route like right texts that resemble them."""
    model, _ = prompt_level(data, names, asked)
    route(model, "roma", layers=3)
    tuner, rows = Roma(model, layers=3), [row for name in names for row in data.texts(name)]
    batches = [data.pointer.batch(rows[i : i + 32], range(i, min(i + 32, len(rows)))) for i in range(0, len(rows), 32)]
    places = {row.text: number for number, row in enumerate(rows)}

    def call(batch: Batch) -> dict[str, Tensor]:
        return {**batch.inputs, "candidates": batch.candidates, "there": batch.there, "labels": batch.answers}

    tuner.collect([(call(batch), data.pointer.vectors(batch.texts)) for batch in batches])
    feed = data.pointer.endless(rows, min(data.sizes.batch, len(rows)), 2)

    def objective(model: nn.Module, batch: Batch) -> Tensor:
        ids = [places[text] for text in batch.texts]
        return tuner.loss(call(batch), data.pointer.vectors(batch.texts), ids)

    pointing.fit(model, feed, steps=data.sizes.router_steps // 2, lr=3e-3, weight_decay=0.0, objective=objective)
    return model, None


def lorahub(data: Field, names: list[str], asked: list[str]) -> Made:
    """One weight per adapter, searched on a few rows of what is asked."""
    batches = data.shots(asked)

    def loss(model: nn.Module) -> float:
        with torch.no_grad():
            found = [float(pointing.loss(model, batch)) * len(batch.answers) for batch in batches]
        return sum(found) / sum(len(batch.answers) for batch in batches)

    return mix(data, names, {"name": "lorahub", "loss": loss, "budget": data.sizes.budget}), None


def kshot(data: Field, names: list[str], asked: list[str]) -> Made:
    """The adapters that help on a few rows of what is asked and differ most; then the router learns on these rows."""
    torch.manual_seed(0)
    batches = data.shots(asked)

    def score(model: nn.Module) -> float:
        return float(pointing.hits(model, batches).double().mean())

    size = min(3, len(names))
    options = {"score": score, "size": size, "shortlist": min(5, len(names)), "k": min(2, size), "train_experts": False}
    model = mix(data, names, {"name": "kshot", **options})
    rows = iter(batches * data.sizes.router_steps)
    steps = data.sizes.router_steps // 2
    pointing.fit(model, rows, steps=steps, lr=1e-2, weight_decay=0.0)
    return model.eval(), None


def peft_arrow(data: Field, names: list[str], asked: list[str]) -> Made:
    """PEFT's own Arrow, with the same top 3 and temperature 1.

    PEFT finds the layers by the last part of their names, so that it also routes `attention.output.dense`, which no
    adapter changes, and fails there; its router is taken away from such layers.
    """
    config = ArrowConfig(top_k=min(3, len(names)), router_temperature=1.0, rng_seed=0)
    paths = [str(data.folders[name]) for name in names]
    model = create_arrow_model(pointing.base_model(), paths, config).eval()
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and "task_0" not in layer.lora_A:
            layer.delete_adapter("arrow_router")
    return model, None


class Shell(nn.Module):
    """An encoder inside of a module: PEFT's X-LoRA only finds layers below `model.`, as causal models have them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.config, self.device = model, model.config, torch.device("cpu")

    def forward(self, *args: Any, **options: Any) -> Any:
        return self.model(*args, **options)


def peft_xlora(data: Field, names: list[str], asked: list[str]) -> Made:
    """PEFT's own X-LoRA in a shell, its head (one linear map) trained on the same rows for as many steps."""
    torch.manual_seed(0)
    model = pointing.base_model()
    model.config.use_cache = False
    adapters = {str(number): str(data.folders[name]) for number, name in enumerate(names)}  # it needs these names
    config = XLoraConfig(hidden_size=model.config.hidden_size, adapters=adapters, xlora_depth=1)
    model = get_peft_model(Shell(model), config)
    _fit(model, data, names)
    return model.eval(), None


def shipped(data: Field, names: list[str], asked: list[str]) -> Made:
    """The mixture of the library as it is: that of `phatgoose`, saved and loaded."""
    if data.mixture is None:
        raise ValueError("the library holds no mixture of these adapters")
    return molora.load(pointing.base_model(), data.mixture).eval(), None


# name -> (what it needs, how it is made), the quick ones first
ROUTERS: dict[str, tuple[str, Maker]] = {
    "uniform average": ("nothing", uniform),
    "shipped mixture": ("texts", shipped),
    "arrow": ("nothing", arrow),
    "PEFT Arrow": ("nothing", peft_arrow),
    "retrieval": ("texts", retrieval),
    "router_retriever": ("texts", router_retriever),
    "average activation": ("texts", average),
    "mol_moe untrained": ("texts", mol_moe),
    "phatgoose": ("texts", phatgoose),
    "glider": ("texts", glider),
    "trained top 2 per text": ("training", prompt_level),
    "xlora": ("training", trained({"name": "xlora", "depth": 1})),
    "PEFT X-LoRA": ("training", peft_xlora),
    "lora_mixer": ("training", trained({"name": "lora_mixer"})),
    "lorahub": ("examples", lorahub),
    "kshot": ("examples", kshot),
    "fusion": ("training", trained({"name": "fusion", "width": 32, "values": False})),
    "roma": ("training", roma),
}
IN_DISTRIBUTION_ONLY = ("shipped mixture",)  # it holds every adapter
