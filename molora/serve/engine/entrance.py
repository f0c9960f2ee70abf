"""Entrance: lets what waits into the batch, in the order of the scheduler, with its adapters in hand."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

from ..request import Mixture, ServeError, needs
from .encode import Encoder, Encoding
from .fair import Scheduler
from .jobs import Job, private, salt_of
from .stats import Counts, ended_by

logger = logging.getLogger("molora.serve")

Item = Job | Encoding


class Entrance:
    """Belongs to the engine's thread, except for `thaw`.

    Args:
        store: lends adapters; None without any.
        scheduler: whose turn it is.
        encoder: runs Encodings.
        counts: of the engine.
        refuse: ends a job that cannot start.
        share_prefixes: whether requests of different tenants may find each other's prompts in the cache.

    Attributes:
        running: jobs that were started, by id.
        reading: the encoding that is being read, and its forwards to come.
    """

    def __init__(
        self,
        store: Any,
        scheduler: Scheduler[Any],
        encoder: Encoder,
        counts: Counts,
        refuse: Callable[[Job, Exception], None],
        share_prefixes: bool = False,
    ) -> None:
        self._share_prefixes = share_prefixes
        self.store, self.scheduler, self.encoder, self.counts = store, scheduler, encoder, counts
        self.refuse = refuse
        self.running: dict[str, Job] = {}
        self.reading: tuple[Encoding, Iterator[Any]] | None = None
        self._held: set[Item] = set()  # wait for room with their leases in hand, since they are next on their backends
        self._full: set[Any] = set()  # backends that have no room for the next one, in this turn
        self._cold: set[tuple[str, ...]] = set()  # adapters that were not ready; forgotten when the store changes
        self._thawed = True

    def thaw(self) -> None:
        """Hear from the store that something changed, on any thread."""
        self._thawed = True

    def admit(self) -> None:
        """Start what may start now."""
        if self._thawed:
            self._thawed = False
            self._cold.clear()
        held, self._held = self._held, set()
        self._full.clear()
        if self.reading is not None:
            self._read_on()
        while len(self.scheduler):
            full = len(self._full)
            item = self.scheduler.pop(self._is_ready, self._fits)
            if item is None:
                if len(self._full) == full:
                    break
                continue  # one backend is full: another one may have room for those behind
            self._held.discard(item)
            if isinstance(item, Encoding):
                self._encode(item)
                break
            self._start(item)
        for item in held - self._held:
            if getattr(item, "id", None) not in self.running:
                self.give_back(item)

    def give_back(self, item: Item) -> None:
        """Return what an item has borrowed."""
        lease, item.lease = item.lease, None
        if lease is not None:
            lease.release()
        self._held.discard(item)

    def _is_ready(self, item: Item) -> bool:
        """Tell whether an item has its adapters, and take them; called by the scheduler for the next in line."""
        if item.backend in self._full or (isinstance(item, Encoding) and self.reading is not None):
            return False  # nobody overtakes the one that waits for room there, and one encoding is read at a time
        names = needs(item.program)
        if names and item.lease is None and item.failure is None:
            if names in self._cold:
                return False
            try:
                item.lease = self.store.lease(names)
            except ServeError as error:
                item.failure = error
                return True
            if item.lease is None:
                self._cold.add(names)
                return False
        if item.lease is not None:
            self._held.add(item)
        return True

    def _fits(self, item: Item) -> bool:
        if item.backend is None or item.failure is not None or item.backend.fits(item):
            return True
        self._full.add(item.backend)
        return False

    def _start(self, job: Job) -> None:
        try:
            if job.failure is not None:
                raise job.failure
            if job.lease is not None:
                check_lent(job)
                job.salt = salt_of(job.program, job.lease.digests)
            if not self._share_prefixes:
                job.salt = private(job.salt, job.request.tenant)
            job.backend.start(job)
        except Exception as error:
            if not isinstance(error, ServeError):
                logger.exception("request %s could not start", job.id)
            self.refuse(job, error)
            return
        self.running[job.id] = job
        job.stream.started = time.monotonic()
        self.counts.started += 1
        self.counts.tokens_in += len(job.prompt_ids)

    def _encode(self, item: Encoding) -> None:
        """Begin to read the prompts of an encoding, unless nobody waits for it any more."""
        if not item.result.set_running_or_notify_cancel():
            self.give_back(item)
            return
        if item.failure is None:
            self.counts.started += 1
            self.counts.tokens_in += sum(map(len, item.prompts))
        self.reading = item, self._steps(item)
        self._read_on()

    def _steps(self, item: Encoding) -> Iterator[Any]:
        if item.lease is not None:
            check_lent(item)
        yield from self.encoder.steps(item)

    def _read_on(self) -> None:
        """Run one forward of the encoding that is being read; running answers go on between two of them."""
        assert self.reading is not None
        (item, steps), began = self.reading, time.thread_time()
        try:
            if item.failure is not None:
                raise item.failure
            vectors = next(steps)
        except BaseException as error:
            is_known = isinstance(error, ServeError) or not isinstance(error, Exception)
            self.stop_reading(error if is_known else told_of(error))
            if not isinstance(error, Exception):
                raise
        else:
            if vectors is not None:
                self.reading = None
                self.give_back(item)
                self.counts.end("stop")
                item.result.set_result(vectors)
        self.counts.encoding += time.thread_time() - began

    def stop_reading(self, error: BaseException) -> None:
        """End the encoding that is being read, if any."""
        if self.reading is not None:
            (item, _), self.reading = self.reading, None
            self.give_back(item)
            self.counts.end(ended_by(error))
            item.result.set_exception(error)


def check_lent(item: Item) -> None:
    """Raise ServeError when a name means another kind of adapter now than when the request was checked.

    A mixture's mask over a bucket of slots would let the adapters of all tenants act, and a router that looks at other
    tokens would read those of other requests in a packed row.
    """
    assert item.lease is not None
    is_mixture = isinstance(item.program, Mixture)
    misplaced = [name for name, place in item.lease.rows.items() if (place[1] is None) != is_mixture]
    if misplaced or (item.backend is not None and item.backend.packs and not item.lease.packed):
        name = (misplaced or needs(item.program))[0]
        raise ServeError(
            f"'{name}' was replaced by another kind of adapter while this request waited; send it again",
            409,
            "adapter_replaced",
            "model",
        )


def run_into(future: Future[Any], function: Callable[[], Any]) -> None:
    """Put what a function returns or raises into a future, unless nobody waits for it."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as error:
        if not isinstance(error, ServeError):
            error = told_of(error)
        future.set_exception(error)
    except BaseException as error:
        future.set_exception(error)
        raise


def told_of(error: Exception) -> Exception:
    """Log an error that nobody foresaw, and return what the caller is told of it."""
    logger.error("what was to run on the engine's thread failed", exc_info=error)
    return error if isinstance(error, (TypeError, ValueError)) else failed(error)


def throw(error: Exception | None) -> None:
    """Raise an error, where a function is asked for."""
    assert error is not None
    raise error


def failed(error: Exception) -> ServeError:
    """Return what the caller is told of an error that nobody foresaw."""
    return ServeError(
        f"the model failed on this request ({type(error).__name__}); the log of the server says more",
        status=500,
        code="engine_error",
    )
