"""compare: how two adapters differ, in config, card and tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..errors import LoadError, raise_all
from ..files import WEIGHTS, Contents, TensorInfo, look
from .card import read_card

_NOTHING = "(not there)"


@dataclass(frozen=True)
class TensorChange:
    """One tensor that both adapters have, with other values.

    Attributes:
        name: of the tensor.
        largest: the largest absolute difference of two values.
        relative: norm of the difference over the larger norm of the two.
    """

    name: str
    largest: float
    relative: float


@dataclass(frozen=True)
class Difference:
    """How adapter `b` differs from adapter `a`.

    Attributes:
        a, b: what they are called.
        config, card: (value of a, value of b) by key, nested keys with dots.
        only_a, only_b: tensors that the other does not have.
        reshaped: (a, b) of tensors with another shape or dtype, as text, by name.
        changed: tensors with other values, the most changed first.
        equal: how many tensors are the same, bit by bit.
    """

    a: str
    b: str
    config: dict[str, tuple[Any, Any]]
    card: dict[str, tuple[Any, Any]]
    only_a: list[str]
    only_b: list[str]
    reshaped: dict[str, tuple[str, str]]
    changed: list[TensorChange]
    equal: int

    def __bool__(self) -> bool:
        """Whether there is any difference."""
        return bool(self.config or self.card or self.changes_weights)

    @property
    def changes_weights(self) -> bool:
        """Whether any tensor differs."""
        return bool(self.only_a or self.only_b or self.reshaped or self.changed)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for programs."""
        return asdict(self)


def compare(a: Path, b: Path, a_name: str | None = None, b_name: str | None = None) -> Difference:
    """Return how two adapter folders differ; tensors are read one pair at a time.

    Raises:
        LoadError: one of them is damaged.
    """
    ours, theirs = _looked(a), _looked(b)
    cards = []
    for folder in (a, b):
        try:
            card = read_card(folder).to_dict()
        except LoadError:  # a folder outside of a library has none
            card = {}
        cards.append({key: value for key, value in card.items() if key not in ("files", "embedding", "fingerprint")})
    both = sorted(ours.tensors.keys() & theirs.tensors.keys())
    reshaped = {
        name: (_shown(ours.tensors[name]), _shown(theirs.tensors[name]))
        for name in both
        if ours.tensors[name] != theirs.tensors[name]
    }
    changed, equal = [], 0
    with safe_open(a / WEIGHTS, framework="pt") as mine, safe_open(b / WEIGHTS, framework="pt") as other:
        for name in both:
            if name in reshaped:
                continue
            x, y = mine.get_tensor(name), other.get_tensor(name)
            if torch.equal(x, y):
                equal += 1
            else:
                changed.append(_change(name, x, y))
    return Difference(
        a_name or str(a),
        b_name or str(b),
        _pairs(ours.config or {}, theirs.config or {}),
        _pairs(*cards),
        sorted(ours.tensors.keys() - theirs.tensors.keys()),
        sorted(theirs.tensors.keys() - ours.tensors.keys()),
        reshaped,
        sorted(changed, key=lambda change: (-change.relative, change.name)),
        equal,
    )


def _change(name: str, x: torch.Tensor, y: torch.Tensor) -> TensorChange:
    x, y = x.double(), y.double()
    apart, size = x - y, max(float(x.norm()), float(y.norm()))
    return TensorChange(name, float(apart.abs().max()), float(apart.norm()) / size if size else 0.0)


def _looked(folder: Path) -> Contents:
    contents = look(folder)
    raise_all(contents.problems, LoadError, f"adapter '{folder}' is damaged")
    return contents


def _shown(tensor: TensorInfo) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _pairs(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return (value of a, value of b) of what differs, by key; lists are compared without an order of names."""
    ours, theirs = _flat(a), _flat(b)
    keys = [*ours, *(key for key in theirs if key not in ours)]
    return {
        key: (ours.get(key, _NOTHING), theirs.get(key, _NOTHING))
        for key in keys
        if _comparable(key, ours.get(key, _NOTHING)) != _comparable(key, theirs.get(key, _NOTHING))
    }


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        inner = isinstance(value, Mapping) and value and key != "fingerprint"
        flat.update(_flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value})
    return flat


def _comparable(key: str, value: Any) -> str:
    if isinstance(value, list) and key.rpartition(".")[2] in ("target_modules", "modules_to_save"):
        value = sorted(map(str, value))  # PEFT writes sets in any order
    return json.dumps(value, sort_keys=True, default=str)
