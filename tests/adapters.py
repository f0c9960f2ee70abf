"""Helpers for tests of saved adapters: adapters that do something, and a full account of a model's structure."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import molora
from tests.tiny import tiny_inputs, tiny_llama

RECIPE = {"experts": {"num": 3, "rank": 2}, "selector": {"name": "top_k", "k": 2}}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def stir(model, seed=0, adapter="default"):
    """Give every tensor of an adapter random values, so that experts act and routers decide."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f".{adapter}." in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def wrapped(seed=0, recipe=RECIPE, base=None, **changes):
    return stir(molora.wrap(base or tiny_llama(), recipe, **changes), seed).eval()


def logits(model, **options):
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.no_grad():
        return model(**tiny_inputs(base, **options)).logits


def change_config(folder: Path, **changes):
    """Change keys of a saved config; None deletes a key."""
    config = json.loads((folder / CONFIG).read_text())
    config.update(changes)
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def change_tensors(folder: Path, change):
    """Rewrite the weights of a folder with what `change(dict)` makes of them."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def anatomy(model):
    """Everything of a model's structure that putting an adapter into it can change, without weight values."""
    modules = {
        name: (
            id(module),
            module.training,
            sorted(key for key in module.__dict__ if not key.startswith("_is_full")),
            [len(hooks) for key, hooks in module.__dict__.items() if key.endswith("_hooks")],
            module.__dict__.get("_active_adapter"),
            sorted(module.__dict__.get("sites", ())),
        )
        for name, module in model.named_modules()
    }
    parameters = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    return modules, parameters
