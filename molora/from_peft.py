"""import_peft: plain PEFT LoRAs become the experts of a mixture, exactly.

What a LoRA folder holds beyond low-rank pairs on linear layers (DoRA, trained biases or embeddings, ...) has no place
in an expert, so it is named in an error and never left out in silence.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils.other import get_pattern_key
from torch import nn

from . import compat
from .base_weights import copy_problems, path_of_weight
from .config import MoloraConfig, build_config
from .control import routed_layers, tuner_of
from .errors import ConfigError, LoadError, raise_all
from .files import Contents, local_folder, look
from .plan import form_of, regex_of, targets_of, why_not_pattern
from .undo import undone_on_error
from .wrapping import wrap

# The keys of a LoRA's config that are read here, or that cannot change its function once its tensors are there.
_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"}
_HARMLESS = {
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "lora_dropout"),
    *("task_type", "inference_mode", "auto_mapping", "base_model_name_or_path", "revision", "peft_version"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config", "qalora_group_size"),
    *("megatron_core", "ensure_weight_tying"),
}
_REFUSED = {
    "use_dora": "DoRA also rescales the base weight, which no expert can",
    "use_qalora": "QA-LoRA pools the input, which no expert can",
    "use_bdlora": "block-diagonal LoRA holds other tensors",
    "lora_bias": "a trained bias of B is not part of an expert",
    "modules_to_save": "it holds modules trained whole",
    "trainable_token_indices": "it holds trained embeddings",
    "target_parameters": "it adapts bare parameters instead of linear layers",
    "layer_replication": "it needs a base with repeated layers",
    "alora_invocation_tokens": "activated LoRA acts only after certain tokens",
}
# The others start A and B from the base weight and change the base itself: the file alone does not tell the function.
_SAFE_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")
_LORA_TENSOR = re.compile(r"^(?:base_model\.model\.)?(?P<path>.+)\.lora_(?P<part>[AB])\.weight$")
_UNIFORM = {"scorer": {"name": "linear", "init": 0.0}, "selector": "softmax"}


@dataclass
class Pair:
    """One low-rank pair of a LoRA file: its tensor names, its rank, and the factor PEFT multiplies it with."""

    A: str
    B: str
    rank: int
    scale: float


@dataclass
class Lora:
    """A LoRA folder: its pairs by path of the layer; `room` is the least rank that its expert gets in every layer.

    `copies` are the names of tensors that are weights of the base, by the path of their layer.
    """

    label: str
    contents: Contents
    pairs: dict[str, Pair] = field(default_factory=dict)
    room: int = 1
    copies: dict[str, str] = field(default_factory=dict)


def import_peft(
    model: nn.Module,
    dirs: Sequence[str | Path],
    *,
    recipe: str | Path | Mapping[str, Any] | MoloraConfig = _UNIFORM,
    names: Sequence[str] | None = None,
    adapter_name: str = "default",
    **changes: Any,
) -> PeftModel:
    """Make a mixture of plain PEFT LoRAs: each becomes one expert, exactly.

    They may differ in rank, alpha, target layers, rslora, rank and alpha patterns and dtype; a layer that a LoRA does
    not touch gets a fresh expert there, which changes nothing. How tokens are routed comes from the recipe.

    PEFT saves the head, or the embedding, beside a LoRA on it. Such a weight is left out when it is the base's own to
    the last bit, which `molora.report` tells, and refused when it is not.

    Args:
        model: the base model of the LoRAs, or a PeftModel that molora made from it.
        dirs: their folders or Hub repository ids, in the order of the experts.
        recipe: as in `wrap`. The default weighs all experts equally at first, and learns a linear router.
        names: of the experts; the names of the folders by default. They are kept as `experts.names`.
        adapter_name: what PEFT calls the mixture.
        changes: as in `wrap`; `experts={"frozen": "all"}` trains the router alone. Number, ranks and scales of the
            experts come from the LoRAs.

    Returns:
        The PeftModel. With `molora.pin(model, one_hot)` it computes what PEFT does with that LoRA.

    Raises:
        LoadError: a LoRA is damaged, holds what an expert cannot, or does not fit the model; all problems at once.
        ConfigError: the recipe cannot hold the experts.
    """
    if isinstance(dirs, (str, Path)) or not dirs:
        raise ConfigError(f"import_peft needs a list of LoRA folders, got {dirs!r}")
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    sizes = compat.linear_sizes_of(base)
    labels = _labels(dirs, names)
    loras = [Lora(label, look(local_folder(path))) for label, path in zip(labels, dirs, strict=True)]
    problems = []
    for lora in loras:
        found = read_lora(lora, sizes, base=base)
        problems += [f"'{lora.label}': {problem}" for problem in found]
    raise_all(problems, LoadError, "these LoRAs cannot all become experts")
    return mix(model, loras, recipe, adapter_name, changes)


def mix(
    model: nn.Module,
    loras: Sequence[Lora],
    recipe: str | Path | Mapping[str, Any] | MoloraConfig,
    adapter_name: str,
    changes: Mapping[str, Any],
) -> PeftModel:
    """Return the mixture whose experts are these LoRAs, which were read without problems; see `import_peft`.

    A pair without tensor names, `Pair("", "", rank, 0.0)`, keeps room of that rank in its layer, filled with zeros.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    config = _mixture_config(loras, compat.module_paths(base), recipe, changes)
    with undone_on_error(model):
        peft_model = _wrapped(model, config, adapter_name)
        layers = routed_layers(peft_model, adapter_name)
        lost = sorted({path for lora in loras for path in lora.pairs} - layers.keys())
        raise_all([f"layer '{path}' of the model cannot be routed" for path in lost], LoadError, "not every LoRA fits")
        for slot, lora in enumerate(loras):
            tensors = dict(lora.contents.read())
            for path, pair in lora.pairs.items():
                bank = layers[path].molora_bank[adapter_name]
                if pair.A:
                    bank.write(slot, tensors[pair.A], tensors[pair.B], pair.scale)
                else:
                    bank.clear(slot)
    tuner_of(peft_model).reports[adapter_name].notes += [
        f"'{lora.label}' also holds the base's own weight of {', '.join(sorted(lora.copies))}, which stays as it is"
        for lora in loras
        if lora.copies
    ]
    return peft_model


def _labels(dirs: Sequence[str | Path], names: Sequence[str] | None) -> list[str]:
    if names is not None:
        if len(names) != len(dirs) or len(set(names)) != len(names):
            raise ConfigError(f"names must hold {len(dirs)} different names, one per LoRA, got {list(names)!r}")
        return list(names)
    own = [Path(path).name or str(path) for path in dirs]
    return [name if own.count(name) == 1 else f"{name}_{number}" for number, name in enumerate(own)]


def lora_problems(contents: Contents, sizes: Mapping[str, tuple[int, int]] | None = None) -> tuple[list[str], int]:
    """Return what keeps a LoRA's config and header from being an expert, and its largest rank; no tensor is read.

    Args:
        contents: of its folder, without problems of their own.
        sizes: (d_in, d_out) of the linear layers of the base by path; without them A and B must fit each other.
    """
    lora = Lora("", contents)
    return _misfits(lora, sizes), max((pair.rank for pair in lora.pairs.values()), default=0)


def read_lora(
    lora: Lora, sizes: Mapping[str, tuple[int, int]] | None, values: bool = True, base: nn.Module | None = None
) -> list[str]:
    """Fill in the pairs of a LoRA; returns everything that keeps it from being an expert, `values` NaN and Inf too.

    Without sizes of the base's layers, A and B must fit each other. Without the base, no weight of it may be there.
    """
    contents = lora.contents
    if contents.config is None:
        return contents.problems
    if not contents.tensors or contents.config.get("peft_type") != "LORA":
        return contents.problems + _config_problems(contents.config)
    found = contents.problems + _misfits(lora, sizes, base)
    if lora.copies and base is not None and not contents.problems:
        found += copy_problems(lora.copies, lora.contents.read(), base)
    return found + contents.not_finite() if values else found


def _misfits(lora: Lora, sizes: Mapping[str, tuple[int, int]] | None, base: nn.Module | None = None) -> list[str]:
    """Fill in the pairs of a LoRA from its config and header; returns what does not fit."""
    contents = lora.contents
    found = _config_problems(contents.config or {})
    if _pattern_problems(contents.config or {}):
        return found
    halves: dict[str, dict[str, str]] = {}
    for name in contents.tensors:
        match = _LORA_TENSOR.match(name)
        if match and match["part"] not in halves.setdefault(match["path"], {}):
            halves[match["path"]][match["part"]] = name
        elif match:
            found.append(f"tensor '{name}' is there twice, with and without PEFT's prefix")
        elif base is not None and (copy := path_of_weight(name, base)) is not None and copy not in lora.copies:
            lora.copies[copy] = name
        else:
            found.append(f"tensor '{name}' {_why_not(name)}")
    for path, parts in sorted(halves.items()):
        if len(parts) == 1:
            found.append(f"tensor '{next(iter(parts.values()))}' has no partner")
        elif sizes is not None and path not in sizes:
            found.append(f"the model has no linear layer '{path}'")
        else:
            found += _read_pair(lora, path, parts, sizes and sizes[path])
    return found


def _read_pair(lora: Lora, path: str, parts: Mapping[str, str], sizes: tuple[int, int] | None) -> list[str]:
    config, tensors = lora.contents.config or {}, lora.contents.tensors
    A, B = tensors[parts["A"]], tensors[parts["B"]]
    rank = _by_pattern(config, "rank_pattern", path, config.get("r"))
    alpha = _by_pattern(config, "alpha_pattern", path, config.get("lora_alpha"))
    d_in, d_out = sizes or (A.shape[-1] if A.shape else 0, B.shape[0] if B.shape else 0)
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        return [f"layer '{path}' has r={rank!r}, which is no rank"]
    if A.shape != (rank, d_in) or B.shape != (d_out, rank):
        return [f"layer '{path}' needs A {(rank, d_in)} and B {(d_out, rank)}, the file holds {A.shape} and {B.shape}"]
    if not A.is_floating or not B.is_floating:
        return [f"layer '{path}' has tensors of dtype {A.dtype} and {B.dtype}, which are no weights"]
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not abs(alpha) < 1e30:
        return [f"layer '{path}' has lora_alpha {alpha!r}, which is no number"]
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    lora.pairs[path] = Pair(parts["A"], parts["B"], rank, scale)
    return []


def _by_pattern(config: Mapping[str, Any], key: str, path: str, default: Any) -> Any:
    patterns = config.get(key) or {}
    return patterns.get(get_pattern_key(patterns.keys(), path), default)


def _config_problems(config: Mapping[str, Any]) -> list[str]:
    """Return what in a PEFT config an expert cannot express; an unknown key that is set counts, too."""
    if config.get("peft_type") != "LORA":
        return [f"it is an adapter of type {config.get('peft_type')!r}; only LORA adapters become experts"]
    found = _pattern_problems(config)
    if config.get("bias", "none") != "none":
        found.append(f"bias={config['bias']!r}: trained biases are not part of an expert")
    init = config.get("init_lora_weights", True)
    if not any(init is safe or init == safe for safe in _SAFE_INITS):
        found.append(
            f"init_lora_weights={init!r} changes the base weights as well; convert it with PEFT's save_pretrained("
            "path_initial_model_for_weight_conversion=...) first"
        )
    for key, value in config.items():
        if key in _READ or key in _HARMLESS or key == "bias" or value in (None, False, [], {}, ""):
            continue
        reason = _REFUSED.get(key, "molora does not know what it does to the adapter")
        found.append(f"{key}={value!r}: {reason}")
    return found


def _pattern_problems(config: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the patterns of a config; those of a stranger may be no regex, or an endless one."""
    found = []
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if isinstance(patterns, dict):
            found += [f"{key}: {problem}" for p in patterns if (problem := why_not_pattern(p)) is not None]
        else:
            found.append(f"{key} must be a mapping, got {type(patterns).__name__}")
    return found


def _why_not(name: str) -> str:
    if "lora_embedding" in name:
        return "belongs to a LoRA on an embedding, and import_peft fills linear layers only"
    if "lora_magnitude" in name:
        return "belongs to DoRA, which also rescales the base weight"
    if name.endswith(".bias"):
        return "is a trained bias, which is not part of an expert"
    if "lora_" not in name:
        return (
            "is a weight of the base that was trained whole (modules_to_save), which is not part of an expert; if it "
            "was not trained, save the LoRA again with save_embedding_layers=False"
        )
    return "is not the A or B of a LoRA on a linear layer"


def _mixture_config(
    loras: Sequence[Lora], all_paths: Sequence[str], recipe: Any, changes: Mapping[str, Any]
) -> MoloraConfig:
    """Return the config of a mixture whose experts have the ranks and scales of the LoRAs."""
    mine = {"num", "rank", "alpha", "scaling", "rslora", "names"} & set(changes.get("experts") or {})
    wrong = sorted(f"experts.{key}" for key in mine)
    wrong += sorted({"target_modules", "exclude_modules", "layers"} & set(changes))
    if wrong:
        raise ConfigError(
            f"number, ranks, scales and layers of imported experts come from the LoRAs; leave out {', '.join(wrong)}"
        )
    config = build_config(recipe, changes)
    if form_of(config.experts) != "lora":
        raise ConfigError(
            f"experts.form '{form_of(config.experts)}' cannot hold LoRAs as they are; use another recipe, or pass "
            "experts={'form': 'lora'}"
        )
    paths = sorted({path for lora in loras for path in lora.pairs})
    own = {path: [lora.pairs[path].rank if path in lora.pairs else 1 for lora in loras] for path in paths}
    ranks = {path: [max(r, lora.room) for r, lora in zip(given, loras, strict=True)] for path, given in own.items()}
    usual = Counter(tuple(r) for r in ranks.values()).most_common(1)[0][0]
    others: dict[tuple[int, ...], list[str]] = {}
    for path, rank in ranks.items():
        if tuple(rank) != usual:
            others.setdefault(tuple(rank), []).append(path)
    scales = {pair.scale for lora in loras for pair in lora.pairs.values() if pair.scale != 0}
    experts = {
        "num": len(loras),
        "rank": list(usual),
        "scaling": scales.pop() if len(scales) == 1 else 1.0,  # one scale for all keeps A and B bit by bit
        "names": [lora.label for lora in loras],
    }
    layers = [{"match": regex_of(members), "experts": {"rank": list(rank)}} for rank, members in others.items()]
    targets = {"target_modules": targets_of(paths, all_paths), "exclude_modules": None}
    return build_config(config, {**targets, "experts": experts, "layers": layers})


def _wrapped(model: nn.Module, config: MoloraConfig, adapter_name: str) -> PeftModel:
    if not isinstance(model, PeftModel):
        return wrap(model, config, adapter_name=adapter_name)
    model.add_adapter(adapter_name, config)
    return model
