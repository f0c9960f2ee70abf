"""Gathered: the examples of several adapters as one matrix, made when asked for; and what a thing holds in memory.

A selector keeps what it has learned for many sets of adapters. The examples of a set are a copy of those of its
adapters, by far the largest part of it, and the one that is made again at once: so it is given up first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class Gathered:
    """Examples of several adapters, one below the other.

    Args:
        groups: one tensor (n, D) per adapter; they are kept, not copied.
    """

    def __init__(self, groups: Sequence[Tensor]) -> None:
        self.groups = tuple(groups)
        self._rows: Tensor | None = None

    def __len__(self) -> int:
        """Return the number of examples."""
        return sum(map(len, self.groups))

    def rows(self) -> Tensor:
        """Return all of them, (N, D); kept until `rest`."""
        rows = self._rows  # another thread may let it go meanwhile
        if rows is None:
            rows = self._rows = self.groups[0] if len(self.groups) == 1 else torch.cat(self.groups)
        return rows

    def rest(self) -> None:
        """Give up the matrix until it is asked for again."""
        self._rows = None


def bytes_of(thing: Any, shared: Collection[Tensor] = ()) -> int:
    """Return the bytes of all tensors that a thing holds, each storage once, but for those of `shared`."""
    seen = {tensor.untyped_storage().data_ptr() for tensor in shared}
    known: set[int] = set()

    def count(one: Any) -> int:
        if isinstance(one, Tensor):
            storage = one.untyped_storage()
            if storage.data_ptr() in seen:
                return 0
            seen.add(storage.data_ptr())
            return storage.nbytes()
        if id(one) in known or isinstance(one, (str, bytes, int, float, type(None), type)):
            return 0
        known.add(id(one))
        if isinstance(one, Mapping):
            return sum(map(count, one.values()))
        if isinstance(one, (list, tuple, set, frozenset)):
            return sum(map(count, one))
        if dataclasses.is_dataclass(one):
            return sum(count(getattr(one, each.name)) for each in dataclasses.fields(one))
        return sum(map(count, vars(one).values())) if hasattr(one, "__dict__") else 0

    return count(thing)
