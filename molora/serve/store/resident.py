"""What a store knows of its adapters: Resident and Bucket inside, Residence and Counters for those who ask."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..request import ServeError
from .loading import Header, Loaded, Source
from .slots import Place


@dataclass(eq=False)
class Resident:
    """One registered adapter: one content under one name.

    Attributes:
        name: what requests call it.
        source: where it is read from.
        bucket: where it may be placed.
        number: unique among the residents of a store.
        loaded: its copy in CPU memory.
        digest: of its content, known after the first load.
        slot, place: where it is, or is being put; None when nowhere.
        ready: whether it is in its place, for requests to use.
        busy: whether a thread reads it or puts it into its place.
        users: how many leases it has.
        gone: whether it was unregistered, and only waits for its users.
        draining: whether it takes no new users, for another one that waited too long.
        error, failed: of the last load, and when; None when that went well.
        read_ms, place_ms: what its last load took.
        used, credit: when it was used last, and what it is worth to keep.
        missed: whether a request found it not ready since it was last lent.
        starved: since when it has waited for a place.
    """

    name: str
    source: Source
    bucket: str
    number: int
    loaded: Loaded | None = None
    digest: str | None = None
    slot: int | None = None
    place: Place | None = None
    ready: bool = False
    busy: bool = False
    users: int = 0
    gone: bool = False
    draining: bool = False
    error: ServeError | None = None
    failed: float = 0.0
    read_ms: float = 0.0
    place_ms: float = 0.0
    used: float = 0.0
    credit: float = 0.0
    missed: bool = False
    starved: float | None = None

    @property
    def header(self) -> Header:
        """What is known without loading it."""
        return self.source.header


@dataclass
class Bucket:
    """The places of one kind.

    Attributes:
        name: of the PEFT adapter whose slots they are; or `mixtures`.
        capacity: how many there are.
        taken: who is in each.
        clock: see the module.
        starving: for whom one of them is drained.
    """

    name: str
    capacity: int
    taken: dict[int, Resident] = field(default_factory=dict)
    clock: float = 0.0
    starving: Resident | None = None


@dataclass
class Counters:
    """What has happened so far. `loads - evictions - removals` adapters are in their places.

    Attributes:
        reads: from a source into CPU memory.
        loads: into a place.
        evictions: from a place, for another adapter.
        removals: from a place, because it was unregistered.
        drops: copies in CPU memory given up for others.
        failures: loads that failed.
        hits, misses: adapters that a request found ready, or not.
        read_seconds, place_seconds: that reading and placing have taken.
    """

    reads: int = 0
    loads: int = 0
    evictions: int = 0
    removals: int = 0
    drops: int = 0
    failures: int = 0
    hits: int = 0
    misses: int = 0
    read_seconds: float = 0.0
    place_seconds: float = 0.0


@dataclass(frozen=True)
class Residence:
    """Where an adapter is, for those who ask.

    Attributes:
        name: what requests call it.
        kind: `lora` or `mixture`.
        digest: of its content; None before the first load.
        rank: its largest rank; the number of experts of a mixture.
        bytes: of its tensors.
        state: `disk`, `queued` (to be read), `loading`, `warm` (in CPU memory), `ready` (requests can use it now), or
            `errored`.
        in_use: requests that use it.
        waiting: requests that wait for it.
        pinned: whether it stays in its place.
        last_load_ms: milliseconds of its last load; None before the first.
        error: why the last load failed.
        parent: name of the base model that it says it is for.
        packed: whether it can run where the tokens of requests are packed in one row.
    """

    name: str
    kind: str
    digest: str | None
    rank: int
    bytes: int
    state: str
    in_use: int
    waiting: int
    pinned: bool
    last_load_ms: float | None
    error: str | None
    parent: str
    packed: bool
