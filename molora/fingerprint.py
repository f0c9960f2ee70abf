"""Fingerprint of a base model: enough to notice that an adapter meets another base than it was trained on.

It holds a hash of the structure (path and sizes of every linear layer) and a few sampled values of unquantised weights
with the dtype they were read in. Two fingerprints agree when the structures are equal and the samples are equal to
the precision of the coarser dtype, so that loading the same checkpoint in bfloat16, or quantised, is the same base.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

SAMPLED_TENSORS = 12
SAMPLED_VALUES = 8


def fingerprint(layers: Iterable[tuple[str, int, int]], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return a fingerprint as plain JSON data.

    Args:
        layers: (path, d_in, d_out) of every linear layer.
        weights: parameters of the base by path; quantised and meta tensors are left out of the samples.
    """
    structure = hashlib.sha256("\n".join(sorted(f"{p} {i} {o}" for p, i, o in layers)).encode()).hexdigest()
    usable = sorted(
        name
        for name, weight in weights.items()
        if weight.is_floating_point() and weight.device.type != "meta" and weight.numel() >= SAMPLED_VALUES
    )
    # Norms and embeddings stay unquantised in 4-bit and 8-bit models; big matrices may not be there as floats.
    usable = [name for name in usable if weights[name].dim() == 1] + [n for n in usable if weights[n].dim() > 1]
    stride = max(1, len(usable) // SAMPLED_TENSORS)
    samples = {name: _sample(weights[name]) for name in usable[::stride][:SAMPLED_TENSORS]}
    return {"structure": structure, "samples": samples}


def _sample(weight: Tensor) -> dict[str, Any]:
    flat = weight.detach().reshape(-1)
    places = torch.linspace(0, flat.numel() - 1, SAMPLED_VALUES, dtype=torch.float64).long()
    return {"dtype": str(weight.dtype).removeprefix("torch."), "values": flat[places.to(flat.device)].float().tolist()}


def differences(saved: Mapping[str, Any], model: Mapping[str, Any], weights: Mapping[str, Tensor]) -> list[str]:
    """Return how the base of a saved adapter differs from the model at hand; empty when they agree.

    Args:
        saved: the fingerprint in the adapter's config.
        model: the fingerprint of the model at hand.
        weights: its parameters by path; saved samples without a usable tensor here (quantised) are not compared.
    """
    found = []
    if saved.get("structure") != model.get("structure"):
        found.append("the base model has other linear layers than the one the adapter was trained on")
    for name, sample in saved.get("samples", {}).items():
        weight = weights.get(name)
        if weight is None or not weight.is_floating_point() or weight.device.type == "meta":
            continue
        here = _sample(weight)
        precision = max(torch.finfo(getattr(torch, s["dtype"])).eps for s in (sample, here))
        mine, theirs = torch.tensor(here["values"]), torch.tensor(sample["values"])
        # two roundings: a value may have been saved in one dtype and read in another
        if not torch.allclose(mine, theirs, rtol=2 * precision, atol=1e-8):
            found.append(f"the base weight '{name}' has other values than when the adapter was trained")
    return found


def linear_layers(model: nn.Module, sizes: Any) -> list[tuple[str, int, int]]:
    """Return (path, d_in, d_out) of every layer that `sizes(module)` knows, looking through wrapped layers."""
    found = []
    for path, module in model.named_modules():
        if "molora_" in path:
            continue
        known = sizes(module)
        if known is not None:
            found.append((path.replace(".base_layer", ""), *known))
    return sorted(set(found))
