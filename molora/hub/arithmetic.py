"""Arithmetic of LoRAs by what they do: sums, means, negation, likeness, groups and a smaller rank, without a model.

A LoRA adds `D = s B A` to the weight of a layer. Everything here works on these D, in float64 and without a d_out x
d_in matrix: a weighted sum is a stack of factors (exact, its rank is the sum of theirs), an inner product needs
products of r x r only, and the nearest change of a lower rank comes from QR of the stacked factors and a small SVD.
A and B alone mean nothing: `G A` and `B G^-1` are the same LoRA for every invertible G, but their means are not. So
averages of factors are refused (`molora.experts.merge.cross_term` is what they miss).

Every function takes adapters as folders of plain PEFT LoRAs or as `Change`, which is what it returns; `change_of` makes
one of an adapter that is loaded in a model, and `save_change` writes a folder that any PEFT loads.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import ConfigError, did_you_mean, raise_all
from ..experts.merge import compress as compress_pair
from ..experts.merge import product_merge
from ..files import CARD, CONFIG, WEIGHTS, read_config, replacing
from ..plan import regex_of
from ..to_peft import PREFIX, export_peft
from .deltas import Pair, cosine, inner, read_deltas

ABOUT = ("base_model_name_or_path", "revision", "task_type", "fan_in_fan_out")  # what sums keep of their parts


@dataclass(frozen=True)
class Change:
    """What a LoRA does to its base.

    Attributes:
        name: for messages and tables.
        layers: path of the layer -> A (r, d_in) and B (d_out, r) with the scale in it, float64.
        about: what its config says of the base (the keys of ABOUT).
    """

    name: str
    layers: Mapping[str, Pair]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def norm(self) -> float:
        """The Frobenius norm of the change of all layers together."""
        return math.sqrt(max(0.0, inner(self.layers, self.layers)))

    @property
    def ranks(self) -> dict[str, int]:
        """Path of the layer -> the rank of its factors."""
        return {path: A.shape[0] for path, (A, _) in self.layers.items()}


Adapter = str | Path | Change


@dataclass(frozen=True)
class Compressed:
    """A change of lower rank, and how far it is from what it was made of.

    Attributes:
        change: the nearest one of that rank.
        error: `||D - D'|| / ||D||` over all layers, in the Frobenius norm.
        errors: path of the layer -> the same of this layer alone.
    """

    change: Change
    error: float
    errors: Mapping[str, float]


# --- where changes come from ------------------------------------------------------------------------------------------


def read_change(folder: str | Path) -> Change:
    """Return what a folder of a plain PEFT LoRA does to its base.

    Raises:
        LoadError: the folder is damaged, or holds what is more, or other, than a weight change per layer.
    """
    folder = Path(folder)
    layers = read_deltas(folder)
    config = read_config(folder / CONFIG)
    return Change(folder.name, layers, {key: config[key] for key in ABOUT if config.get(key) is not None})


def change_of(model: nn.Module, adapter: str = "default", *, expert: int | str | None = None) -> Change:
    """Return what a loaded adapter does: a PEFT LoRA, or one expert of a mixture.

    Args:
        model: a PeftModel.
        adapter: which of its adapters.
        expert: number or name of the expert, for a mixture; nothing for a LoRA.

    Raises:
        ConfigError: there is no such adapter or expert.
        LoadError: it is more than a weight change per layer (DoRA, trained biases, ...).
    """
    if not isinstance(model, PeftModel):
        raise ConfigError(f"change_of needs a PeftModel, got {type(model).__name__}")
    if adapter not in model.peft_config:
        raise ConfigError(f"adapter '{adapter}' is unknown{did_you_mean(adapter, model.peft_config)}")
    mixture = model.peft_config[adapter].peft_type == "MOLORA"
    if mixture != (expert is not None):
        what = "a mixture: say which expert" if mixture else "a plain LoRA: leave out expert"
        raise ConfigError(f"adapter '{adapter}' is {what}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if mixture:
            export_peft(model, folder, expert=expert, adapter=adapter)
        else:
            model.save_pretrained(str(folder), selected_adapters=[adapter], save_embedding_layers=False)
            folder = folder if adapter == "default" else folder / adapter
        found = read_change(folder)
        layers = {path: (A.clone(), B.clone()) for path, (A, B) in found.layers.items()}
    return Change(adapter if expert is None else str(expert), layers, found.about)


# --- sums -------------------------------------------------------------------------------------------------------------


def mix(
    adapters: Sequence[Adapter], weights: Sequence[float] | Tensor, *, space: str = "delta", name: str = "mix"
) -> Change:
    """Return `sum_i w_i D_i`, exactly; its rank in a layer is the sum of the ranks of those that touch the layer.

    Args:
        adapters: folders or changes, of any ranks, scales and layers, for one base.
        weights: one finite number each; one with weight 0 is left out.
        space: `delta`, and nothing else: sums of A and of B are no sum of LoRAs.
        name: of the result.

    Raises:
        ConfigError: weights, bases or shapes do not fit; all problems at once.
    """
    if space != "delta":
        raise ConfigError(
            f"space={space!r}: (sum w A) and (sum w B) depend on how each LoRA happens to be factored, so their "
            "product is no mean of LoRAs; space='delta' is exact, and compress() brings it back to one rank"
        )
    changes, numbers = _changes(adapters), [float(w) for w in weights]
    if len(numbers) != len(changes) or not all(map(math.isfinite, numbers)):
        raise ConfigError(f"{len(changes)} adapters need as many finite weights, got {numbers}")
    parts = [(change, w) for change, w in zip(changes, numbers, strict=True) if w != 0]
    if not parts:
        raise ConfigError("all weights are 0, so nothing would be left")
    layers = {}
    for path in sorted({path for change, _ in parts for path in change.layers}):
        here = [(change.layers[path], w) for change, w in parts if path in change.layers]
        layers[path] = product_merge([pair for pair, _ in here], [w for _, w in here])
    about = {key: value for change in reversed(changes) for key, value in change.about.items()}
    return Change(name, layers, about)


def average(adapters: Sequence[Adapter], *, space: str = "delta", name: str = "average") -> Change:
    """Return the mean of changes, `sum_i D_i / n`, exactly; see `mix`."""
    changes = _changes(adapters)
    return mix(changes, [1 / len(changes)] * len(changes), space=space, name=name)


def concatenate(adapters: Sequence[Adapter], *, name: str = "concatenation") -> Change:
    """Return the sum of changes `sum_i D_i`, exactly; see `mix`."""
    changes = _changes(adapters)
    return mix(changes, [1.0] * len(changes), name=name)


def negate(adapter: Adapter, *, name: str = "negation") -> Change:
    """Return `-D`, which takes away what the adapter adds (only B changes its sign: of both it would be D again)."""
    return mix([adapter], [-1.0], name=name)


def compress(adapter: Adapter, rank: int | None = None, tolerance: float = 0.0) -> Compressed:
    """Return the nearest change whose rank in each layer is at most `rank`, and how near it is.

    Args:
        adapter: a folder or a change, such as a mix.
        rank: the largest rank of a layer; none: as many as the tolerance needs.
        tolerance: the largest relative error of a layer, where the rank allows it; 0 keeps all that is not rounding.
    """
    (change,) = _changes([adapter])
    layers, errors, lost = {}, {}, 0.0
    for path, (A, B) in change.layers.items():
        small_A, small_B, errors[path] = compress_pair(A, B, rank, tolerance)
        layers[path] = (small_A, small_B)
        lost += errors[path] ** 2 * inner({path: (A, B)}, {path: (A, B)})
    norm = change.norm
    return Compressed(Change(change.name, layers, change.about), math.sqrt(lost) / norm if norm else 0.0, errors)


# --- likeness ---------------------------------------------------------------------------------------------------------


def similarity(adapters: Sequence[Adapter]) -> Tensor:
    """Return the cosines (n, n) between changes over all layers, float64; 0 for two without a layer in common.

    Raises:
        ConfigError: an adapter changes nothing, or they are not for one base.
    """
    changes = _changes(adapters)
    raise_all([f"'{c.name}' changes nothing" for c in changes if c.norm == 0], ConfigError, "cosines need a direction")
    found = torch.eye(len(changes), dtype=torch.float64)
    for i, one in enumerate(changes):
        for j, other in enumerate(changes[:i]):
            found[i, j] = found[j, i] = cosine(one.layers, other.layers) or 0.0
    return found


# --- writing ----------------------------------------------------------------------------------------------------------


def save_change(change: Change, path: str | Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write a change as a plain LoRA, which any PEFT loads; the folder is replaced as a whole.

    Args:
        change: what to write; layers may differ in rank.
        path: the folder.
        dtype: of the tensors.

    Raises:
        ConfigError: there is no layer, or a number is too large for the dtype.
    """
    tensors = {}
    for layer, (A, B) in change.layers.items():
        tensors[f"{PREFIX}{layer}.lora_A.weight"] = A.to(dtype).contiguous()
        tensors[f"{PREFIX}{layer}.lora_B.weight"] = B.to(dtype).contiguous()
    problems = [f"'{name}' does not fit into {dtype}" for name, t in tensors.items() if not torch.isfinite(t).all()]
    problems += [] if tensors else ["it changes no layer"]
    raise_all(problems, ConfigError, f"'{change.name}' cannot be written")
    usual = Counter(change.ranks.values()).most_common(1)[0][0]
    by_layer = {} if set(change.ranks.values()) == {usual} else {f"^{re.escape(p)}": r for p, r in change.ranks.items()}
    config = LoraConfig(  # alpha is the rank everywhere: the scale is in B
        r=usual,
        lora_alpha=usual,
        rank_pattern=by_layer,
        alpha_pattern=by_layer,
        target_modules=regex_of(change.layers),
        inference_mode=True,
        **{key: value for key, value in change.about.items() if key in ABOUT},
    )
    with replacing(Path(path)) as draft:
        save_file(tensors, draft / WEIGHTS, {"format": "pt"})
        config.save_pretrained(str(draft))
        base = change.about.get("base_model_name_or_path")
        head = "---\nlibrary_name: peft\n" + (f"base_model: {base}\n" if base else "") + "tags:\n- lora\n---\n\n"
        (draft / CARD).write_text(f"{head}A LoRA made of others by molora: {change.name}.\n", encoding="utf-8")
    return Path(path)


def _changes(adapters: Sequence[Adapter]) -> list[Change]:
    """Return the changes of adapters for one base; lists everything that keeps them apart."""
    if isinstance(adapters, (str, Path, Change)) or not adapters:
        raise ConfigError(f"this needs a list of adapters (folders or changes), got {adapters!r}")
    found = [a if isinstance(a, Change) else read_change(a) for a in adapters]
    problems, first = [], {}
    for change in found:
        for path, (A, B) in change.layers.items():
            shape, owner = first.setdefault(path, ((B.shape[0], A.shape[1]), change.name))
            if shape != (B.shape[0], A.shape[1]):
                given = f"{(B.shape[0], A.shape[1])} in '{change.name}'"
                problems.append(f"layer '{path}' is {shape} in '{owner}' and {given}")
    for key in ABOUT:
        values = sorted({str(change.about[key]) for change in found if change.about.get(key) is not None})
        if len(values) > 1:
            problems.append(f"{key} differs: {', '.join(values)}")
    raise_all(problems, ConfigError, "these adapters are not for one base")
    return found
