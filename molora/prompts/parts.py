"""Parts: what a selector has learned for sets of allowed adapters, within a bound of memory.

Tenants differ in what they may use, so a server of thousands of them has thousands of sets, and to fit one takes
between some ten milliseconds and half a second. What was learned is small, but for the examples, which a fitted method
or guard can make again at once (`rest`). So where memory runs out, those that were not asked for longest rest first,
and are forgotten only then.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from .gathered import bytes_of
from .guard import Guard
from .scoring import Method

MOST_BYTES = 256 << 20  # of all parts
MOST_PARTS = 10_000


@dataclass(frozen=True)
class Fitted:
    """A method and a guard for one set of adapters."""

    names: tuple[str, ...]
    method: Method
    guard: Guard | None
    digest: str

    def rest(self) -> None:
        """Give up what can be made again at once."""
        self.method.rest()
        if self.guard is not None:
            self.guard.rest()


class Parts:
    """What was fitted, by set of adapters; any thread may call any method.

    Args:
        groups: the examples of all adapters, which parts share and do not pay for.
        most_bytes, most_parts: what all parts may take, and how many there may be; the one that was used last is kept
            whatever it takes.
    """

    def __init__(
        self, groups: Sequence[Tensor] = (), most_bytes: int | None = None, most_parts: int | None = None
    ) -> None:
        self.groups = tuple(groups)
        self.most_bytes = MOST_BYTES if most_bytes is None else most_bytes
        self.most_parts = MOST_PARTS if most_parts is None else most_parts
        self.bytes = 0
        # the one that was not asked for longest first; what each takes, awake and at rest
        self._parts: OrderedDict[tuple[str, ...], tuple[Fitted, int, int]] = OrderedDict()
        self._awake: OrderedDict[tuple[str, ...], None] = OrderedDict()
        self._making: dict[tuple[str, ...], threading.Lock] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Return how many are kept."""
        return len(self._parts)

    def get(self, names: tuple[str, ...], make: Callable[[], Fitted]) -> Fitted:
        """Return the part of a set of adapters; who asks for one that is being made waits for it."""
        with self._lock:
            found = self._use(names)
            making = self._making.setdefault(names, threading.Lock()) if found is None else None
        if found is not None:
            return found
        assert making is not None
        with making:
            with self._lock:
                found = self._use(names)
            if found is not None:
                return found
            try:
                made = make()
                awake = bytes_of(made, self.groups)
                made.rest()  # what it takes then is known now; it wakes with its first question
                at_rest = bytes_of(made, self.groups)
                with self._lock:
                    if names not in self._parts:  # or another thread was first, after one that failed
                        self._parts[names] = made, max(awake, at_rest), at_rest
                        self.bytes += at_rest
                    self._use(names)
            finally:
                with self._lock:
                    self._making.pop(names, None)
        return made

    def _use(self, names: tuple[str, ...]) -> Fitted | None:
        """Note that a part is used, and make room for it; returns it, None when there is none."""
        if names not in self._parts:
            return None
        self._parts.move_to_end(names)
        part, awake, at_rest = self._parts[names]
        if names not in self._awake:
            self.bytes += awake - at_rest
        self._awake[names] = None
        self._awake.move_to_end(names)
        while self.bytes > self.most_bytes and len(self._awake) > 1:
            self._put_to_rest(next(iter(self._awake)))
        while (self.bytes > self.most_bytes or len(self._parts) > self.most_parts) and len(self._parts) > 1:
            oldest = next(iter(self._parts))
            self._put_to_rest(oldest)
            self.bytes -= self._parts.pop(oldest)[2]
        return part

    def _put_to_rest(self, names: tuple[str, ...]) -> None:
        if names in self._awake:
            del self._awake[names]
            part, awake, at_rest = self._parts[names]
            part.rest()
            self.bytes -= awake - at_rest
