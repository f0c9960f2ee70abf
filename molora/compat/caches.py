"""The key-value and state-space caches of transformers: how many tokens they hold, and which rows are picked."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any


class _Followed:
    """A method of one cache that tells somebody which rows of it were picked."""

    def __init__(self, cache: Any, name: str, told: Callable[[Any, Any], None]) -> None:
        self.cache, self.name, self.told = weakref.ref(cache), name, told

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method of the class, then tell."""
        cache = self.cache()
        result = getattr(type(cache), self.name)(cache, *args, **kwargs)
        rows = next(iter((*args, *kwargs.values())), None) if self.name in _ROWS_PICKED else None
        self.told(cache, rows)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Leave a copied cache its own method."""
        copied = memo.get(id(self.cache()))
        return getattr(type(copied), self.name).__get__(copied)


# Methods of transformers' caches that pick rows (beam search), and those that change them in other ways.
_ROWS_PICKED = ("reorder_cache", "batch_select_indices")


_ROWS_CHANGED = ("crop", "batch_repeat_interleave", "reset")


def follow_rows(cache: Any, told: Callable[[Any, Any], None]) -> None:
    """Let `told(cache, rows)` know when a cache picks rows (beam search does, without a word to the model).

    `rows` is the tensor of picked rows, or None for any other change that is not a forward.
    """
    for name in (*_ROWS_PICKED, *_ROWS_CHANGED):
        if hasattr(type(cache), name) and name not in vars(cache):
            setattr(cache, name, _Followed(cache, name, told))


def tokens_in_cache(cache: Any) -> int:
    """Return how many tokens a key-value or state-space cache holds; 0 for none."""
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        try:
            return int(cache.get_seq_length())
        except (TypeError, ValueError, IndexError):  # caches of pure state-space models count no tokens
            pass
    previous = getattr(cache, "has_previous_state", False)
    return int(bool(previous() if callable(previous) else previous))
