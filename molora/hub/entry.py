"""Entry: one version of one adapter as the library knows it, from its card, its config and its header."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..compat.registration import MOLORA
from ..errors import LoadError
from ..files import CONFIG, WEIGHTS, TensorInfo, read_config, read_header
from .card import AdapterCard, read_card
from .names import Ref

KINDS = {"LORA": "lora", MOLORA: "mixture"}
_LORA_A = re.compile(r"\.lora_A\.(?:[^.]+\.)?weight$")


@dataclass(frozen=True)
class Entry:
    """One version of one adapter.

    Attributes:
        name, version: which one.
        folder: where it is.
        card: what is known about it; an empty card when it is damaged.
        kind: `lora`, `mixture` (of molora), or PEFT's own word for another type in small letters.
        rank: the largest rank of a LoRA, or the number of experts of a mixture.
        parameters: how many numbers it holds.
        bytes: of its weights file.
        problems: what keeps it from being used; empty when it was readable. `verify` looks deeper.
        aliases: its other names.
    """

    name: str
    version: int
    folder: Path
    card: AdapterCard = field(default_factory=AdapterCard)
    kind: str = ""
    rank: int | None = None
    parameters: int = 0
    bytes: int = 0
    problems: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()

    @property
    def ref(self) -> Ref:
        """Its name with the version."""
        return Ref(self.name, self.version)

    @property
    def digest(self) -> str:
        """sha256 over its files, without the card."""
        return self.card.digest

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for programs."""
        plain = {key: value for key, value in asdict(self).items() if key not in ("card", "folder")}
        plain |= {"ref": str(self.ref), "folder": str(self.folder), "digest": self.digest}
        return plain | {"problems": list(self.problems), "aliases": list(self.aliases), "card": self.card.to_dict()}


def read_entry(ref: Ref, folder: Path) -> Entry:
    """Look at the folder of a version, without reading a tensor; never raises for what is in it."""
    problems: list[str] = []
    card, config, tensors = AdapterCard(), {}, {}
    try:
        card = read_card(folder)
    except LoadError as error:
        problems.append(str(error))
    try:
        config = read_config(_own(folder / CONFIG))
    except LoadError as error:
        problems.append(str(error))
    try:
        tensors = read_header(_own(folder / WEIGHTS))
    except LoadError as error:
        problems.append(str(error))
    kind = config.get("peft_type")
    size = (folder / WEIGHTS).stat().st_size if tensors else 0
    return Entry(
        ref.name,
        int(ref.version or 0),
        folder,
        card,
        KINDS.get(kind, kind.lower()) if isinstance(kind, str) else "",
        _rank(config, tensors),
        sum(math.prod(tensor.shape) for tensor in tensors.values()),
        size,
        tuple(problems),
    )


def newest(entries: list[Entry]) -> list[Entry]:
    """Return the newest version of each adapter, from entries in order."""
    return list({entry.name: entry for entry in entries}.values())


def _own(path: Path) -> Path:
    if path.is_symlink():
        raise LoadError(f"{path.name} is a link; an adapter holds its files itself")
    return path


def _rank(config: dict[str, Any], tensors: dict[str, TensorInfo]) -> int | None:
    """Return the largest rank of a LoRA's tensors, or how many experts a mixture has."""
    if config.get("peft_type") == MOLORA:
        experts = config.get("experts")
        number = experts.get("num") if isinstance(experts, dict) else None
        return number if isinstance(number, int) else None
    ranks = [t.shape[0] for name, t in tensors.items() if _LORA_A.search(name) and len(t.shape) == 2]
    return max(ranks, default=None)
