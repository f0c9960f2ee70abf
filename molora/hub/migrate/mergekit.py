"""Reads the YAML of mergekit-moe: which LoRAs become experts, and the prompts that their gates start from.

mergekit makes experts of whole models; here `source_model` is a LoRA. What a mixture of LoRAs cannot be is refused, and
a key that is not known is, too. The states that the gates are made of are described in gates.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ConfigError, did_you_mean, raise_all
from ..plain_yaml import read_yaml

POOL_OF = {"hidden": "last", "hidden_last": "last", "hidden_avg": "mean"}
OTHER_MODES = {
    "cheap_embed": "it looks at token embeddings, which no layer of a mixture routes by",
    "random": "it asks for no prompts; compose with a router, or train one",
    "uniform_random": "it asks for no prompts; compose with a router, or train one",
}
KEYS = ("base_model", "gate_mode", "experts_per_token", "experts", "dtype", "architecture", "shared_experts")
EXPERT_KEYS = ("source_model", "positive_prompts", "negative_prompts", "noise_scale")


@dataclass(frozen=True)
class MergekitPlan:
    """What a file of mergekit-moe asks for.

    Attributes:
        base_model: folder or Hub name, or nothing.
        pool: the state of a prompt: its `last` token or the `mean`.
        top_k: experts per token.
        sources, positive, negative: of each expert, the LoRA and its prompts.
    """

    base_model: str | None
    pool: str
    top_k: int
    sources: list[str]
    positive: list[list[str]]
    negative: list[list[str]]


def read_mergekit(path: str | Path) -> MergekitPlan:
    """Return what a file of mergekit-moe asks for.

    Raises:
        ConfigError: the file cannot be read, or asks for what a mixture of LoRAs cannot be; all problems at once.
    """
    path = Path(path)
    try:
        content = read_yaml(path.read_text(encoding="utf-8"), path.name)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{path}' cannot be read: {error}") from None
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path.name} must hold a mapping, as mergekit-moe reads it, got {type(content).__name__}")
    problems = [f"key {key!r} is unknown{did_you_mean(str(key), KEYS)}" for key in content if key not in KEYS]
    base, mode, top = content.get("base_model"), content.get("gate_mode", "hidden"), content.get("experts_per_token", 2)
    if base is not None and not isinstance(base, str):
        problems.append(f"base_model must be a text, got {base!r}")
    if mode not in POOL_OF:
        reason = OTHER_MODES.get(str(mode), f"known: {', '.join(POOL_OF)}")
        problems.append(f"gate_mode {mode!r} cannot be used: {reason}")
    if content.get("shared_experts"):
        problems.append("shared_experts: an expert that always acts has no gate; merge it into the base model first")
    given = content.get("experts")
    experts = [one for one in given if isinstance(one, Mapping)] if isinstance(given, list) else []
    if not isinstance(given, list) or not given or len(experts) < len(given):
        problems.append("experts must be a list of mappings with source_model and positive_prompts")
    for number, one in enumerate(experts):
        problems += _expert_problems(number, one)
    if isinstance(top, bool) or not isinstance(top, int) or not 1 <= top <= max(1, len(experts)):
        problems.append(f"experts_per_token must be from 1 to the number of experts {len(experts)}, got {top!r}")
    raise_all(problems, ConfigError, f"{path.name} asks for no mixture that molora can make")
    return MergekitPlan(
        base,
        POOL_OF[mode],
        top,
        [one["source_model"] for one in experts],
        [list(one["positive_prompts"]) for one in experts],
        [list(one.get("negative_prompts") or []) for one in experts],
    )


def _expert_problems(number: int, one: Mapping[str, Any]) -> list[str]:
    source = one.get("source_model")
    where = f"expert {number}" + (f" ('{source}')" if isinstance(source, str) else "")
    found = [f"{where}: key {k!r} is unknown{did_you_mean(str(k), EXPERT_KEYS)}" for k in one if k not in EXPERT_KEYS]
    if not isinstance(source, str) or not source:
        found.append(f"{where}: source_model must be a LoRA's folder or name, got {source!r}")
    for key, needed in (("positive_prompts", True), ("negative_prompts", False)):
        texts = one.get(key) or []
        if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
            found.append(f"{where}: {key} must be a list of texts")
        elif needed and not texts:
            found.append(f"{where}: {key} is missing; its gate is made of them")
    if one.get("noise_scale"):
        found.append(f"{where}: noise_scale changes the weights of an expert, which stay as they are; leave it out")
    return found
