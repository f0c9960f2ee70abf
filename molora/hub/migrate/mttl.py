"""Entries of microsoft/mttl's expert libraries become plain PEFT folders, for `Hub.add`, `compose` or `import_peft`.

An entry is two files of torch: `<name>.ckpt`, a mapping from names such as `model.layers.0.self_attn.q_proj.lora_a` to
tensors, and `<name>.meta`, plain values with `expert_config` (`lora_rank`, `lora_alpha`, ...). mttl computes
`x lora_a lora_b alpha / rank`, so that both factors are the transposes of PEFT's. Files whose metadata hold objects are
refused: mttl itself would run their code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import LoadError, raise_all
from ..arithmetic import Change, Pair, save_change
from .pickles import read_plain, read_tensors

_HALF = re.compile(r"^(?P<path>.+)\.lora_(?P<half>[ab])$")


def from_mttl(library: str | Path, name: str, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write an expert of an mttl library as a plain LoRA that any PEFT loads.

    Args:
        library: the folder of the library.
        name: of the expert.
        folder: what to write; replaced as a whole.
        dtype: of the tensors.

    Raises:
        LoadError: there is no such expert, its files are damaged or hold objects, or it is no plain LoRA; all problems
            at once.
    """
    library = Path(library)
    known = sorted(path.stem for path in library.glob("*.meta"))
    if name not in known:
        raise LoadError(f"'{library}' holds no expert '{name}'; known: {', '.join(known) or '(none)'}")
    meta = read_plain(library / f"{name}.meta")
    config = meta.get("expert_config") if isinstance(meta, Mapping) else None
    if not isinstance(config, Mapping):
        raise LoadError(f"{name}.meta tells no expert_config, so the scale of the expert is unknown")
    tensors = read_tensors(library / f"{name}.ckpt")
    problems, rank, alpha = [], config.get("lora_rank"), config.get("lora_alpha")
    kind = config.get("modifier_name", config.get("model_modifier", "lora"))
    if kind != "lora":
        problems.append(f"it is an expert of kind {kind!r}; only 'lora' becomes a LoRA")
    if meta.get("expert_deleted"):
        problems.append("it is marked as deleted")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        problems.append(f"lora_rank {rank!r} is no rank")
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not abs(alpha) < 1e30:
        problems.append(f"lora_alpha {alpha!r} is no number")
    raise_all(problems, LoadError, f"expert '{name}' cannot be read")
    layers = _layers(tensors, rank, alpha / rank, problems)
    raise_all(problems, LoadError, f"expert '{name}' cannot be read")
    about = {"base_model_name_or_path": _base(meta)}
    return save_change(Change(name, layers, {key: v for key, v in about.items() if v}), folder, dtype=dtype)


def experts_of(library: str | Path) -> list[str]:
    """Return the names of the experts of an mttl library that are not marked as deleted, in order."""
    found = []
    for path in sorted(Path(library).glob("*.meta")):
        try:
            meta = read_plain(path)
        except LoadError:
            meta = None  # `from_mttl` tells why
        if not (isinstance(meta, Mapping) and meta.get("expert_deleted")):
            found.append(path.stem)
    return found


def _layers(tensors: Mapping[str, Tensor], rank: int, scale: float, problems: list[str]) -> dict[str, Pair]:
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _HALF.match(key)
        if match is None:
            problems.append(f"tensor '{key[:120]}' is no lora_a or lora_b")
        else:
            halves.setdefault(match["path"], {})[match["half"]] = tensor
    layers = {}
    for path, parts in halves.items():
        if set(parts) != {"a", "b"}:
            problems.append(f"layer '{path}' has lora_{next(iter(parts))} alone (tied parameters are not saved)")
            continue
        a, b = parts["a"], parts["b"]
        if a.dim() != 2 or b.dim() != 2 or a.shape[1] != rank or b.shape[0] != rank:
            problems.append(
                f"layer '{path}' needs lora_a (d_in, {rank}) and lora_b ({rank}, d_out), the file holds "
                f"{tuple(a.shape)} and {tuple(b.shape)}"
            )
            continue
        layers[path] = (a.double().T, b.double().T * scale)
    return layers


def _base(meta: Mapping[str, Any]) -> str | None:
    """Return the name of the base model: of the expert, or of older entries' training config."""
    training = meta.get("training_config")
    name = meta.get("expert_model") or (training.get("model") if isinstance(training, Mapping) else None)
    return name if isinstance(name, str) else None
