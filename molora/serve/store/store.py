"""AdapterStore: adapters by name, from disk over CPU memory into slots of the model, while requests run.

    store = AdapterStore(model, Hub("adapters_hub"), slots={8: 16, 64: 2})
    store.register("news")                    # by its header; nothing is loaded
    lease = store.lease(["news"])             # None while it is not ready: it is loaded now, beside the batch
    lease.rows["news"]                        # ('slots_8', 3): where its gate goes (molora/routing/rows.py)
    lease.release()

Threads read files and fill slots; one of them only fills, so that a slow disk never keeps from its slot what is in
memory. An engine calls `want` with all that waits, soonest first, tries `lease` for what it would like to start, and
calls `between_steps` on the thread that runs the model. Nothing here blocks it. Which adapter goes where is decided in
filling.py.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from ... import fingerprint
from ...compat.layers import linear_sizes
from ...errors import MoloraError
from ...hub.entry import Entry
from ...hub.limits import Limits
from ...hub.manifest import Manifest
from ...hub.store import Hub
from ..engine.jobs import salt_of
from ..request import Program, ServeError, needs
from . import mixtures as routed
from .catalogue import Change, Sources, reconcile
from .filling import next_place
from .lease import Lease
from .loaders import Loaders
from .loading import MIXTURE, Source
from .residency import Residency
from .resident import Residence, Resident
from .slots import Slots

logger = logging.getLogger("molora.serve")
MIXTURES = "mixtures"  # the bucket of routed mixtures
SLOTS = {8: 16, 16: 8}


class AdapterStore:
    """The adapters of one served model; all methods may be called from any thread, except `between_steps`.

    Args:
        model: a base model, or a PeftModel that molora made; see `Slots`.
        hub: the library that names are looked up in.
        slots: how many slots there are of each rank; or Slots of the model.
        cpu_bytes: what adapters may take in CPU memory, beside the slots.
        loaders: how many threads read adapters.
        mixtures: how many routed mixtures may be in the model at once.
        targets: the layers that adapters may use; see `Slots`.
        limits: what an adapter from disk may take.
        remember_failure: seconds in which a failed load is not tried again, and told to whoever wants it.
        patience: seconds that adapters wait for places which new requests keep using, before one takes no new ones.
        on_change: called, on any thread, when an adapter became ready, failed, or wants `between_steps`.

    Attributes:
        model: the PeftModel that serves.
        slots: its slots.
        sources: what turns names into adapters.
    """

    def __init__(
        self,
        model: nn.Module,
        hub: Hub | str | Path | None = None,
        slots: Mapping[int, int] | Slots = SLOTS,
        cpu_bytes: int = 1 << 30,
        loaders: int = 2,
        *,
        mixtures: int = 4,
        targets: str | Sequence[str] = "all-linear",
        limits: Limits | None = None,
        remember_failure: float = 30.0,
        patience: float = 2.0,
        on_change: Callable[[], None] | None = None,
    ) -> None:
        self.slots = slots if isinstance(slots, Slots) else Slots(model, slots, targets)
        self.model, self.on_change = self.slots.model, on_change
        library = hub if isinstance(hub, Hub) or hub is None else Hub(hub)
        base = fingerprint.of_model(self.model.get_base_model(), linear_sizes)[0]
        self.sources = Sources(library, self.slots, base, limits or Limits(), cpu_bytes)
        self._table = Residency({**self.slots.buckets, MIXTURES: mixtures}, cpu_bytes, remember_failure, patience)
        # its lock can be taken twice by one thread: a garbage collection may release a lease at any point
        self._changed = threading.Condition(threading.RLock())
        self._number = 0
        self._loaders = Loaders(self._table, self._changed, self.slots, loaders, self._tell)
        self._loaders.start()

    def close(self, timeout: float = 5.0) -> None:
        """Stop the threads; one that is inside of a slow read ends with it."""
        self._loaders.close(timeout)

    # --- what is there ------------------------------------------------------------------------------------------------

    def register(
        self, name: str, source: str | Path | Entry | tuple[Any, Any] | Source | None = None, *, pinned: bool = False
    ) -> Residence:
        """Make an adapter known under a name; its weights are read when they are wanted.

        One that has the name already goes as by `unregister`, unless it is the same one.

        Args:
            name: what requests call it.
            source: what the library calls it (`news`, `news@2`, an alias; by default the name), an Entry of it, a Path,
                (config, tensors) as PEFT saves them, or a Source. Texts are never paths where there is a library.
            pinned: see `pin`.

        Raises:
            ConfigError: there is no such adapter in the library, or the name cannot be one.
            LoadError: it is damaged as far as its header tells, or cannot be served; all problems at once.
            ServeError: it cannot be pinned; it is registered all the same.
        """
        found = self.sources.find(name, source)
        bucket = MIXTURES if found.header.kind == MIXTURE else self.slots.bucket_for(found.header.rank)
        with self._changed:
            before = self._table.names.get(name)
            pinned = pinned or before in self._table.pins
            if before is None or found.header.stamp is None or found.header.stamp != before.header.stamp:
                self._number += 1
                self._table.add(Resident(name, found, bucket, self._number))
            if pinned:
                self._table.pin(name)
            self._changed.notify_all()
            told = self._table.told(self._table.names[name])
        self._tell()
        return told

    def register_all(self) -> dict[str, str]:
        """Register the newest version of every adapter of the library; returns why some were refused, by name."""
        refused = {}
        for entry in self.sources.hub.list():
            try:
                self.register(entry.name, entry)
            except MoloraError as error:
                refused[entry.name] = str(error)
        return refused

    def unregister(self, name: str) -> None:
        """Forget an adapter: new requests do not find it (ServeError), running ones end with it."""
        with self._changed:
            self._table.drop(name)
            self._changed.notify_all()
        self._tell()

    def pin(self, name: str, pinned: bool = True) -> None:
        """Load an adapter and keep it in its place, or let it be evicted again.

        Raises:
            ServeError: no such adapter; or its bucket would have no place left for others.
        """
        with self._changed:
            if pinned:
                self._table.pin(name)
            else:
                self._table.pins.discard(self._table.find(name))
            self._changed.notify_all()

    def reconcile(self, manifest: Manifest | str | Path | Mapping[str, Any] | Iterable[str]) -> list[Change]:
        """Register, unregister and pin what a manifest says; one bad adapter keeps none of the others back.

        Returns:
            What was done, or could not be, adapter by adapter.

        Raises:
            ConfigError: the manifest cannot be read, or there is no library.
        """
        return reconcile(self, manifest)

    def entries(self) -> list[Residence]:
        """Return all adapters, with where they are, in the order in which they were registered."""
        with self._changed:
            return [self._table.told(one) for one in self._table.names.values()]

    def entry(self, name: str) -> Residence:
        """Return one adapter; raise ServeError when there is none."""
        with self._changed:
            return self._table.told(self._table.find(name))

    @property
    def names(self) -> frozenset[str]:
        """The names of all adapters."""
        return frozenset(self.kinds())

    def kinds(self) -> Mapping[str, str]:
        """Return `lora` or `mixture` for each name: cheap where `entries` is not, since every request asks."""
        with self._changed:
            return self._table.kinds()

    def stamp(self, name: str) -> str | None:
        """Return what tells the content of an adapter from others without reading it; None where nothing does."""
        with self._changed:
            found = self._table.names.get(name)
            return None if found is None else found.header.stamp

    def counters(self) -> dict[str, float]:
        """Return what has happened so far; see `resident.Counters`."""
        with self._changed:
            return asdict(self._table.counters)

    def digest(self, program: Program) -> bytes:
        """Return what keys and values of a program depend on, by what its names mean now; see `jobs.salt_of`.

        A lease has the digests of what was lent, which may be another content by now: `salt_of(program,
        lease.digests)`.

        Raises:
            ServeError: an adapter is unknown, or was never loaded, so that nobody knows its content.
        """
        with self._changed:
            digests = {name: self._table.find(name).digest for name in needs(program)}
        unknown = [name for name, digest in digests.items() if digest is None]
        if unknown:
            raise ServeError(f"'{unknown[0]}' was not loaded yet, so it has no digest", 409, "adapter_not_loaded")
        return salt_of(program, {name: digest or "" for name, digest in digests.items()})

    # --- for the engine -----------------------------------------------------------------------------------------------

    def want(self, names: Iterable[str]) -> None:
        """Say what all requests that wait will need, the soonest first, in place of what was said before.

        It is loaded in this order, and nothing goes for it that is in use, pinned, or wanted sooner. The adapters of
        one request must stand together. What `lease` could not lend is loaded as well, after all else.
        """
        with self._changed:
            is_new = self._table.want(names)
            if is_new:
                self._changed.notify_all()
        if is_new:
            self._tell()  # a mixture that is in memory waits for `between_steps` alone

    def lease(self, names: Sequence[str]) -> Lease | None:
        """Lend adapters to a request: all that it names, or None as long as one of them is not ready; never waits.

        Raises:
            ServeError: one is unknown (404), its load failed (400, 424), or there is never room for so many (400).
        """
        with self._changed:
            asked = set(self._table.asked)
            residents = self._table.acquire(names)
            is_new = not self._table.asked.keys() <= asked
            if is_new:
                self._changed.notify_all()
        if is_new:
            self._tell()
        return None if residents is None else Lease(residents, self._release)

    def between_steps(self) -> bool:
        """Put one routed mixture into the model, and those out that were unregistered; on the engine's thread.

        Returns:
            Whether anything was done, so that there may be more.
        """
        with self._changed:
            if not (self._table.doomed or MIXTURE in self._table.kinds().values()):
                return False
            doomed, self._table.doomed = self._table.doomed, []
        for resident in doomed:
            if resident.place is not None:
                routed.remove(self.model, resident.place.adapter)
            with self._changed:
                self._table.taken_out(resident)
        with self._changed:
            found = next_place(self._table, mixtures=True)
        if found is None:
            return bool(doomed)
        resident, emptied = found
        if emptied is not None:
            routed.remove(self.model, emptied.adapter)
        self._loaders.place(resident)
        return True

    # --- inside -------------------------------------------------------------------------------------------------------

    def _release(self, residents: list[Resident]) -> None:
        with self._changed:
            if not residents:
                return  # given back already
            self._table.release(residents)
            residents.clear()
            self._changed.notify_all()
        self._tell()

    def _tell(self) -> None:
        if self.on_change is not None and not self._loaders.closed:
            try:
                self.on_change()
            except Exception:  # a loader must go on, whoever listens
                logger.exception("the listener to changes of the adapter store failed")
