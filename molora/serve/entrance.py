"""Entrance: lets what waits into the batch, in the order of the scheduler, with its adapters in hand."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from .encode import Encoder, Encoding
from .fair import Scheduler
from .jobs import Job, salt_of
from .request import ServeError, needs
from .stats import Counts

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

    Attributes:
        running: jobs that were started, by id.
    """

    def __init__(
        self,
        store: Any,
        scheduler: Scheduler[Any],
        encoder: Encoder,
        counts: Counts,
        refuse: Callable[[Job, Exception], None],
    ) -> None:
        self.store, self.scheduler, self.encoder, self.counts = store, scheduler, encoder, counts
        self.refuse = refuse
        self.running: dict[str, Job] = {}
        self._held: Item | None = None  # waits for room with its lease in hand, since it is next
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
        held, self._held = self._held, None
        while len(self.scheduler) and (item := self.scheduler.pop(self._is_ready, self._fits)) is not None:
            if self._held is item:
                self._held = None
            if isinstance(item, Encoding):
                self._encode(item)
                break  # running answers go on between two of them
            self._start(item)
        if held is not None and held is not self._held and getattr(held, "id", None) not in self.running:
            self.give_back(held)

    def give_back(self, item: Item) -> None:
        """Return what an item has borrowed."""
        lease, item.lease = item.lease, None
        if lease is not None:
            lease.release()
        if self._held is item:
            self._held = None

    def _is_ready(self, item: Item) -> bool:
        """Tell whether an item has its adapters, and take them; called by the scheduler for the next in line."""
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
            self._held = item
        return True

    def _fits(self, item: Item) -> bool:
        return item.backend is None or item.failure is not None or item.backend.fits(item)

    def _start(self, job: Job) -> None:
        try:
            if job.failure is not None:
                raise job.failure
            if job.lease is not None:
                job.salt = salt_of(job.program, job.lease.digests)
            job.backend.start(job)
        except Exception as error:
            if not isinstance(error, ServeError):
                logger.exception("request %s could not start", job.id)
            self.refuse(job, error)
            return
        self.running[job.id] = job
        self.counts.started += 1
        self.counts.tokens_in += len(job.prompt_ids)
        self.counts.tokens_cached += job.cached

    def _encode(self, item: Encoding) -> None:
        began = time.thread_time()
        if item.failure is not None:
            run_into(item.result, lambda: throw(item.failure))
        else:
            self.counts.started += 1
            self.counts.tokens_in += sum(map(len, item.prompts))
            run_into(item.result, lambda: self.encoder(item))
        self.counts.encoding += time.thread_time() - began
        self.give_back(item)


def run_into(future: Future[Any], function: Callable[[], Any]) -> None:
    """Put what a function returns or raises into a future, unless nobody waits for it."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as error:
        if not isinstance(error, ServeError):
            logger.exception("what was to run on the engine's thread failed")
            error = failed(error) if not isinstance(error, (TypeError, ValueError)) else error
        future.set_exception(error)
    except BaseException as error:
        future.set_exception(error)
        raise


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
