"""Cached: what routers decided and saw of the tokens that are in key-value caches."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from ..errors import RoutingError
from .passes import Pass
from .shapes import picked, picked_rows
from .types import Routing


class Cached:
    """Per-prompt decisions and memories of routers, each with the cache that its forward filled.

    They belong to the cache, so that interleaved generations never exchange them, and go when it goes.
    """

    def __init__(self) -> None:
        self._kept: weakref.WeakKeyDictionary[Any, dict[str, Routing]] = weakref.WeakKeyDictionary()
        self._past: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()

    def __len__(self) -> int:
        """Return how many caches have decisions of their own."""
        return len(self._kept)

    def keep(self, cache: Any, now: Pass) -> None:
        """Keep what a forward decided per prompt, and what its routers remember, with the cache that continues it."""
        if now.per_prompt and not now.continuing:
            self._kept[cache] = {group: now.decisions[group] for group in now.per_prompt}
        if now.memory.past:
            self._past[cache] = now.memory.past

    def decisions(self, cache: Any) -> dict[str, Routing]:
        """Return the per-prompt decisions that were taken with `cache`; raise RoutingError when there are none."""
        if cache in self._kept:
            return dict(self._kept[cache])
        raise RoutingError(
            "this forward continues a key-value cache whose prefill this model did not route (a copied or foreign "
            "cache), so its per-prompt decision is unknown; run the prompt again, or pin the gates with "
            "molora.pin(model, gates)"
        )

    def past(self, cache: Any) -> dict[str, Any]:
        """Return what routers remember of the tokens in `cache`; raise RoutingError when the cache is foreign."""
        if cache in self._past:
            return dict(self._past[cache])
        raise RoutingError(
            "this forward continues a key-value cache whose earlier tokens this model's routers have not seen (a "
            "copied or foreign cache), and they need them; run the prompt again, or pin the gates with "
            "molora.pin(model, gates)"
        )

    def reorder(self, cache: Any, rows: Tensor | None) -> None:
        """Follow a cache whose rows were picked anew (beams, or a served batch that some rows have left) in what
        routers remember, None: forget all of it, and in the per-prompt decisions that belong to it."""
        if rows is not None and cache in self._kept:
            self._kept[cache] = {group: picked(kept, rows) for group, kept in self._kept[cache].items()}
        past = self._past.get(cache)
        if past is not None and rows is None:
            del self._past[cache]
        elif past is not None:
            self._past[cache] = {name: picked_rows(value, rows) for name, value in past.items()}
