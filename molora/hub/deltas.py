"""Weight changes of plain LoRA folders, layer by layer, without a model: what an adapter does to its base.

A LoRA adds `s B A` to the weight of a layer. The inner product of two such changes needs no d_out x d_in matrix:

    <s1 B1 A1, s2 B2 A2> = s1 s2 sum((B1^T B2) * (A1 A2^T))
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from ..errors import LoadError, raise_all
from ..files import look

Pair = tuple[Tensor, Tensor]  # A (r, d_in), B (d_out, r) with the scale in it; float64
_PREFIX = "base_model.model."


def read_deltas(folder: Path) -> dict[str, Pair]:
    """Return A and scaled B of every layer of a LoRA folder, by the layer's path, in float64.

    Raises:
        LoadError: the folder is damaged or holds no LoRA.
    """
    contents = look(folder)
    config = contents.config or {}
    problems = list(contents.problems)
    if not problems and config.get("peft_type") != "LORA":
        problems.append(f"it is of type {config.get('peft_type')!r}, and only a LORA has one weight change per layer")
    raise_all(problems, LoadError, f"the weight changes of '{folder}' cannot be read")
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in contents.read() if ".lora_" in name}
    found: dict[str, Pair] = {}
    for name, A in tensors.items():
        path, dot, tail = name.partition(".lora_A.")
        if not dot:
            continue
        B = tensors.get(f"{path}.lora_B.{tail}")
        if B is None or A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
            raise LoadError(f"the weight changes of '{folder}' cannot be read: '{name}' has no partner of its rank")
        found[path] = (A.double(), B.double() * _scale(config, path, A.shape[0], str(folder)))
    if not found:
        raise LoadError(f"the weight changes of '{folder}' cannot be read: it holds no low-rank pair on a linear layer")
    return found


def _scale(config: Mapping[str, Any], path: str, rank: int, folder: str) -> float:
    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(patterns.keys(), path), config.get("lora_alpha"))
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise LoadError(f"the weight changes of '{folder}' cannot be read: layer '{path}' has lora_alpha {alpha!r}")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def inner(a: Mapping[str, Pair], b: Mapping[str, Pair]) -> float:
    """Return the inner product of two weight changes over all layers; a layer that one does not touch adds nothing."""
    total = 0.0
    for path in a.keys() & b.keys():
        (A1, B1), (A2, B2) = a[path], b[path]
        if A1.shape[1] == A2.shape[1] and B1.shape[0] == B2.shape[0]:
            total += float(((B1.T @ B2) * (A1 @ A2.T)).sum())
    return total


def cosine(a: Mapping[str, Pair], b: Mapping[str, Pair]) -> float | None:
    """Return the cosine between two weight changes, None when they have no layer in common or one changes nothing."""
    shared = [p for p in a.keys() & b.keys() if all(torch.Size(x) == torch.Size(y) for x, y in _sizes(a[p], b[p]))]
    norms = math.sqrt(inner(a, a) * inner(b, b))
    return inner(a, b) / norms if shared and norms > 0 else None


def _sizes(a: Pair, b: Pair) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(a[0].shape[1:], b[0].shape[1:]), (a[1].shape[:1], b[1].shape[:1])]
