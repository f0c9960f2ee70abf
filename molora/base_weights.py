"""Weights of the base in the file of a LoRA: PEFT saves the head, or the embedding, beside a LoRA that is on it.

It does so whether or not they were trained (`save_embedding_layers="auto"`), and for a classifier it saves the whole
head (`modules_to_save`). A copy of what the base has anyway says nothing; any other weight would change the base, which
no expert can.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

_WEIGHT = re.compile(r"^(?:base_model\.model\.)?(?P<path>[^:]+?)(?:\.base_layer)?\.(?P<part>weight|bias)$")


def path_of_weight(name: str, base: nn.Module) -> str | None:
    """Return where the base has the weight that a tensor is by its name: a layer's path, for its bias with `.bias`.

    None when the base has no such weight.
    """
    match = _WEIGHT.match(name)
    if match is None or "lora_" in name or "modules_to_save" in name:
        return None
    path = match["path"] if match["part"] == "weight" else f"{match['path']}.bias"
    return None if _weight(dict(base.named_modules()), path) is None else path


def _weight(layers: Mapping[str, nn.Module], path: str) -> Tensor | None:
    """Return a weight or bias of the base, as it was before anything was wrapped around its layer."""
    layer, part = (layers[path], "weight") if path in layers else (layers.get(path.removesuffix(".bias")), "bias")
    if layer is None:
        return None
    layer = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    layer = getattr(layer, "original_module", layer)  # a copy that PEFT trains beside it is not the base's own
    found = getattr(layer, part, None)
    return found.detach() if isinstance(found, Tensor) else None


def copy_problems(copies: Mapping[str, str], tensors: Iterable[tuple[str, Tensor]], base: nn.Module) -> list[str]:
    """Return a problem for each saved weight that is not, to the last bit, the one that this base has.

    Args:
        copies: path as `path_of_weight` gives it -> name of the tensor.
        tensors: of the file, by name; others are passed over.
        base: the base model, wrapped or not.
    """
    found, layers, paths = [], dict(base.named_modules()), {name: path for path, name in copies.items()}
    why = (
        "it was trained whole, or it is of another base; an expert holds no such weight: copy it into the base first "
        "to have it there, or take it out of the file"
    )
    for name, saved in tensors:
        own = _weight(layers, paths[name]) if name in paths else None
        if own is None:
            continue
        if not own.is_floating_point():
            found.append(
                f"tensor '{name}' cannot be compared with the base's own, which is quantised; save the LoRA again with "
                "save_embedding_layers=False"
            )
        elif own.shape != saved.shape:
            found.append(f"tensor '{name}' is {tuple(saved.shape)}, the base's own is {tuple(own.shape)}: {why}")
        elif not torch.equal(saved.to(own.device, own.dtype), own):
            apart = float((saved.to(own.device).float() - own.float()).abs().max())
            found.append(f"tensor '{name}' differs from the base's own by up to {apart:.3g}: {why}")
    return found
