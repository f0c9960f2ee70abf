"""MixLoRA checkpoints of MoE-PEFT, its forerunner m-LoRA, and the authors' own loader (arXiv 2404.15159).

Such a folder holds adapter_config.json (`peft_type: MIXLORA`) and adapter_model.bin, a mapping from names to tensors:

    mixlora.layers.<n>.self_attn.<layer>.lora_A.weight            the one LoRA of an attention layer
    mixlora.layers.<n>.mlp.<layer>.experts.<e>.lora_A.weight      expert e of a layer of the MLP
    mixlora.layers.<n>.mlp.moe_gate.weight                        the router (E, d)

In older files the last two are

    mixlora.layers.<n>.experts.<e>.<layer>.lora_A.weight
    mixlora.layers.<n>.gate.weight

The result is the recipe `mixlora`: top-k softmax over whole MLP blocks, with the k weights divided by their sum.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ...compat.layers import linear_sizes_of, module_paths
from ...control import routed_layers
from ...errors import LoadError, raise_all
from ...files import CONFIG, read_config
from ...plan import regex_of, targets_of
from ...posthoc.rerouting import routers_of, sites_of
from ...undo import undone_on_error
from ...wrapping import wrap
from .pickles import read_tensors

PICKLE = "adapter_model.bin"
_GATE = re.compile(r"^mixlora\.layers\.(?P<block>\d+)\.(?:mlp\.moe_gate|gate)\.weight$")
_PAIR = re.compile(
    r"^mixlora\.layers\.(?P<block>\d+)\.(?:(?P<part>self_attn|mlp)\.)?(?:experts\.(?P<before>\d+)\.)?"
    r"(?P<layer>[A-Za-z_]\w*?)(?:\.experts\.(?P<after>\d+))?\.lora_(?P<half>[AB])\.weight$"
)
_BLOCK = re.compile(r"^(?P<stack>.*\blayers)\.(?P<block>\d+)\.(?P<part>self_attn|mlp)\.(?P<layer>\w+)$")


@dataclass
class _Checkpoint:
    """The tensors of a checkpoint: gates by block, and pairs by (part, block, layer) and expert."""

    gates: dict[int, Tensor] = field(default_factory=dict)
    pairs: dict[tuple[str, int, str], dict[int, dict[str, Tensor]]] = field(default_factory=dict)


def from_mixlora(model: nn.Module, folder: str | Path, *, adapter_name: str = "default") -> PeftModel:
    """Put a MixLoRA checkpoint of MoE-PEFT into a model, as the recipe `mixlora`.

    The file is a pickle; it is read by torch's `weights_only` reader, which takes tensors and plain values alone.

    Args:
        model: the base model.
        folder: of adapter_config.json and adapter_model.bin.
        adapter_name: what PEFT calls the mixture.

    Raises:
        LoadError: the checkpoint is damaged, does not fit the model, or was trained in a way that this mixture does not
            compute (its variants `mixlora-dynamic` and `mixlora-switch`, DoRA); all problems at once, and the model
            is as before.
    """
    folder = Path(folder)
    config = read_config(folder / CONFIG)
    problems = _config_problems(config, model)
    raise_all(problems, LoadError, f"the checkpoint '{folder}' is no MixLoRA that molora knows")
    sizes, num = linear_sizes_of(model), config["num_experts"]
    inside = {(m["part"], int(m["block"]), m["layer"]): path for path in sizes if (m := _BLOCK.match(path))}
    found = _sorted(read_tensors(folder / PICKLE), problems)
    own, shared = {**config, **(config.get("expert_lora") or {})}, config
    for (part, block, layer), experts in found.pairs.items():
        where = f"{part} layer '{layer}' of block {block}"
        path = inside.get((part, block, layer))
        if path is None:
            problems.append(f"the model has no {where}")
            continue
        wanted, rank = (num, own["r"]) if part == "mlp" else (1, shared["r"])
        if sorted(experts) != list(range(wanted)) or any(set(halves) != {"A", "B"} for halves in experts.values()):
            problems.append(f"{where} needs A and B of {wanted} experts, the file holds experts {sorted(experts)}")
            continue
        need = ((rank, sizes[path][0]), (sizes[path][1], rank))
        given = {(tuple(halves["A"].shape), tuple(halves["B"].shape)) for halves in experts.values()}
        problems += [f"{where} needs A {need[0]} and B {need[1]}, the file holds {g}" for g in given - {need}]
    mlps = {block: path for (part, block, _), path in inside.items() if part == "mlp"}
    for block in sorted(mlps.keys() | found.gates.keys()):
        gate = found.gates.get(block)
        if gate is None or block not in mlps or gate.dim() != 2 or gate.shape[0] != num:
            shape = "none" if gate is None else tuple(gate.shape)
            problems.append(
                f"the router of block {block} needs a weight ({num}, d) in a model with this MLP, got {shape}"
            )
    raise_all(problems, LoadError, f"the checkpoint '{folder}' does not fit")
    with undone_on_error(model):
        return _filled(model, found, inside, own, shared, adapter_name)


def _filled(
    model: nn.Module,
    found: _Checkpoint,
    inside: Mapping[tuple[str, int, str], str],
    own: Mapping[str, Any],
    shared: Mapping[str, Any],
    adapter: str,
) -> PeftModel:
    """Return the model wrapped by the recipe, with everything of the checkpoint in its place."""
    attention = [inside[key] for key in found.pairs if key[0] == "self_attn"]
    wanted = attention + [path for (part, _, _), path in inside.items() if part == "mlp"]
    experts = {"num": own["num_experts"], "rank": own["r"], "alpha": own["lora_alpha"]}
    experts |= {"rslora": bool(own.get("use_rslora")), "dropout": float(own.get("lora_dropout", 0.0))}
    ranks = {"rank": shared["r"], "alpha": shared["lora_alpha"]}
    peft_model = wrap(
        model,
        "mixlora",
        adapter_name=adapter,
        target_modules=targets_of(wanted, module_paths(model)),
        experts=experts,
        layers=[{"match": regex_of(attention), "experts": ranks}] if attention else [],
        selector={"k": own.get("top_k", 2)},
    )
    layers = routed_layers(peft_model, adapter)
    number = {path: block for (_, block, _), path in inside.items()}
    for key, path in inside.items():
        if path not in layers:
            continue
        bank, pairs = layers[path].molora_bank[adapter], found.pairs.get(key, {})
        scale = _scale(own if key[0] == "mlp" else shared)
        for (
            slot,
            pair,
        ) in pairs.items():  # a layer of the MLP that it did not train keeps fresh experts, which add nothing
            bank.write(slot, pair["A"], pair["B"], scale)
    routers = dict(zip(sites_of(peft_model, adapter), routers_of(peft_model, adapter), strict=True))
    wrong = [
        f"block {number[path]} needs {tuple(router.scorer.weight.shape)}, the file holds {tuple(gate.shape)}"
        for path, router in routers.items()
        if (gate := found.gates[number[path]]).shape != router.scorer.weight.shape
    ]
    raise_all(wrong, LoadError, "its routers do not fit")
    with torch.no_grad():
        for path, router in routers.items():
            router.scorer.weight.copy_(found.gates[number[path]])
    return peft_model


def _scale(config: Mapping[str, Any]) -> float:
    return config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])


def _sorted(tensors: Mapping[str, Tensor], problems: list[str]) -> _Checkpoint:
    found = _Checkpoint()
    for name, tensor in tensors.items():
        if (gate := _GATE.match(name)) is not None:
            found.gates[int(gate["block"])] = tensor
            continue
        match = _PAIR.match(name)
        if match is None or (match["before"] and match["after"]):
            problems.append(f"tensor '{name[:120]}' has no place in a MixLoRA")
            continue
        expert = match["before"] or match["after"]
        part = match["part"] or ("mlp" if expert else "self_attn")
        if (part == "mlp") != (expert is not None):
            problems.append(f"tensor '{name[:120]}': the MLP has experts, the attention has none")
            continue
        halves = found.pairs.setdefault((part, int(match["block"]), match["layer"]), {})
        halves.setdefault(int(expert or 0), {})[match["half"]] = tensor
    return found


def _config_problems(config: Mapping[str, Any], model: nn.Module) -> list[str]:
    """Return what in a config this mixture cannot be, and every number that is none."""
    if config.get("peft_type") != "MIXLORA":
        return [f"peft_type is {config.get('peft_type')!r}, not 'MIXLORA'"]
    found = []
    if config.get("routing_strategy") != "mixlora":
        found.append(
            f"routing_strategy {config.get('routing_strategy')!r}: only 'mixlora' (top-k) is read; the gates of the "
            "others do not sum to 1 and shrink the frozen MLP, which molora never does (see recipes/mixlora.yaml)"
        )
    experts = config.get("expert_lora") or {}
    if not isinstance(experts, Mapping):
        return [*found, f"expert_lora must be a mapping, got {type(experts).__name__}"]
    parts = [("", config)] + ([("expert_lora.", {**config, **experts})] if experts else [])
    for where, part in parts:
        alpha = part.get("lora_alpha")
        if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not 0 < alpha < 1e30:
            found.append(f"{where}lora_alpha must be a positive number, got {alpha!r}")
        if not _whole(part.get("r")):
            found.append(f"{where}r must be a whole number of 1 or more, got {part.get('r')!r}")
        dropout = part.get("lora_dropout", 0.0)
        if not isinstance(dropout, (int, float)) or isinstance(dropout, bool) or not 0 <= dropout < 1:
            found.append(f"{where}lora_dropout must be a number from 0 to below 1, got {dropout!r}")
        if part.get("bias", "none") != "none":
            found.append(f"{where}bias={part['bias']!r}: trained biases are not part of an expert")
        if part.get("use_dora"):
            found.append(f"{where}use_dora: DoRA also rescales the base weight, which no expert can")
    top, num = config.get("top_k", 2), config.get("num_experts")
    if not _whole(num) or not _whole(top) or top > num:
        found.append(f"num_experts and top_k must be whole numbers, top_k the smaller; got {num!r} and {top!r}")
    own = getattr(getattr(model, "config", None), "hidden_act", None)
    if config.get("act_fn") not in (None, own):
        found.append(f"act_fn {config['act_fn']!r}: its experts have another activation than the model's {own!r}")
    return found


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
