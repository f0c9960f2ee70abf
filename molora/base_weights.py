"""Weights of the base in the file of a LoRA: PEFT saves the head, or the embedding, beside a LoRA that is on it.

It does so whether or not they were trained (`save_embedding_layers="auto"`). A copy of what the base has anyway says
nothing; any other weight would change the base, which no expert can.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

_WEIGHT = re.compile(r"^(?:base_model\.model\.)?(?P<path>[^:]+?)(?:\.base_layer)?\.weight$")


def path_of_weight(name: str, base: nn.Module) -> str | None:
    """Return the path of the layer of the base whose weight a tensor is by its name, or None."""
    match = _WEIGHT.match(name)
    if match is None or "lora_" in name or "modules_to_save" in name:
        return None
    found = dict(base.named_modules()).get(match["path"])
    found = found.get_base_layer() if found is not None and hasattr(found, "get_base_layer") else found
    return match["path"] if isinstance(getattr(found, "weight", None), Tensor) else None


def copy_problems(copies: Mapping[str, str], tensors: Iterable[tuple[str, Tensor]], base: nn.Module) -> list[str]:
    """Return a problem for each saved weight that is not, to the last bit, the one that this base has.

    Args:
        copies: path of the layer -> name of the tensor.
        tensors: of the file, by name; others are passed over.
        base: the base model, wrapped or not.
    """
    found, layers, paths = [], dict(base.named_modules()), {name: path for path, name in copies.items()}
    for name, saved in tensors:
        if name not in paths:
            continue
        layer = layers[paths[name]]
        own = (layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer).weight.detach()
        why = "it was trained whole, or it is of another base; an expert holds no such weight"
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
