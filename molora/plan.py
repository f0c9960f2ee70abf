"""Which layers of a model become sites, which of them share a decision, and how many experts each gets.

Everything here works on module paths alone, with no knowledge of any architecture.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import ConfigError


@dataclass(frozen=True)
class Place:
    """Where a layer stands: `decoder.layers.3.self_attn.q_proj` is in block 3 of stack `decoder.layers`."""

    path: str
    stack: str
    index: int | None

    @property
    def block(self) -> str:
        """The path of the block, or of the stack for layers outside of any block."""
        return self.stack if self.index is None else f"{self.stack}.{self.index}"


def place_of(path: str) -> Place:
    """Return the place of a layer: its block is named by the first number in its path."""
    segments = path.split(".")
    for position, segment in enumerate(segments):
        if segment.isdigit():
            return Place(path, ".".join(segments[:position]), int(segment))
    return Place(path, "", None)


def depth_of(paths: Sequence[str]) -> dict[str, int]:
    """Return the number of blocks of each stack among these paths."""
    depth: dict[str, int] = {}
    for path in paths:
        place = place_of(path)
        if place.index is not None:
            depth[place.stack] = max(depth.get(place.stack, 0), place.index + 1)
    return depth


def experts_at(
    path: str, experts: Mapping[str, Any], layers: Sequence[Mapping[str, Any]], depth: Mapping[str, int]
) -> dict[str, Any]:
    """Return the `experts` mapping of one layer, with `num` resolved to a number.

    A list for `num` is laid over the depth of the stack (MoLA, arXiv 2402.08562): with n numbers and L blocks, block l
    gets the entry at floor(l * n / L), so a shallower model skips entries evenly. Layers outside of any block
    get the last entry: such layers (poolers, heads) nearly always come after the last block. The first entry of
    `layers` whose regex is found in the path wins.
    """
    spec = dict(experts)
    for entry in layers:
        if re.search(entry["match"], path):
            spec.update(entry["experts"])
            break
    num = spec["num"]
    if isinstance(num, (list, tuple)):
        place = place_of(path)
        at = len(num) - 1 if place.index is None else place.index * len(num) // depth[place.stack]
        spec["num"] = num[at]
    return spec


def ranks_of(spec: Mapping[str, Any]) -> list[int]:
    """Return the rank of each expert of a resolved `experts` mapping, shared experts last."""
    rank, num = spec["rank"], spec["num"] + spec.get("shared", 0)
    if spec["form"] == "module":
        return [rank if isinstance(rank, int) else rank[0]]
    if isinstance(rank, (list, tuple)):
        if len(rank) != num:
            raise ConfigError(f"experts.rank lists {len(rank)} ranks for {num} experts")
        return list(rank)
    return [rank] * num


def scaling_of(spec: Mapping[str, Any]) -> float:
    """Return the scale of the delta: `scaling`, else alpha / r, or alpha / sqrt(r) with rslora (arXiv 2312.03732)."""
    if spec["scaling"] is not None:
        return float(spec["scaling"])
    ranks = set(ranks_of(spec))
    if len(ranks) > 1:
        raise ConfigError("experts of different ranks need an explicit experts.scaling, such as 1.0")
    rank = ranks.pop()
    return float(spec["alpha"]) / (rank**0.5 if spec["rslora"] else rank)


def regex_of(paths: Iterable[str]) -> str:
    """Return a regex that finds exactly these module paths."""
    return "^(?:" + "|".join(re.escape(path) for path in paths) + ")$"


def targets_of(paths: Iterable[str], all_paths: Iterable[str]) -> list[str] | str:
    """Return PEFT target_modules that match exactly these of a model's modules, as short as can be."""
    wanted, every = set(paths), list(all_paths)
    for names in (sorted({path.rpartition(".")[2] for path in wanted}), sorted(wanted)):
        endings = tuple(f".{name}" for name in names)
        if {path for path in every if path in names or path.endswith(endings)} == wanted:
            return names
    return regex_of(sorted(wanted))


@dataclass
class Report:
    """What a wrap did: wrapped layers, and layers that were asked for but skipped, each with the reason."""

    wrapped: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    decisions: int = 0
    trainable: int = 0
    total: int = 0

    def __str__(self) -> str:
        lines = [
            f"molora: {len(self.wrapped)} layers routed, {self.decisions} decisions per forward, "
            f"{self.trainable:,} of {self.total:,} parameters trainable"
        ]
        lines += [f"  skipped {path}: {reason}" for path, reason in self.skipped.items()]
        return "\n".join(lines)
