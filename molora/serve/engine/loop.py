"""Loop: the engine's thread. Turn by turn it lets requests in and out, and has the backends run one forward each."""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from ..backends.base import Backend
from ..request import Chunk, Finish, ServeError, needs
from .admission import check_queue
from .encode import Encoder, Encoding
from .entrance import Entrance, Item, failed, run_into, throw
from .fair import Scheduler
from .jobs import Job
from .stats import Counts, Stats, ended_by, snapshot

logger = logging.getLogger("molora.serve")
LOOK = 0.1  # seconds after which a thread with waiting requests looks again, although nobody told it of a change


class Loop:
    """Runs what is pushed, until it is closed.

    Args:
        store: lends adapters; None without any.
        scheduler: whose turn it is.
        backends: run jobs; each job has one of them.
        encoder: runs Encodings.
        share_prefixes: see `Engine`.
    """

    def __init__(
        self,
        store: Any,
        scheduler: Scheduler[Any],
        backends: Sequence[Backend],
        encoder: Encoder,
        share_prefixes: bool = False,
    ) -> None:
        self.store, self.scheduler, self.backends = store, scheduler, list(backends)
        self._lock = threading.Condition()
        # under the lock:
        self._jobs: dict[str, Job] = {}  # that wait or run
        self._cancelled: list[Job] = []
        self._deadlines: list[tuple[float, int, Job]] = []
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._pushed = self._untold = 0  # requests so far; of those that have ended, who was not told yet
        self._encoding = 0  # Encodings that have no result yet
        self._changed = self._draining = self._closing = False
        self._dead: BaseException | None = None
        # of the thread alone:
        self._counts = Counts()
        self._entrance = Entrance(store, scheduler, encoder, self._counts, self._refuse, share_prefixes)
        self._running = self._entrance.running
        self._thread = threading.Thread(target=self._run, name="molora-engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        if self.store is not None:
            self.store.on_change = self._thaw
        self._thread.start()

    # --- from any thread ------------------------------------------------------------------------------------------

    def check_open(self, max_waiting: int, tenant: str | None = None) -> None:
        """Raise ServeError when nothing can be queued, by this tenant or, for None, by anybody."""
        if self._dead is not None:
            raise ServeError("the engine has failed; the server must be restarted", status=503, code="engine_failed")
        if self._draining or self._closing:
            raise ServeError("the server is going down; ask another one", status=503, code="draining", retry_after=5)
        check_queue(self.scheduler, max(1, max_waiting), tenant)

    def push(self, item: Item, tenant: str, weight: float, tokens: int, max_waiting: int) -> None:
        """Queue an item."""
        with self._lock:
            self.check_open(max_waiting, tenant)
            if isinstance(item, Job) and item.id in self._jobs:
                raise ServeError(f"request '{item.id}' is there already; choose another id", 409, "duplicate_id")
            self.scheduler.push(tenant, weight, item, tokens)  # first: it may refuse
            if isinstance(item, Job):
                self._jobs[item.id] = item
                self._pushed += 1
                if len(self._deadlines) > 2 * len(self._jobs) + 64:  # most of those have long ended
                    self._deadlines = [one for one in self._deadlines if self._jobs.get(one[2].id) is one[2]]
                    heapq.heapify(self._deadlines)
                if item.deadline is not None:
                    heapq.heappush(self._deadlines, (item.deadline, self._pushed, item))
            else:
                self._encoding += 1
                item.result.add_done_callback(self._encoded)
            self._tell()

    def _encoded(self, result: Future[Any]) -> None:
        with self._lock:
            self._encoding -= 1
            self._lock.notify_all()

    def cancel(self, id: str) -> None:
        """End a job before the next forward."""
        with self._lock:
            job = self._jobs.get(id)
            if job is not None:
                self._cancelled.append(job)
                self._tell()

    def forget(self, item: Encoding) -> None:
        """Take an encoding out whose result nobody waits for any more."""
        if item.result.cancel():
            self._counts.end("timeout")
        else:  # it is being read: no further than this forward
            item.failure = ServeError("nobody waits for it any more", 504, "timeout")
        self.scheduler.remove(item)

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Run a function on the thread between two forwards."""
        future: Future[Any] = Future()
        with self._lock:
            if self._dead is not None or self._closing:
                raise ServeError("the engine does not run", status=503, code="engine_failed")
            self._calls.append((function, future))
            self._tell()
        return future

    def drain(self, timeout: float) -> bool:
        """Take nothing new; wait for what is there, and cancel what takes longer."""
        with self._lock:
            self._draining = True
            done = self._lock.wait_for(lambda: self._is_idle() or self._dead is not None, timeout)
            self._cancelled.extend(self._jobs.values())
            self._tell()
            self._lock.wait_for(lambda: not (self._jobs or self._untold) or self._dead is not None, 10.0)
        return done

    def close(self) -> None:
        """Stop the thread, and cancel what is there."""
        with self._lock:
            self._closing = True
            self._tell()
        if self._thread.is_alive():
            self._thread.join()

    def stats(self) -> Stats:
        """Return what was done and is being done."""
        healthy, draining = self._thread.is_alive() and self._dead is None, self._draining or self._closing
        return snapshot(healthy, draining, len(self._running), self._counts, self.scheduler, self.backends)

    def _tell(self) -> None:
        self._changed = True
        self._lock.notify_all()

    def _thaw(self) -> None:
        """Hear from the store that something changed; called on its threads, and on this one when leases end."""
        self._entrance.thaw()
        if threading.current_thread() is not self._thread:
            with self._lock:
                self._tell()

    def _is_idle(self) -> bool:
        return not (self._jobs or self._untold or self._encoding)

    # --- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._wait():
                self._turn()
        except BaseException as error:
            logger.critical("the engine's thread has failed", exc_info=True)
            self._dead = error
        failed = None
        if self._dead is not None:
            failed = ServeError("the engine has failed; the server must be restarted", 503, "engine_failed")
        self._end_all(failed)
        if self.store is not None and self.store.on_change == self._thaw:
            self.store.on_change = None
        for backend in self.backends:
            backend.close()

    def _wait(self) -> bool:
        """Wait until there is something to do; False when it was closed."""
        with self._lock:
            while not (self._closing or self._changed or self._running or self._entrance.reading):
                waits = len(self.scheduler) > 0
                due = self._deadlines[0][0] - time.monotonic() if self._deadlines else None
                limit = min(LOOK, due or LOOK) if waits else due and min(due, threading.TIMEOUT_MAX)
                if due is not None and due <= 0:
                    break
                if not self._lock.wait(limit) and waits:
                    break
            return not self._closing

    def _turn(self) -> None:
        with self._lock:
            changed, self._changed = self._changed, False
            calls = [self._calls.popleft() for _ in range(len(self._calls))]
        for function, future in calls:
            run_into(future, function)
        with self._lock:
            cancelled, self._cancelled = self._cancelled, []
        for job in cancelled:
            self._end(job, "cancelled")
        self._expire()
        if self.store is not None:
            self.store.between_steps()
            if changed:
                self.store.want([name for item in self.scheduler for name in needs(item.program)])
        self._entrance.admit()
        for backend in self.backends:
            self._step(backend)
        self._counts.kv_used = sum(backend.used() for backend in self.backends)
        self._counts.cpu = time.thread_time()
        if not self._running and self._is_idle():
            with self._lock:
                self._lock.notify_all()  # drain() waits for it

    def _step(self, backend: Backend) -> None:
        """Run one forward, and hand out what was drawn."""
        jobs = [job for job in self._running.values() if job.backend is backend]
        if not jobs:
            return
        try:
            events = backend.step()
        except Exception as error:
            logger.exception("a forward of %d requests failed", len(jobs))
            for job in jobs:
                self._end(job, "error", failed(error))
            return
        self._counts.step(jobs)
        drawn: Counter[str] = Counter()
        for event in events:
            job = event.job
            if event.error is not None or event.token is None:
                self._end(job, "error", event.error)
                continue
            try:
                chunk = job.feed(event.token)
            except Exception as error:  # a tokenizer that cannot decode this answer
                logger.exception("a token of request %s could not be taken", job.id)
                self._end(job, "error", failed(error))
                continue
            drawn[job.request.tenant] += 1
            self._counts.drew(job)
            if chunk.finish is None:
                job.tell(chunk)
            elif self._free(job, chunk.finish):
                self._tell_last(job, chunk)
        for tenant, tokens in drawn.items():
            self.scheduler.charge(tenant, output=tokens)

    def _expire(self) -> None:
        """End the jobs whose time is up."""
        now, late = time.monotonic(), []
        with self._lock:
            while self._deadlines and self._deadlines[0][0] <= now:
                late.append(heapq.heappop(self._deadlines)[2])
        for job in late:
            if self._jobs.get(job.id) is job:
                took = now - job.stream.submitted
                self._end(job, "timeout", ServeError(f"not finished after {took:.1f} s", 504, "timeout"))

    def _end(self, job: Job, finish: Finish, error: ServeError | None = None) -> None:
        """End a job before its last token."""
        if self._free(job, finish):
            self._tell_last(job, job.end(finish, error))

    def _tell_last(self, job: Job, chunk: Chunk) -> None:
        job.tell(chunk)
        with self._lock:
            self._untold -= 1
            self._lock.notify_all()

    def _refuse(self, job: Job, error: Exception) -> None:
        """End a job that could not start."""
        self._end(job, "error", error if isinstance(error, ServeError) else failed(error))

    def _free(self, job: Job, finish: Finish) -> bool:
        """Free all that a job holds; False when that was done before."""
        self.scheduler.remove(job)
        if self._running.pop(job.id, None) is not None:
            job.backend.cancel(job)
        self._entrance.give_back(job)
        with self._lock:
            known = self._jobs.get(job.id) is job
            if known:
                del self._jobs[job.id]
                self._untold += 1
                self._counts.tokens_cached += job.cached  # a backend may find more of it after the start
                self._counts.end(finish)
            self._changed = True
            self._lock.notify_all()
        return known

    def _end_all(self, error: ServeError | None) -> None:
        """End everything, since the thread ends."""
        with self._lock:
            self._closing = True
            jobs, calls = list(self._jobs.values()), list(self._calls)
        for job in jobs:
            try:
                self._end(job, "cancelled" if error is None else "error", error)
            except Exception:
                logger.exception("request %s could not be ended in order", job.id)
        gone = error or ServeError("the server is going down", status=503, code="draining")
        self._entrance.stop_reading(gone)
        for item in list(self.scheduler):
            if self.scheduler.remove(item) and isinstance(item, Encoding):
                self._entrance.give_back(item)
                if not item.result.cancelled():
                    self._counts.end(ended_by(gone))
                run_into(item.result, lambda: throw(gone))
        for _, future in calls:
            run_into(future, lambda: throw(gone))
