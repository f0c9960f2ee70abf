"""RemoteEngine: stands for an engine, and sends each request to the replica that has its adapters."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, RayServeException

from ..engine.encode import Encoded
from ..engine.fair import Share
from ..engine.programs import Decision
from ..engine.stats import Stats
from ..request import Base, Chunk, Program, Request, Sampling, ServeError, Usage
from ..stream import Stream
from .affinity import set_of
from .fleet import Fleet

logger = logging.getLogger("molora.serve")
ACCEPT = 30.0  # seconds in which a replica must take a request
GRACE = 30.0  # seconds after its time limit in which a request must have ended, or its replica counts as lost


class RemoteSelector:
    """Stands for a selector of `auto`, which the replicas have."""

    def __init__(self, name: str, handle: Any) -> None:
        self.name, self._handle = name, handle

    def select(self, prompts: Sequence[str], allowed: Collection[str]) -> list[Any]:
        """Return a choice for each prompt; see `PromptSelector.select`."""
        return called(self._handle.select, self.name, list(prompts), list(allowed))


class RemoteEngine:
    """What `Service` needs of an Engine, done by replicas.

    Args:
        handle: of the engine deployment.
        fleet: what the replicas tell.
        facts: of a replica; see `EngineReplica.facts`.
    """

    def __init__(self, handle: Any, fleet: Fleet, facts: Mapping[str, Any]) -> None:
        self._handle, self._fleet = handle, fleet
        self.is_pair, self.longest = bool(facts["is_pair"]), int(facts["longest"])
        self.vocabulary, self.max_length = int(facts["vocabulary"]), int(facts["max_length"])
        self.timeout = float(facts["timeout"])
        self.selectors: dict[str, Any] = {name: RemoteSelector(name, handle) for name in facts["selectors"]}
        self.report: list[str] = list(facts["report"])
        self._open: dict[str, asyncio.Task[None]] = {}
        self._draining, self._idle = False, threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="molora-remote", daemon=True)
        self._thread.start()

    # --- requests -------------------------------------------------------------------------------------------------

    def submit(
        self,
        request: Request,
        when_done: Callable[[Stream, Chunk], None] | None = None,
        watcher: Callable[[Decision], None] | None = None,
    ) -> Stream:
        """Send a request to a replica, and wait until it has taken it; see `Engine.submit`.

        Raises:
            ServeError: as of `Engine.submit`; 503 when no replica takes it.
        """
        self.check_open(request.tenant)
        stream = Stream(request, self.cancel)
        taken: Future[None] = Future()
        asyncio.run_coroutine_threadsafe(self._run(stream, taken, when_done, watcher), self._loop)
        try:
            taken.result(ACCEPT)
        except FutureTimeout:
            self.cancel(request.id)
            # it may have been taken this very moment; then it ends as cancelled, and counts as such
            raise ServeError(
                f"no replica took this request in {ACCEPT:g} s; try again", 503, "no_replica", retry_after=5.0
            ) from None
        return stream

    def cancel(self, id: str) -> None:
        """End a request; unknown ones are ignored."""

        def end() -> None:
            task = self._open.get(id)
            if task is not None:
                task.cancel()

        with contextlib.suppress(RuntimeError):  # the loop is closed, and everything with it
            self._loop.call_soon_threadsafe(end)

    async def _run(self, stream: Stream, taken: Future[None], when_done: Any, watcher: Any) -> None:
        """Read what the replica sends; ends with exactly one last chunk, or with `taken` failed."""
        request, seen = stream.request, 0
        task = asyncio.current_task()
        assert task is not None
        self._open[request.id] = task
        last: Chunk | None = None
        handle = self._handle.options(stream=True, multiplexed_model_id=set_of(request.program))
        answer = handle.generate.remote(request, watcher is not None)
        limit = self.timeout if request.timeout is None else min(request.timeout, self.timeout)
        try:
            async with _until(stream.submitted + limit + GRACE):
                async for kind, told in answer:
                    if kind == "chunk":
                        chunk, is_begun = told
                        if is_begun and stream.started is None:
                            stream.started = time.monotonic()
                        seen += len(chunk.tokens)
                        if chunk.finish is None:
                            stream.put(chunk)
                        else:
                            last = chunk
                    elif kind == "decision":
                        watcher = _told(watcher, told)
                    elif kind == "accepted":
                        taken.set_result(None)
                    else:
                        taken.set_exception(told)
            if last is None and taken.done() and taken.exception() is None:
                last = Chunk(finish="error", error=lost())
        except asyncio.CancelledError:
            last = Chunk(finish="cancelled", usage=Usage(len(request.prompt_ids), seen))
        except Exception as error:
            last = Chunk(finish="error", error=error_of(error))
        finally:
            self._open.pop(request.id, None)
            if last is None or last.finish in ("cancelled", "error"):
                self._loop.run_in_executor(None, _cancel, answer)  # what still runs there, if anything does
            self._end(stream, taken, last, when_done)

    def _end(self, stream: Stream, taken: Future[None], last: Chunk | None, when_done: Any) -> None:
        if not taken.done():  # it never began, so whoever submits is told
            error = None if last is None else last.error
            taken.set_exception(error or ServeError("the request was cancelled", 499, "cancelled"))
        elif last is not None:
            stream.put(last)
            if when_done is not None:
                try:
                    when_done(stream, last)
                except Exception:
                    logger.exception("the end of request %s could not be told", stream.request.id)
        with self._idle:
            self._idle.notify_all()

    def embed(
        self,
        prompts: Sequence[Sequence[int]],
        program: Program = Base(),  # noqa: B008  frozen
        **options: Any,
    ) -> Encoded:
        """Return vectors of prompts, and wait for them; see `Engine.embed`."""
        self.check_open(options.get("tenant"))
        handle = self._handle.options(multiplexed_model_id=set_of(program))
        return called(handle.embed, [list(one) for one in prompts], program, options, limit=self.timeout + GRACE)

    def check_open(self, tenant: str | None = None) -> None:
        """Raise ServeError when no request would be taken now; whose queue is full is known to the replicas alone."""
        if self._draining:
            raise ServeError("this server is going down; ask another one", 503, "draining", retry_after=1.0)

    def answer_limit(self, prompt: int, sampling: Sampling) -> int:
        """Return how many tokens the answer to a prompt of so many tokens can have at most."""
        room = max(0, self.longest if self.is_pair else self.longest - prompt)
        return room if sampling.max_tokens is None else min(sampling.max_tokens, room)

    # --- life -----------------------------------------------------------------------------------------------------

    def stats(self) -> Stats:
        """Return the numbers of all replicas, as of the last round of the fleet."""
        return self._fleet.stats(self._draining)

    def shares(self) -> dict[str, Share]:
        """Return what each tenant got from all replicas so far."""
        return self._fleet.shares()

    def drain(self, timeout: float = 30.0) -> bool:
        """Take no more requests, and let those that are there end; see `Engine.drain`."""
        self._draining = True
        with self._idle:
            is_done = self._idle.wait_for(lambda: not self._open, timeout)
        for id in list(self._open):
            self.cancel(id)
        with self._idle:
            self._idle.wait_for(lambda: not self._open, 5.0)
        return is_done

    def close(self) -> None:
        """Stop; what is there is cancelled."""
        if not self._loop.is_closed() and self._thread.is_alive():
            self.drain(0.0)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(5.0)


def _told(watcher: Any, decision: Decision) -> Any:
    """Tell a watcher; returns it, or None once it has failed, so that it cannot harm the answer."""
    try:
        if watcher is not None:
            watcher(decision)
        return watcher
    except Exception:
        logger.exception("a watcher of routing decisions failed; it is told no more")
        return None


@contextlib.asynccontextmanager
async def _until(end: float) -> Any:
    """Cancel what is inside at a time, as an error that is told from a cancellation by others."""
    task, is_late = asyncio.current_task(), False
    assert task is not None

    def late() -> None:
        nonlocal is_late
        is_late = True
        task.cancel()

    timer = asyncio.get_running_loop().call_later(max(0.0, end - time.monotonic()), late)
    try:
        yield
    except asyncio.CancelledError:
        if is_late:
            raise lost() from None
        raise
    finally:
        timer.cancel()


def called(method: Any, *args: Any, limit: float = 60.0) -> Any:
    """Call a method of a replica and wait; raise the ServeError that it returns or that its loss means."""
    try:
        answer = method.remote(*args).result(timeout_s=limit)
    except Exception as error:
        raise error_of(error) from error
    if isinstance(answer, Exception):
        raise answer
    return answer


def error_of(error: BaseException) -> ServeError:
    """Return what a caller is told of an error on the way to a replica."""
    cause = getattr(error, "cause", None)
    if isinstance(error, ServeError) and not isinstance(error, RayError):
        return error
    if isinstance(cause, ServeError):
        return cause
    if isinstance(error, BackPressureError):
        return ServeError("the queues of all replicas are full; try again", 429, "queue_full", retry_after=1.0)
    if isinstance(error, (RayActorError, RayServeException)):
        return lost()
    if isinstance(error, TimeoutError):
        return ServeError("no replica answered in time; try again", 504, "timeout", retry_after=1.0)
    logger.error("a replica failed: %s", error)
    return ServeError(
        f"a replica failed on this request ({type(cause or error).__name__}); its log says more",
        status=500,
        code="engine_error",
    )


def lost() -> ServeError:
    """Return what the requests of a replica that is gone end with."""
    return ServeError(
        "the replica that ran this request was lost; nothing was charged, send it again",
        status=503,
        code="replica_lost",
        retry_after=1.0,
    )


def _cancel(answer: Any) -> None:
    with contextlib.suppress(Exception):  # it has ended, or there is nobody who could end it
        answer.cancel()
