"""export_peft: one expert, or a mixture with fixed gates, becomes a plain LoRA that any PEFT loads, exactly."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from .checkpoint import peft_model_of
from .compat.layers import PLAIN_LINEARS, module_paths
from .config import MoloraConfig
from .control import routed_layers
from .embeddings import RoutedEmbedding
from .errors import ConfigError, raise_all
from .files import CARD, WEIGHTS, replacing
from .layers import RoutedLayer
from .plan import form_of, targets_of

PREFIX = "base_model.model."  # PEFT puts it before every tensor name


def export_peft(
    model: nn.Module,
    path: str | Path,
    *,
    expert: int | str | None = None,
    gates: Sequence[float] | Tensor | Mapping[str, Sequence[float] | Tensor] | None = None,
    adapter: str = "default",
) -> Path:
    """Write one expert, or a mixture with fixed gates, as a plain LoRA that any PEFT loads, without molora.

    A mixture becomes one LoRA whose rank is the sum of its experts' ranks (of one expert, with forms that share A or
    average their factors), which is exact. Forms with an activation, and `ia3`, are no LoRA and are refused. With form
    `module`, expert i is the i-th routed layer of each block.

    Args:
        model: a wrapped model.
        path: the folder to write; replaced as a whole.
        expert: number or name (`experts.names`) of the one expert to write.
        gates: (E,) numbers, one per expert, for all layers; or a mapping from layer path to them. Zero leaves an
            expert out.
        adapter: which of the model's adapters.

    Returns:
        The folder.

    Raises:
        ConfigError: neither or both of `expert` and `gates` are given, or they do not fit the experts.
    """
    if (expert is None) == (gates is None):
        raise ConfigError("export_peft needs either expert=<number or name> or gates=[one number per expert]")
    peft_model = peft_model_of(model, adapter)
    config = peft_model.peft_config[adapter]
    layers = routed_layers(peft_model, adapter)
    weights = _gates_by_layer(layers, adapter, expert, gates, config.experts)
    pairs: dict[str, tuple[Tensor, Tensor, float]] = {}
    for site, layer in layers.items():
        bank = layer.molora_bank[adapter]
        if any(weights[site]) or not bank.rests_at_zero:
            pairs[site] = (*bank.mixed(torch.tensor(weights[site])), bank.scaling)
    if not pairs:
        raise ConfigError("all gates are 0, so there is nothing to export")
    tables = {path for path, layer in layers.items() if isinstance(layer, RoutedEmbedding)}
    tensors, shapes = _factors(pairs, tables)
    saved = get_peft_model_state_dict(peft_model, adapter_name=adapter, save_embedding_layers=False)
    tensors.update({key: value for key, value in saved.items() if "molora_" not in key})  # whole modules, as they are
    lora = _lora_config(shapes, peft_model.get_base_model(), config)
    folder = Path(path)
    with replacing(folder) as draft:
        save_file({key: value.contiguous().cpu() for key, value in tensors.items()}, draft / WEIGHTS, {"format": "pt"})
        lora.save_pretrained(str(draft))
        what = f"expert {expert}" if expert is not None else "a fixed mixture"
        (draft / CARD).write_text(_card(config, what), encoding="utf-8")
    return folder


def _gates_by_layer(
    layers: Mapping[str, RoutedLayer], adapter: str, expert: Any, gates: Any, experts: Mapping[str, Any]
) -> dict[str, list[float]]:
    """Return the gates of the experts inside the bank of each layer; lists every layer that they do not fit."""
    if isinstance(expert, str):
        names = experts.get("names") or []
        if expert not in names:
            raise ConfigError(f"no expert is called '{expert}'; known: {', '.join(names) or '(none has a name)'}")
        expert = list(names).index(expert)
    if isinstance(gates, Mapping) and set(gates) != set(layers):
        wrong = sorted(set(gates) ^ set(layers))
        raise ConfigError(f"gates must name every routed layer and no other; missing or unknown: {', '.join(wrong)}")
    by_module = form_of(experts) == "module"
    members = Counter(layer.sites[adapter].group for layer in layers.values())
    found, problems = {}, []
    for path, layer in layers.items():
        site, bank = layer.sites[adapter], layer.molora_bank[adapter]
        count = members[site.group] if by_module else bank.num_experts
        if gates is not None and bank.splits > 1 and _number_of(gates, path) == bank.num_gates:
            count = bank.num_gates  # gates for each block, or each step; otherwise they hold for all alike
        if by_module and expert is not None:
            count = max(members.values())  # smaller blocks, or layers outside of any, just have no such layer
        if expert is not None:
            values = [float(e == expert) for e in range(count)]
            fits = 0 <= expert < count
        else:
            values = torch.as_tensor(gates[path] if isinstance(gates, Mapping) else gates).double().flatten().tolist()
            fits = len(values) == count and all(math.isfinite(value) for value in values)
        if site.fixed:  # one LoRA that always acts, whatever the gates are elsewhere
            values, fits = [1.0], True
        one_hot = values.count(1.0) == 1 and values.count(0.0) == len(values) - 1
        if adapter in layer.roles and fits and not one_hot:
            problems.append(f"layer '{path}': a mixture of whole MLP blocks is no LoRA; export one expert of it")
        if not fits:
            given = f"there is no expert {expert}" if expert is not None else f"gates {values} do not fit"
            problems.append(f"layer '{path}' has {count} experts, {given}")
        found[path] = [values[site.column]] if by_module and fits else values
    raise_all(problems, ConfigError, "nothing was exported")
    return found


def _number_of(gates: Any, path: str) -> int:
    return torch.as_tensor(gates[path] if isinstance(gates, Mapping) else gates).numel()


def _factors(
    pairs: Mapping[str, tuple[Tensor, Tensor, float]],
    tables: Collection[str] = (),
) -> tuple[dict[str, Tensor], dict[str, tuple[int, float]]]:
    """Return the tensors of a LoRA file, and (rank, alpha) by layer, so that PEFT's alpha / rank is the exact scale.

    `tables` are the paths of embeddings, whose factors have other names in PEFT.
    """
    tensors, shapes = {}, {}
    for path, (A, B, scale) in pairs.items():
        rank = A.shape[0]
        alpha = scale * rank
        if alpha / rank != scale:  # no alpha gives this scale: let it be 1 and fold it into B
            alpha, B = float(rank), B * scale
        names = ("lora_embedding_A", "lora_embedding_B") if path in tables else ("lora_A.weight", "lora_B.weight")
        for name, factor in zip(names, (A, B), strict=True):
            tensors[f"{PREFIX}{path}.{name}"] = factor
        shapes[path] = (rank, int(alpha) if alpha == int(alpha) else alpha)
    return tensors, shapes


def _lora_config(shapes: Mapping[str, tuple[int, float]], base: nn.Module, config: MoloraConfig) -> LoraConfig:
    rank, alpha = Counter(shapes.values()).most_common(1)[0][0]
    # PEFT takes the first pattern that matches the end of a path, so longer paths come first
    ordered = sorted(shapes, key=lambda path: (-path.count("."), path))
    lora = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={re.escape(path): shapes[path][0] for path in ordered if shapes[path][0] != rank},
        alpha_pattern={re.escape(path): shapes[path][1] for path in ordered if shapes[path][1] != alpha},
        target_modules=targets_of(list(shapes), module_paths(base)),
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        inference_mode=True,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
    )
    if isinstance(lora.target_modules, set):
        lora.target_modules = sorted(lora.target_modules)  # files are the same every time
    bases = dict(base.named_modules())
    lora.fan_in_fan_out = all(isinstance(bases[path].get_base_layer(), PLAIN_LINEARS[1]) for path in shapes)
    return lora


def _card(config: MoloraConfig, what: str) -> str:
    base = f"base_model: {config.base_model_name_or_path}\n" if config.base_model_name_or_path else ""
    origin = f"recipe `{config.recipe}`" if config.recipe else "no named recipe"
    return (
        f"---\nlibrary_name: peft\n{base}tags:\n- lora\n---\n\nA LoRA exported by molora: {what} of a mixture made "
        f"with {origin}. Any PEFT loads it with `PeftModel.from_pretrained`; molora is not needed.\n"
    )
