"""Loaders: the threads of an adapter store that read adapters and put them into slots, beside the batch."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from ...errors import LoadError, MoloraError
from ..request import ServeError
from .filling import next_place, next_read
from .loading import put_in
from .residency import Residency
from .resident import Resident
from .slots import Slots

logger = logging.getLogger("molora.serve")


class Loaders:
    """Threads that do what the table asks for, in its order.

    Args:
        table: what is where; only touched with `changed` held.
        changed: notified whenever the table has changed.
        slots: where LoRAs go.
        readers: how many threads read.
        tell: called without the lock when something was loaded, or failed.
    """

    def __init__(
        self, table: Residency, changed: threading.Condition, slots: Slots, readers: int, tell: Callable[[], None]
    ) -> None:
        self._table, self._changed, self._slots, self._tell = table, changed, slots, tell
        self.closed = False
        # one more that never reads: a slow disk must not keep from its slot what is in memory
        loops = [self._read_all] * max(1, readers) + [self._place_all]
        self._threads = [
            threading.Thread(target=loop, name=f"molora-loader-{number}", daemon=True)
            for number, loop in enumerate(loops)
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def close(self, timeout: float) -> None:
        """Stop the threads; one that is inside of a slow read ends with it."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout)

    def place(self, resident: Resident) -> None:
        """Fill the place that an adapter was given; a mixture on the thread that runs the model."""
        start = time.perf_counter()
        loaded, place = resident.loaded, resident.place
        assert loaded is not None and place is not None
        try:
            if loaded.folder is None:
                self._slots.write(place, loaded.pairs, loaded.tensors)
            else:
                put_in(self._slots.model, loaded, place.adapter)
        except Exception as error:
            self._fail(resident, error)
        else:
            self._note(lambda: self._table.place_done(resident, time.perf_counter() - start))

    def _place_all(self) -> None:
        while (found := self._next(lambda: next_place(self._table, mixtures=False))) is not None:
            self.place(found[0])

    def _read_all(self) -> None:
        while (resident := self._next(lambda: next_read(self._table))) is not None:
            self._read(resident)

    def _read(self, resident: Resident) -> None:
        start = time.perf_counter()
        try:
            loaded = resident.source.load()
            if resident.digest not in (None, loaded.digest):
                raise LoadError("its files have changed since it was registered; register it again")
        except Exception as error:
            self._fail(resident, error)
        else:
            self._note(lambda: self._table.read_done(resident, loaded, time.perf_counter() - start))

    def _next(self, ask: Callable[[], Any]) -> Any:
        """Wait for work; None when the store is closed."""
        with self._changed:
            while not self.closed:
                found = ask()
                if found is not None:
                    return found
                # patience runs out without anybody's doing
                self._changed.wait(self._table.patience / 2 if self._table.order() else None)
        return None

    def _note(self, change: Callable[[], None]) -> None:
        with self._changed:
            change()
            self._changed.notify_all()
        self._tell()

    def _fail(self, resident: Resident, error: Exception) -> None:
        trusted = isinstance(error, MoloraError)
        reason = str(error) if trusted else f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}"
        if not trusted:
            logger.warning("adapter '%s' could not be loaded", resident.name, exc_info=error)
        told = ServeError(
            f"adapter '{resident.name}' could not be loaded: {reason}",
            400 if trusted else 424,
            "adapter_load_failed",
            "model",
        )
        self._note(lambda: self._table.failed(resident, told))
