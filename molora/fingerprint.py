"""Fingerprint of a base model: enough to notice that an adapter meets another base than it was trained on.

It holds a hash of the structure (path and sizes of every linear layer) and a few sampled values of unquantised weights
with the dtype they were read in. Two fingerprints agree when the structures are equal and the samples are equal to
the precision of the coarser dtype, so that loading the same checkpoint in bfloat16, or quantised, is the same base.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

SAMPLED_TENSORS = 12
SAMPLED_VALUES = 8
_PLAIN_LORA = re.compile(r"\.lora_(A|B|dropout|embedding_A|embedding_B|magnitude_vector|bias)\.")  # what PEFT adds


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
    if not is_well_formed(saved):
        return ["the fingerprint in its config is damaged, so the base cannot be checked"]
    found = []
    if saved["structure"] != model["structure"]:
        found.append("the base model has other linear layers than the one the adapter was trained on")
    for name, sample in saved["samples"].items():
        weight = weights.get(name)
        if weight is None or not weight.is_floating_point() or weight.device.type == "meta":
            continue
        if not _agree(sample, _sample(weight)):
            found.append(f"the base weight '{name}' has other values than when the adapter was trained")
    return found


def conflicts(saved: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return how two fingerprints differ, without a model; only weights that both sampled are compared."""
    if not is_well_formed(saved) or not is_well_formed(other):
        return ["the fingerprint of its base is damaged, so the base cannot be checked"]
    found = []
    if saved["structure"] != other["structure"]:
        found.append("it was trained on a base with other linear layers")
    shared = sorted(saved["samples"].keys() & other["samples"].keys())
    changed = [name for name in shared if not _agree(saved["samples"][name], other["samples"][name])]
    return found + [f"the weight '{name}' of its base has other values" for name in changed]


def _agree(one: Mapping[str, Any], two: Mapping[str, Any]) -> bool:
    precision = max(torch.finfo(getattr(torch, sample["dtype"])).eps for sample in (one, two))
    a, b = (torch.tensor(sample["values"], dtype=torch.float64) for sample in (one, two))
    # two roundings: a value may have been saved in one dtype and read in another
    return torch.allclose(a, b, rtol=2 * precision, atol=1e-8)


def is_well_formed(saved: Any) -> bool:
    """Whether saved data, from a file, is a fingerprint at all."""
    samples = saved.get("samples") if isinstance(saved, Mapping) else None
    return (
        isinstance(samples, Mapping)
        and isinstance(saved.get("structure"), str)
        and all(isinstance(name, str) and _is_sample(sample) for name, sample in samples.items())
    )


def _is_sample(sample: Any) -> bool:
    if not isinstance(sample, Mapping) or not isinstance(sample.get("values"), (list, tuple)):
        return False
    dtype = getattr(torch, str(sample.get("dtype")), None)
    return (
        isinstance(dtype, torch.dtype)
        and dtype.is_floating_point
        and len(sample["values"]) == SAMPLED_VALUES
        and all(isinstance(value, float) or (type(value) is int and abs(value) < 2**63) for value in sample["values"])
    )


def of_model(
    model: nn.Module, sizes: Callable[[nn.Module], tuple[int, int] | None], apart: Iterable[str] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the fingerprint of the base inside a model, wrapped or not, and the parameters of that base by path.

    Args:
        model: the base model; routed layers and wrapped heads in it are looked through.
        sizes: returns (d_in, d_out) of a linear layer, None for anything else.
        apart: names of modules that the adapter saves whole (PEFT's modules_to_save): new heads start at random, so
            they tell nothing about the base.
    """
    heads = re.compile("|".join(rf"(?:^|.*\.)(?:{name})(?:$|\..*)" for name in apart)) if apart else None

    def base_path(name: str) -> str | None:
        path = name.replace(".base_layer", "").replace(".original_module", "")
        is_added = "molora_" in name or ".modules_to_save." in name or _PLAIN_LORA.search(name)
        return None if is_added or (heads is not None and heads.match(path)) else path

    weights = {path: weight for name, weight in model.named_parameters() if (path := base_path(name))}
    layers = {
        (path, *known)
        for name, module in model.named_modules()
        if (path := base_path(name)) and (known := sizes(module)) is not None
    }
    return fingerprint(sorted(layers), weights), weights
