"""Which layers of a model become sites, which of them share a decision, and how many experts each gets.

Everything here works on module paths alone, with no knowledge of any architecture.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import ConfigError, did_you_mean


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
    gets the entry at floor(l * n / L), so a shallower model skips entries evenly; a profile is resolved by
    `over_depth`. Layers outside of any block get the last entry: such layers (poolers, heads) nearly always come after
    the last block. The first entry of `layers` whose regex is found in the path wins.
    """
    spec = {**experts, **changes_at(path, layers, "experts")}
    num = spec["num"]
    if isinstance(num, (list, tuple, Mapping)):
        place = place_of(path)
        # a layer outside of the blocks counts as the last block of the deepest stack
        blocks = depth[place.stack] if place.index is not None else max([len(num), *depth.values()])
        numbers = over_depth(num, blocks) if isinstance(num, Mapping) else stretched(num, blocks)
        spec["num"] = numbers[-1 if place.index is None else place.index]
    return spec


def changes_at(path: str, layers: Sequence[Mapping[str, Any]], key: str) -> dict[str, Any]:
    """Return what the first entry of `layers` that matches this path and names `key` says about it."""
    found = (entry[key] for entry in layers if key in entry and re.search(entry["match"], path))
    return dict(next(found, {}))


def stretched(numbers: Sequence[float], blocks: int) -> list[Any]:
    """Lay a list of numbers over the depth: block l gets the entry at floor(l n / L)."""
    return [numbers[block * len(numbers) // blocks] for block in range(blocks)]


# The shape of a profile: place in the depth u in [0, 1] -> how far between `min` and `max`. The names are DynaMoE's
# (arXiv 2603.01697), the formulas ours; its text was not read.
PROFILES: dict[str, Callable[[float], float]] = {
    "uniform": lambda u: 1.0,
    "descending": lambda u: 1.0 - u,
    "ascending": lambda u: u,
    "pyramid": lambda u: 1.0 - abs(2 * u - 1),
    "inverse_pyramid": lambda u: abs(2 * u - 1),
    "wave": lambda u: 0.5 * (1 + math.sin(2 * math.pi * u)),
}
_PROFILE_KEYS = ("profile", "min", "max", "total", "last")


def over_depth(spec: Mapping[str, Any], blocks: int) -> list[int]:
    """Return the number of experts of each block of a profile.

    `{profile: ascending, min: 2, max: 8}` gives `round(min + (max - min) phi(l / (L - 1)))`. `profile` may also be a
    list, laid over the depth, or `step`: `max` in the `last` blocks (2 by default, as Post-MoE) and `min` before. With
    `total` the profile keeps its shape and is rescaled so that the blocks have so many experts in all, one at least in
    each: shares are rounded down and what is left goes to the largest remainders.

    Raises:
        ConfigError: the total is less than one expert per block.
    """
    shape, low, high = spec["profile"], spec.get("min", 1), spec.get("max", 1)
    if isinstance(shape, (list, tuple)):
        wanted = [float(number) for number in stretched(shape, blocks)]
    elif shape == "step":
        wanted = [float(high if block >= blocks - spec.get("last", 2) else low) for block in range(blocks)]
    else:
        places = (block / max(1, blocks - 1) for block in range(blocks))
        wanted = [low + (high - low) * PROFILES[shape](u) for u in places]
    total = spec.get("total")
    if total is None:
        return [max(1, math.floor(number + 0.5)) for number in wanted]
    if total < blocks:
        raise ConfigError(f"experts.num.total is {total}, less than one expert for each of {blocks} blocks")
    spare = total - blocks  # one for each first, and the rest by the shape above one
    above = [max(0.0, number * total / sum(wanted) - 1) for number in wanted]
    ideal = [part * spare / sum(above) if sum(above) else spare / blocks for part in above]
    numbers = [math.floor(part + 1e-9) for part in ideal]
    by_remainder = sorted(range(blocks), key=lambda block: numbers[block] - ideal[block])
    for block in by_remainder[: spare - sum(numbers)]:
        numbers[block] += 1
    return [1 + number for number in numbers]


def profile_problems(spec: Mapping[str, Any], where: str) -> list[str]:
    """Return what is wrong with a `num` that is written as a profile."""
    found = [
        f"{where} has no key '{key}'{did_you_mean(str(key), _PROFILE_KEYS)}" for key in spec if key not in _PROFILE_KEYS
    ]
    shape = spec.get("profile")
    names = (*PROFILES, "step")
    if isinstance(shape, (list, tuple)):
        if not shape or any(isinstance(n, bool) or not isinstance(n, (int, float)) or n < 1 for n in shape):
            found.append(f"{where}.profile must be a name or a list of numbers >= 1, got {shape!r}")
    elif shape not in names:
        found.append(f"{where}.profile {shape!r} is unknown{did_you_mean(str(shape), names)}")
    for key in ("min", "max", "total", "last"):
        value = spec.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            found.append(f"{where}.{key} must be a whole number >= 1, got {value!r}")
    if not found and spec.get("min", 1) > spec.get("max", 1) and not isinstance(shape, (list, tuple)):
        found.append(f"{where}: min {spec.get('min', 1)} is more than max {spec.get('max', 1)}")
    return found


def form_of(spec: Mapping[str, Any]) -> str:
    """Return the name of the form of an `experts` mapping, which may hold options of the form beside it."""
    form = spec["form"]
    return form if isinstance(form, str) else form["name"]


def ranks_of(spec: Mapping[str, Any]) -> list[int]:
    """Return the rank of each expert of a resolved `experts` mapping, shared experts last."""
    rank, num = spec["rank"], spec["num"] + spec.get("shared", 0)
    if form_of(spec) == "module":
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


def why_not_pattern(pattern: Any) -> str | None:
    """Return why a regex from elsewhere cannot be used on module paths: it is none, or it could take for ever.

    Matching may take exponential time where a repeated group is repeated, and a high power of the length of the path
    where many repeats follow each other.
    """
    if not isinstance(pattern, str):
        return f"{pattern!r:.80} is no text"
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return f"{pattern!r:.80} is no regular expression ({error})"
    plain = re.sub(r"\\.", "x", pattern)
    repeats = re.findall(r"[*+]|\{\d*,", plain)
    if re.search(r"\)\s*(?:[*+]|\{\d)", plain) or len(repeats) > 4:
        return f"{pattern!r:.80} repeats too much, so that matching it could take for ever"
    return None


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
    """What a wrap did: wrapped layers, and layers that were asked for but skipped, each with the reason.

    `plain` are the wrapped layers outside of the MLP blocks of `experts.form: block`: one LoRA each, not routed.
    `notes` say what else is worth knowing, such as what of an imported LoRA was left out.
    """

    wrapped: list[str] = field(default_factory=list)
    plain: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    decisions: int = 0
    trainable: int = 0
    total: int = 0

    def __str__(self) -> str:
        lines = [
            f"molora: {len(self.wrapped)} layers routed, {self.decisions} decisions per forward, "
            f"{self.trainable:,} of {self.total:,} parameters trainable"
        ]
        if self.plain:
            leaves = sorted({path.rpartition(".")[2] for path in self.plain})
            lines.append(f"  one LoRA each, not routed: {len(self.plain)} layers outside of MLPs ({', '.join(leaves)})")
        lines += [f"  skipped {path}: {reason}" for path, reason in self.skipped.items()]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)
