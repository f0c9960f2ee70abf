"""Weight changes of plain LoRA folders, layer by layer, without a model: what an adapter does to its base.

A LoRA adds `s B A` to the weight of a layer. The inner product of two such changes needs no d_out x d_in matrix:

    <s1 B1 A1, s2 B2 A2> = s1 s2 sum((B1^T B2) * (A1 A2^T))
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..errors import LoadError, raise_all
from ..files import look
from ..lora_files import Lora, read_lora

Pair = tuple[Tensor, Tensor]  # A (r, d_in), B (d_out, r) with the scale in it; float64


def read_deltas(folder: Path) -> dict[str, Pair]:
    """Return A and scaled B of every layer of a LoRA folder, by the layer's path, in float64.

    Raises:
        LoadError: the folder is damaged, or holds what is more, or other, than a weight change per layer.
    """
    lora = Lora(folder.name, look(folder))
    problems = read_lora(lora, None)
    if not problems and not lora.pairs:
        problems.append("it holds no low-rank pair on a linear layer")
    raise_all(problems, LoadError, f"the weight changes of '{folder}' cannot be read")
    tensors = dict(lora.contents.read())
    return {path: (tensors[p.A].double(), tensors[p.B].double() * p.scale) for path, p in lora.pairs.items()}


def inner(a: Mapping[str, Pair], b: Mapping[str, Pair]) -> float:
    """Return the inner product of two weight changes over all layers; a layer that one does not touch adds nothing."""
    total = 0.0
    for path in a.keys() & b.keys():
        (A1, B1), (A2, B2) = a[path], b[path]
        if _fit(a[path], b[path]):
            total += float(((B1.T @ B2) * (A1 @ A2.T)).sum())
    return total


def cosine(a: Mapping[str, Pair], b: Mapping[str, Pair]) -> float | None:
    """Return the cosine between two weight changes, None when they have no layer in common or one changes nothing."""
    norms = math.sqrt(inner(a, a) * inner(b, b))
    return inner(a, b) / norms if norms > 0 and any(_fit(a[path], b[path]) for path in a.keys() & b.keys()) else None


def _fit(a: Pair, b: Pair) -> bool:
    return a[0].shape[1] == b[0].shape[1] and a[1].shape[0] == b[1].shape[0]
