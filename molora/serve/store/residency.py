"""Residency: which adapters are where and who uses them, and what becomes of it when one is lent, loaded or forgotten.

No torch, no threads and no waiting here: an adapter store calls these under its lock. What is loaded next, and what
goes for it, is decided in filling.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

from ..request import ServeError
from ..tenants.tenant import not_found
from .loading import MIXTURE, Loaded
from .resident import Bucket, Counters, Residence, Resident

ASKED = 10.0  # seconds after which what could not be lent, and was not asked for again, is not loaded any more


class Residency:
    """The adapters of one store.

    Args:
        buckets: name -> how many places.
        cpu_bytes: what copies in CPU memory may take together.
        remember_failure: seconds in which a failed load is not tried again.
        patience: seconds that the first in the order waits for places which others keep using.
        now: the clock.
    """

    def __init__(
        self,
        buckets: Mapping[str, int],
        cpu_bytes: int,
        remember_failure: float,
        patience: float,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.buckets = {name: Bucket(name, capacity) for name, capacity in buckets.items()}
        self.names: dict[str, Resident] = {}
        self.wanted: dict[Resident, int] = {}  # in order, with how many requests wait for each
        self.asked: dict[tuple[Resident, ...], float] = {}  # what could not be lent, and when that was asked last
        self._kinds: Mapping[str, str] | None = None  # made when it is asked for
        self.pins: set[Resident] = set()
        self.doomed: list[Resident] = []  # mixtures to be taken out of the model
        self.copies: dict[Resident, int] = {}  # bytes of those that are in CPU memory, or on their way there
        self.counters = Counters()
        self.cpu_bytes, self.remember_failure, self.patience, self.now = cpu_bytes, remember_failure, patience, now

    # --- who is registered --------------------------------------------------------------------------------------------

    def add(self, resident: Resident) -> None:
        """Register an adapter; one of the same name goes."""
        if resident.name in self.names:
            self.drop(resident.name)
        self.names[resident.name] = resident
        self._kinds = None

    def drop(self, name: str) -> Resident:
        """Unregister an adapter: its name means nothing at once, its place is free once nobody uses it."""
        resident = self.find(name)
        del self.names[name]
        self._kinds = None
        resident.gone = True
        self.pins.discard(resident)
        self.wanted.pop(resident, None)
        self.asked = {group: when for group, when in self.asked.items() if resident not in group}
        if not resident.busy:
            self.forget_copy(resident)
            if resident.ready and not resident.users:
                self._vacate(resident)
        return resident

    def find(self, name: str) -> Resident:
        """Return the adapter of a name; raise ServeError when there is none."""
        if name not in self.names:
            raise not_found(name)
        return self.names[name]

    def kinds(self) -> Mapping[str, str]:
        """Return the kind of each adapter by name; never changed, but made anew."""
        if self._kinds is None:
            self._kinds = MappingProxyType({name: one.header.kind for name, one in self.names.items()})
        return self._kinds

    def pin(self, name: str) -> None:
        """Keep an adapter in its place for good.

        Raises:
            ServeError: no such adapter, or its bucket would have no place left for others.
        """
        resident = self.find(name)
        bucket, pinned = self.buckets[resident.bucket], sum(one.bucket == resident.bucket for one in self.pins)
        if resident in self.pins:
            return
        if pinned + 1 >= bucket.capacity:
            raise ServeError(
                f"'{name}' cannot be pinned: {pinned} of the {bucket.capacity} places of '{bucket.name}' are "
                "pinned, and one must stay free for other adapters; unpin one, or serve with more slots",
                409,
                "pin_refused",
                "pinned",
            )
        self.pins.add(resident)

    def told(self, resident: Resident) -> Residence:
        """Describe an adapter."""
        header, waiting = resident.header, self.wanted.get(resident, 0)
        waiting = max(waiting, sum(resident in group for group in self.asked))
        if resident.ready or resident.busy:
            state = "ready" if resident.ready else "loading"
        elif resident.error is not None:
            state = "errored"
        elif resident.loaded is not None:
            state = "warm"
        else:
            state = "queued" if waiting or resident in self.pins else "disk"
        return Residence(
            name=resident.name,
            kind=header.kind,
            digest=resident.digest,
            rank=header.rank,
            bytes=header.bytes,
            state=state,
            in_use=resident.users,
            waiting=waiting,
            pinned=resident in self.pins,
            last_load_ms=resident.read_ms + resident.place_ms if resident.digest else None,
            error=None if resident.error is None else resident.error.message,
            parent=header.parent,
            packed=header.packed,
        )

    def failing(self, resident: Resident) -> bool:
        """Whether its last load failed, and it is too early to try again."""
        return resident.error is not None and self.now() - resident.failed < self.remember_failure

    # --- what waits, and what runs ------------------------------------------------------------------------------------

    def want(self, names: Iterable[str]) -> bool:
        """Take over what waits, the soonest first, the names of a request together; unknown ones count for nothing.

        Returns:
            Whether anything changed.
        """
        self.asked.clear()
        wanted: dict[Resident, int] = {}
        for name in names:
            resident = self.names.get(name)
            if resident is not None:
                wanted[resident] = wanted.get(resident, 0) + 1
        if list(wanted.items()) == list(self.wanted.items()):
            return False
        for resident in self.wanted.keys() - wanted.keys():
            resident.starved = None
        self.wanted = wanted
        return True

    def order(self) -> list[Resident]:
        """Return what should be in its place: what is pinned, what is wanted, what was asked for; the soonest first.

        The adapters of one request stand together, which is what keeps requests from waiting for each other.
        """
        pinned = sorted((one for one in self.pins if not one.ready), key=lambda one: one.number)
        since = self.now() - ASKED
        self.asked = {group: when for group, when in self.asked.items() if when > since}
        return list(dict.fromkeys([*pinned, *self.wanted, *(one for group in self.asked for one in group)]))

    def acquire(self, names: Sequence[str]) -> list[Resident] | None:
        """Lend all of these adapters, or none (None); what is missing is wanted from now on.

        Raises:
            ServeError: one is unknown or its load failed, or there are never places for all of them.
        """
        residents = [self.find(name) for name in dict.fromkeys(names)]
        self._check_capacity(residents)
        group = tuple(residents)
        for resident in residents:
            if (error := resident.error) is not None and self.failing(resident):
                self.wanted.pop(resident, None)
                self.asked.pop(group, None)
                raise ServeError(error.message, error.status, error.code, error.param)
        missing = [one for one in residents if not one.ready or self._is_draining(one)]
        if missing:
            for resident in missing:
                self.counters.misses, resident.missed = self.counters.misses + (not resident.missed), True
            if any(one not in self.wanted for one in residents):
                self.asked[group] = self.now()
            return None
        self.asked.pop(group, None)
        for resident in residents:
            self.counters.hits += not resident.missed
            resident.missed, resident.users = False, resident.users + 1
            self._touch(resident)
            left = self.wanted.pop(resident, 0) - 1
            if left > 0:
                self.wanted[resident] = left
        return residents

    def release(self, residents: Iterable[Resident]) -> None:
        """Take back what was lent."""
        for resident in residents:
            resident.users -= 1
            resident.used = self.now()
            if resident.gone and not resident.users:
                self._vacate(resident)

    def _check_capacity(self, residents: Sequence[Resident]) -> None:
        for bucket in {one.bucket: self.buckets[one.bucket] for one in residents}.values():
            need = sum(one.bucket == bucket.name for one in residents if one not in self.pins)
            pinned = sum(one.bucket == bucket.name for one in self.pins)
            if need > bucket.capacity - pinned:
                raise ServeError(
                    f"this needs {need} adapters in '{bucket.name}' at once, which has {bucket.capacity} places, "
                    f"{pinned} of them pinned; ask for fewer, or have it served with more slots",
                    400,
                    "too_many_adapters",
                    "model",
                )

    def _is_draining(self, resident: Resident) -> bool:
        starving = self.buckets[resident.bucket].starving
        if resident.draining and (starving is None or starving not in self.order() or self.failing(starving)):
            self.stop_draining(self.buckets[resident.bucket])
        return resident.draining

    # --- what was done ------------------------------------------------------------------------------------------------

    def read_done(self, resident: Resident, loaded: Loaded, seconds: float) -> None:
        """Take over what was read."""
        resident.busy, resident.read_ms, resident.used = False, 1e3 * seconds, self.now()
        self.counters.reads += 1
        self.counters.read_seconds += seconds
        if resident.gone:
            self.forget_copy(resident)
            return
        resident.loaded, resident.digest = loaded, loaded.digest
        self.copies[resident] = resident.header.bytes if loaded.nbytes else 0

    def place_done(self, resident: Resident, seconds: float) -> None:
        """Note that an adapter is in its place."""
        resident.busy, resident.ready, resident.starved = False, True, None
        resident.place_ms = 1e3 * seconds
        self.counters.loads += 1
        self.counters.place_seconds += seconds
        self._touch(resident)
        if resident.gone:
            self.forget_copy(resident)
            self._vacate(resident)

    def failed(self, resident: Resident, error: ServeError) -> None:
        """Note that reading or placing failed."""
        if resident.slot is not None:
            del self.buckets[resident.bucket].taken[resident.slot]
        resident.busy = resident.ready = False
        resident.slot = resident.place = resident.starved = None
        resident.error, resident.failed = error, self.now()
        self.forget_copy(resident)
        self.counters.failures += 1

    def taken_out(self, resident: Resident) -> None:
        """Note that a mixture that was unregistered is out of the model."""
        del self.buckets[resident.bucket].taken[int(resident.slot or 0)]
        resident.slot = resident.place = None

    def _vacate(self, resident: Resident) -> None:
        resident.ready = resident.draining = False
        self.counters.removals += 1
        if resident.header.kind == MIXTURE:
            self.doomed.append(resident)  # its place is taken until its modules are out
            return
        self.taken_out(resident)

    def evict(self, victim: Resident) -> int:
        """Take an adapter out of its place; returns the slot."""
        bucket, slot = self.buckets[victim.bucket], int(victim.slot or 0)
        bucket.clock = max(bucket.clock, victim.credit)
        victim.ready = victim.draining = False
        victim.slot = victim.place = None
        del bucket.taken[slot]
        self.counters.evictions += 1
        return slot

    def forget_copy(self, resident: Resident) -> None:
        """Drop the copy of an adapter in CPU memory."""
        resident.loaded = None
        self.copies.pop(resident, None)

    def stop_draining(self, bucket: Bucket) -> None:
        """Let all adapters of a bucket be lent again."""
        bucket.starving = None
        for resident in bucket.taken.values():
            resident.draining = False

    def _touch(self, resident: Resident) -> None:
        resident.used = self.now()
        cost = max(1.0, resident.read_ms + resident.place_ms)
        resident.credit = self.buckets[resident.bucket].clock + cost
