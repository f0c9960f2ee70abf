"""X-LoRA folders (arXiv 2402.07148), as PEFT or the authors' package write them, become mixtures routed by X-LoRA.

Such a folder holds a classifier and, in folders of their own, the LoRAs that it mixes. PEFT names these 0, 1, ... in
the order of the classes and writes the classifier to adapter_model.safetensors; the authors' package writes
xlora_config.json, xlora_classifier.safetensors, and the LoRAs under their names.

What PEFT 0.21 saves is damaged: it takes every tensor whose name holds `.0.` for one of the adapter `0`, and so on, so
that the classifier loses layers and the folders 0, 1, ... hold weights of the base and parts of the LoRAs. A classifier
with a layer missing is refused (PEFT itself fills it at random); the LoRAs are best given as they were before.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor, nn

from ...errors import LoadError, raise_all
from ...files import CONFIG, WEIGHTS, look, read_config, read_header
from ...from_peft import import_peft
from ...lora_files import lora_problems
from ...posthoc.rerouting import routers_of
from ...posthoc.xlora import build
from ...undo import undone_on_error

AUTHORS_CONFIG, AUTHORS_WEIGHTS = "xlora_config.json", "xlora_classifier.safetensors"
_MAP = re.compile(r"^(?:.*\.)?(?:(?:layers|inner)\.(?P<at>\d+)|(?P<last>last))\.(?P<part>weight|bias)$")


def from_xlora(
    model: nn.Module,
    folder: str | Path,
    adapters: Mapping[str, str | Path] | None = None,
    *,
    adapter_name: str = "default",
) -> PeftModel:
    """Make a mixture of an X-LoRA folder that computes what X-LoRA does with it.

    Args:
        model: the base model.
        folder: what X-LoRA has saved.
        adapters: name -> folder of each LoRA, in the order in which the classifier was trained; those inside `folder`
            when not given. Paths that the config names are not followed, since they are another machine's.
        adapter_name: what PEFT calls the mixture.

    Raises:
        LoadError: a part of the classifier is missing or has the wrong shape, a LoRA cannot be an expert, or it was
            trained in a way that this mixture does not compute; all problems at once.
    """
    folder = Path(folder)
    theirs = (folder / AUTHORS_CONFIG).is_file()
    config = read_config(folder / (AUTHORS_CONFIG if theirs else CONFIG))
    if not theirs and config.get("peft_type") != "XLORA":
        raise LoadError(f"'{folder}' holds an adapter of type {config.get('peft_type')!r}, not XLORA")
    problems: list[str] = []
    experts = dict(adapters) if adapters is not None else _experts_in(folder, config, problems)
    maps = _maps(folder / (AUTHORS_WEIGHTS if theirs else WEIGHTS), config, problems)
    options = _options(config, problems, given=adapters is not None)
    raise_all(problems, LoadError, f"the X-LoRA of '{folder}' cannot be read")
    if theirs and not config.get("enable_relu_and_dropout", False):
        maps = _collapsed(maps)  # linear maps with nothing between are one linear map
    with undone_on_error(model):
        mixture = import_peft(model, list(experts.values()), names=list(experts), adapter_name=adapter_name)
        width = maps[0][0].shape[0] if len(maps) > 1 else 1
        build(mixture, adapter_name, **options, depth=len(maps), width=width, size=maps[0][0].shape[1])
        own = routers_of(mixture, adapter_name)[0].scorer.maps
        wrong = [
            f"layer {number} of the classifier must be {tuple(map_.weight.shape)}, the file holds {tuple(W.shape)}"
            for number, (map_, (W, _)) in enumerate(zip(own, maps, strict=True))
            if map_.weight.shape != W.shape
        ]
        raise_all(wrong, LoadError, f"the X-LoRA of '{folder}' does not fit {len(experts)} adapters on this model")
        with torch.no_grad():
            for map_, (W, b) in zip(own, maps, strict=True):
                map_.weight.copy_(W)
                map_.bias.copy_(b if b is not None else torch.zeros_like(map_.bias))
    return mixture


def _experts_in(folder: Path, config: Mapping[str, Any], problems: list[str]) -> dict[str, Path]:
    """Return the LoRAs inside the folder, in the order of the classes."""
    numbered = {path.name: path for path in folder.iterdir() if path.name.isdigit() and (path / CONFIG).is_file()}
    if numbered:
        order = sorted(numbered, key=int)
        if order != [str(number) for number in range(len(order))]:
            problems.append(f"adapters should be numbered from 0 without gaps, the folder holds {', '.join(order)}")
        broken = [name for name in order if (c := look(numbered[name])).problems or lora_problems(c)[0]]
        if broken:
            problems.append(
                f"its folders {', '.join(broken)} hold no whole LoRAs (PEFT 0.21 writes parts of the base there, and "
                "not all of A and B); pass adapters={name: folder} with the LoRAs it was trained with, in that order"
            )
        return {name: numbered[name] for name in order}
    names = list(config.get("adapters") or [])
    for root in (folder, folder / "adapters"):
        safe = [name for name in names if re.fullmatch(r"[\w.-]+", str(name)) and name not in (".", "..")]
        if names and len(safe) == len(names) and all((root / name / CONFIG).is_file() for name in names):
            return {name: root / name for name in names}
    problems.append(
        f"it holds no adapters {', '.join(map(str, names)) or '0, 1, ...'}; pass adapters={{name: folder}}, in the "
        "order in which it was trained"
    )
    return {}


def _maps(path: Path, config: Mapping[str, Any], problems: list[str]) -> list[tuple[Tensor, Tensor | None]]:
    """Return weight and bias of each linear map of the classifier, in float32."""
    depth, found = config.get("xlora_depth", 1), dict[int, dict[str, Tensor]]()
    try:
        header = read_header(path)
    except LoadError as error:
        problems.append(str(error))
        return []
    with safe_open(path, framework="pt", device="cpu") as file:
        for name in header:
            match = _MAP.match(name)
            if match is None:
                problems.append(f"tensor '{name}' is no part of a classifier")
                continue
            at = 10**9 if match["last"] else int(match["at"])
            found.setdefault(at, {})[match["part"]] = file.get_tensor(name).float()
    if not isinstance(depth, int) or depth < 1 or len(found) != depth or any("weight" not in m for m in found.values()):
        there = ", ".join(f"layers.{at}" if at < 10**9 else "last" for at in sorted(found)) or "none"
        problems.append(
            f"the classifier has {depth!r} linear layers by its config, the file holds {there}; PEFT loses those whose "
            "number is also the name of an adapter, and they cannot be restored: save model.internal_xlora_classifier "
            f"itself, with safetensors, as {path.name}"
        )
        return []
    maps = [(found[at]["weight"], found[at].get("bias")) for at in sorted(found)]
    for number, (W, b) in enumerate(maps):
        before = maps[number - 1][0].shape[0] if number else W.shape[-1]
        if W.dim() != 2 or W.shape[1] != before or (b is not None and b.shape != W.shape[:1]):
            problems.append(f"layer {number} of the classifier has shape {tuple(W.shape)}, {before} numbers reach it")
        elif not all(torch.isfinite(t).all() for t in (W, b) if t is not None):
            problems.append(f"layer {number} of the classifier holds NaN or Inf")
    return maps


def _collapsed(maps: list[tuple[Tensor, Tensor | None]]) -> list[tuple[Tensor, Tensor | None]]:
    W, b = (None if t is None else t.double() for t in maps[0])
    for after, bias in maps[1:]:
        W, b = after.double() @ W, None if b is None and bias is None else (0 if b is None else after.double() @ b)
        b = b if bias is None else b + bias.double()
    return [(W.float(), None if b is None else b.float())]


def _options(config: Mapping[str, Any], problems: list[str], given: bool) -> dict[str, Any]:
    """Return the options of `molora.posthoc.xlora.build` that do what this config does."""
    top, first, second = (config.get(k) for k in ("top_k_lora", "enable_softmax", "enable_softmax_topk"))
    first = True if first is None else first
    if config.get("scaling_pass_value"):
        problems.append(
            f"scaling_pass_value={config['scaling_pass_value']}: the adapters act in its first pass, here they never do"
        )
    if first and second:
        problems.append("enable_softmax and enable_softmax_topk: a softmax of a softmax is no gate that molora has")
    if not first and not (second and top):
        problems.append("enable_softmax=false: its weights are raw scores, which no link of molora gives")
    if config.get("use_trainable_adapters") and not given:
        problems.append("its adapters were trained, too; say where they are: adapters={name: folder}")
    for key in ("softmax_temperature", "global_scaling_weight", "xlora_dropout_p"):
        value = config.get(key, 1.0)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1e30:
            problems.append(f"{key} must be a number of 0 or more, got {value!r}")
    if config.get("softmax_temperature", 1.0) == 0:
        problems.append("softmax_temperature must be above 0")
    if top is not None and (not isinstance(top, int) or isinstance(top, bool) or top < 1):
        problems.append(f"top_k_lora must be a whole number of 1 or more, got {top!r}")
    if problems:
        return {}
    return {
        "per_layer": bool(config.get("layerwise_scalings", False)),
        "temperature": float(config.get("softmax_temperature", 1.0)) if first else 1.0,
        "top_k": top,
        "renormalise": bool(second),
        "weight": float(config.get("global_scaling_weight", 1.0)),
        "dropout": float(config.get("xlora_dropout_p", 0.2)),
    }
