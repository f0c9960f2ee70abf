"""What an adapter store loads next, and which adapter goes for it.

Requests hold all that they need or nothing, and what waits is in one order, the soonest first, the adapters of one
request together. An adapter takes the place of another one only if nobody uses that, it is not pinned, and it is not
wanted sooner. So the first request in the order always gets its places once those that run have ended, whatever sets
the others want: nothing can deadlock.
Where those that run never end, because new ones begin with the same adapters, `patience` bounds the wait: one of
these adapters then takes no new requests until it was replaced.

Among those that may go, the one goes that is cheapest to have missed: credit = the clock of the bucket + the
milliseconds of its last load, renewed with each use; the clock is the credit of the last one that went (GreedyDual,
Young 1994). With equal costs that is the least recently used one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from .loading import MIXTURE
from .residency import Residency
from .resident import Bucket, Resident
from .slots import Place


def next_read(table: Residency) -> Resident | None:
    """Return the adapter that should be read next, with room for it; None when there is nothing to do."""
    order = table.order()
    position = {resident: index for index, resident in enumerate(order)}
    for index, resident in enumerate(order):
        if resident.busy or resident.ready or resident.loaded is not None or table.failing(resident):
            continue
        if not _make_room(table, resident, index, position):
            return None
        resident.busy, resident.error = True, None
        table.copies[resident] = resident.header.bytes
        return resident
    return None


def next_place(table: Residency, mixtures: bool) -> tuple[Resident, Place | None] | None:
    """Return the adapter that should be put into a place next, and which place is emptied for it, if any.

    Args:
        table: of the store.
        mixtures: a routed mixture (on the engine's thread), or a LoRA.
    """
    order = table.order()
    position = {resident: index for index, resident in enumerate(order)}
    full: set[str] = set()
    for index, resident in enumerate(order):
        if resident.busy or resident.ready or resident.loaded is None or resident.bucket in full:
            continue
        if (resident.header.kind == MIXTURE) != mixtures or table.failing(resident):
            continue
        bucket = table.buckets[resident.bucket]
        slot = next((slot for slot in range(bucket.capacity) if slot not in bucket.taken), None)
        others = [v for v in bucket.taken.values() if v.ready and position.get(v, math.inf) > index]
        idle = [v for v in others if not (v.users or v in table.pins or v.gone)]
        if slot is None and not idle:
            full.add(bucket.name)  # nor is there a place for those that are wanted later
            _wait_for(table, resident, bucket, [v for v in others if v.users and not (v in table.pins or v.gone)])
            continue
        victim = min(idle, key=lambda v: (v.credit, v.used, v.number)) if slot is None else None
        emptied = None if victim is None else victim.place
        slot = slot if victim is None else table.evict(victim)
        place = Place(f"routed_{resident.number}", None) if mixtures else Place(bucket.name, slot)
        resident.busy, resident.slot, resident.place = True, slot, place
        bucket.taken[int(slot or 0)] = resident
        if bucket.starving is resident:
            table.stop_draining(bucket)
        return resident, emptied
    return None


def _make_room(table: Residency, resident: Resident, index: int, position: Mapping[Resident, int]) -> bool:
    """Drop copies until there is room for one more, the least recently used first."""
    excess = sum(table.copies.values()) + resident.header.bytes - table.cpu_bytes
    if excess <= 0:
        return True
    spare = [v for v in table.copies if not v.busy and (v.ready or position.get(v, math.inf) > index)]
    if sum(table.copies[v] for v in spare) < excess:
        return False
    for victim in sorted(spare, key=lambda v: (v.used, v.number)):
        if excess > 0:
            excess -= table.copies[victim]
            table.forget_copy(victim)
            table.counters.drops += 1
    return True


def _wait_for(table: Residency, resident: Resident, bucket: Bucket, users: list[Resident]) -> None:
    """Note that there is no place for one, and drain another one after too long."""
    if resident.starved is None:
        resident.starved = table.now()
    is_late = table.now() - resident.starved >= table.patience
    if is_late and users and not any(v.draining for v in bucket.taken.values()):
        bucket.starving = resident
        min(users, key=lambda v: (v.users, v.used, v.number)).draining = True
