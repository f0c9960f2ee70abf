"""LoRA files: what a folder as PEFT saves it holds, and everything that keeps it from being an expert.

What it holds beyond low-rank pairs on linear layers (DoRA, trained biases or embeddings, ...) has no place in an
expert, so it is named as a problem and never left out in silence. Nothing is raised here: all are told at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from peft.utils.other import get_pattern_key
from torch import nn

from .base_weights import copy_problems, path_of_weight
from .files import Contents
from .plan import why_not_pattern

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
    "modules_to_save": "it holds modules trained whole, which can only be told from the base's own beside the base",
    "trainable_token_indices": "it holds trained embeddings",
    "target_parameters": "it adapts bare parameters instead of linear layers",
    "layer_replication": "it needs a base with repeated layers",
    "alora_invocation_tokens": "activated LoRA acts only after certain tokens",
}
# The others start A and B from the base weight and change the base itself: the file alone does not tell the function.
_SAFE_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")
_LORA_TENSOR = re.compile(r"^(?:base_model\.model\.)?(?P<path>.+)\.lora_(?P<part>[AB])\.weight$")
_NAMED_TENSOR = re.compile(r"\.lora_[AB]\.(?P<adapter>[^.]+)\.weight$")
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "module")  # of torch.compile, FSDP and DDP
_SHOWN = 4  # problems of one kind that are told one by one


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


def lora_problems(
    contents: Contents, sizes: Mapping[str, tuple[int, int]] | None = None, base: nn.Module | None = None
) -> tuple[list[str], int]:
    """Return what keeps a LoRA's config and header from being an expert, and its largest rank.

    No tensor is read but those that are weights of the base by their names.

    Args:
        contents: of its folder, without problems of their own.
        sizes: (d_in, d_out) of the linear layers of the base by path; without them A and B must fit each other.
        base: the base; without it, no weight of it may be there.
    """
    lora = Lora("", contents)
    found = _misfits(lora, sizes, base)
    if lora.copies and base is not None and not contents.problems:
        found += _few(copy_problems(lora.copies, contents.read(), base))
    return found, max((pair.rank for pair in lora.pairs.values()), default=0)


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
        found += _few(copy_problems(lora.copies, contents.read(), base))
    return found + contents.not_finite() if values else found


def _misfits(lora: Lora, sizes: Mapping[str, tuple[int, int]] | None, base: nn.Module | None = None) -> list[str]:
    """Fill in the pairs of a LoRA from its config and header; returns what does not fit."""
    contents = lora.contents
    # beside the base, what was saved of it is judged tensor by tensor
    judged = {"modules_to_save"} if base is not None and any("lora_" not in name for name in contents.tensors) else ()
    found = _config_problems(contents.config or {}, judged)
    if _pattern_problems(contents.config or {}):
        return found
    halves: dict[str, dict[str, str]] = {}
    alike: dict[str, list[str]] = {}  # by kind: an adapter of another base has a problem in every layer
    for name in contents.tensors:
        match = _LORA_TENSOR.match(name)
        if match and match["part"] not in halves.setdefault(match["path"], {}):
            halves[match["path"]][match["part"]] = name
        elif match:
            found.append(f"tensor '{name}' is there twice, with and without PEFT's prefix")
        elif base is not None and (copy := path_of_weight(name, base)) is not None and copy not in lora.copies:
            lora.copies[copy] = name
        else:
            alike.setdefault(why := _why_not(name), []).append(f"tensor '{name}' {why}")
    for path, parts in sorted(halves.items()):
        if len(parts) == 1:
            alike.setdefault("alone", []).append(f"tensor '{next(iter(parts.values()))}' has no partner")
        elif sizes is not None and path not in sizes:
            text = f"the model has no linear layer '{path}'{_near(path, sizes)}"
            alike.setdefault("no layer", []).append(text)
        else:
            alike.setdefault("shapes", []).extend(_read_pair(lora, path, parts, sizes and sizes[path]))
    return found + [problem for problems in alike.values() for problem in _few(problems)]


def _few(problems: list[str]) -> list[str]:
    """Return problems of one kind: all of few, and of many the first and their number."""
    return problems if len(problems) <= _SHOWN else [f"{problems[0]} (and {len(problems) - 1:,} more like it)"]


def _near(path: str, sizes: Mapping[str, Any]) -> str:
    """Return the tail of a problem that tells which layer is probably meant, when the model is another part."""
    for known in sizes:
        if path.endswith(f".{known}"):
            outer = path.removesuffix(f".{known}")
            if outer.rpartition(".")[2] in _WRAPPERS or outer.endswith("base_model.model"):
                return f", but '{known}': '{outer}' was wrapped around the model; save the LoRA from what is inside"
            return f", but '{known}': the LoRA is of a model that holds this one as '{outer}'; load the base as that"
        if known.endswith(f".{path}"):
            return f", but '{known}': the LoRA is of the model inside, '{known.removesuffix(f'.{path}')}'; give that"
    return ""


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


def _config_problems(config: Mapping[str, Any], judged: Collection[str] = ()) -> list[str]:
    """Return what in a PEFT config an expert cannot express; an unknown key that is set counts, too.

    Keys in `judged` are passed over.
    """
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
        if key in _READ or key in _HARMLESS or key in judged or key == "bias" or value in (None, False, [], {}, ""):
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
    if "trainable_tokens" in name:
        return "holds trained embeddings of some tokens, which are not part of an expert"
    if (match := _NAMED_TENSOR.search(name)) is not None:
        return (
            f"has the adapter's name '{match['adapter']}' in it, so PEFT would pass it over; save it with PEFT's "
            f"save_pretrained, or take '.{match['adapter']}' out of the name"
        )
    if name.endswith(".bias"):
        return "is a trained bias, which is not part of an expert"
    if "lora_" not in name:
        return (
            "is a weight of the base that was trained whole (modules_to_save), which is not part of an expert; if it "
            "was not trained, save the LoRA again with save_embedding_layers=False, or add it to a library beside its "
            "base (--model), which leaves out what is the base's own"
        )
    return "is not the A or B of a LoRA on a linear layer"
