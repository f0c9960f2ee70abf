"""Who is called what, in which slot, and for how long: the bookkeeping of experts that change while requests run.

A table says which slot each name stands for; it never changes. A change of experts writes into a slot that no table in
use knows, and then puts a new table in place of the current one, in one step. A request takes a lease on the table
that is current when it starts, and keeps to it until it ends, so that it sees the experts of one moment only. The
slots of an older table are free once nobody holds a lease on it.

No torch here, and no thread waits with the lock held.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ..errors import ConfigError


class Table:
    """Which slot each expert is in.

    Attributes:
        names: name -> slot; never changed.
        users: how many leases there are on it.
    """

    def __init__(self, names: Mapping[str, int]) -> None:
        self.names = dict(names)
        self.slots = frozenset(self.names.values())
        self.users = 0


class Lease:
    """The right to read the slots of one table until `release`, which may be called more than once."""

    def __init__(self, leases: Leases, table: Table) -> None:
        self.table = table
        self._leases = leases
        self._held = True

    def release(self) -> None:
        """Give it back; callable from anywhere, also from the garbage collection."""
        with self._leases.changed:
            if self._held:
                self._held = False
                self.table.users -= 1
                self._leases.changed.notify_all()


class Leases:
    """The tables of one mixture.

    Args:
        slots: how many slots there are.
        names: name -> slot at the start.
    """

    def __init__(self, slots: int, names: Mapping[str, int]) -> None:
        self.slots = slots
        self.table = Table(names)
        # Its lock can be taken twice by one thread: a garbage collection may release a lease at any point.
        self.changed = threading.Condition(threading.RLock())
        self._old: list[Table] = []
        self._draining = 0

    def acquire(self) -> Lease:
        """Return a lease on the current table; waits while a slot is being written in place."""
        with self.changed:
            while self._draining:
                self.changed.wait()
            self.table.users += 1
            return Lease(self, self.table)

    def free(self) -> list[int]:
        """Return the slots that no table in use knows."""
        with self.changed:
            self._old = [table for table in self._old if table.users]
            busy = set(self.table.slots).union(*(table.slots for table in self._old))
            return [slot for slot in range(self.slots) if slot not in busy]

    def take(self, timeout: float) -> int:
        """Return a free slot, waiting for requests that still read an old table.

        Raises:
            ConfigError: none became free in time, or all slots are taken by experts of the current table.
        """
        deadline = time.monotonic() + timeout
        with self.changed:
            while not (free := self.free()):
                left = deadline - time.monotonic()
                if len(self.table.slots) == self.slots:
                    raise ConfigError(
                        f"all {self.slots} slots are taken by experts; remove one first, or compose the mixture with "
                        f"more of them (slots={self.slots + 1})"
                    )
                if left <= 0:
                    raise ConfigError(self._too_long(timeout, sum(table.users for table in self._old)))
                self.changed.wait(left)
            return free[0]

    @contextmanager
    def drained(self, slot: int, timeout: float) -> Iterator[None]:
        """Wait until no request reads a slot, and let none begin inside the block.

        Raises:
            ConfigError: requests went on reading it for too long.
        """
        deadline = time.monotonic() + timeout
        with self.changed:
            self._draining += 1
        try:
            with self.changed:
                while users := sum(t.users for t in (self.table, *self._old) if slot in t.slots):
                    left = deadline - time.monotonic()
                    if left <= 0:
                        raise ConfigError(self._too_long(timeout, users))
                    self.changed.wait(left)
            yield
        finally:
            with self.changed:
                self._draining -= 1
                self.changed.notify_all()

    def flip(self, names: Mapping[str, int]) -> None:
        """Make another table the current one, for all requests that begin from now on."""
        with self.changed:
            self._old.append(self.table)
            self.table = Table(names)
            self.changed.notify_all()

    def _too_long(self, timeout: float, users: int) -> str:
        return (
            f"after {timeout:g} seconds {users} request{'s' if users != 1 else ''} still use the experts of before (a "
            "key-value cache that is kept counts as one); nothing was changed: let them end, wait longer (timeout=), "
            f"or compose the mixture with more slots (slots={self.slots + 1})"
        )
