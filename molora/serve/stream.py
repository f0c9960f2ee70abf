"""Stream: the answer to one request on its way from the engine's thread to its reader."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial

from .request import Chunk, Request


class Stream:
    """The chunks of one answer, for one reader: a thread (`for`) or an asyncio task (`async for`).

    Args:
        request: what was asked.
        cancel: called once when the reader gives up.
    """

    def __init__(self, request: Request, cancel: Callable[[str], None]) -> None:
        self.request = request
        self.submitted = time.monotonic()
        self.started: float | None = None  # when the engine began with it
        self.first_token: float | None = None
        self.finished: float | None = None
        self._cancel = cancel
        self._chunks: deque[Chunk] = deque()
        self._arrived = threading.Condition()
        self._wake: Callable[[], None] | None = None  # of an asyncio reader that waits
        self._is_whole = False  # whether it waits for the last chunk alone

    # --- the engine's side --------------------------------------------------------------------------------------

    def put(self, chunk: Chunk) -> None:
        """Add a chunk; those after the last one are dropped."""
        with self._arrived:
            if self.finished is not None:
                return
            now = time.monotonic()
            if chunk.tokens and self.first_token is None:
                self.first_token = now
            if chunk.finish is not None:
                self.finished = now
            self._chunks.append(chunk)
            wake = None
            if chunk.finish is not None or not self._is_whole:
                wake, self._wake = self._wake, None
            self._arrived.notify_all()
        if wake is not None:
            wake()

    # --- the reader's side --------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """Stop generating; the last chunk says `cancelled`."""
        self._cancel(self.request.id)

    def __iter__(self) -> Iterator[Chunk]:
        """Yield chunks until the last one; leaving early cancels the request."""
        done = False
        try:
            while not done:
                with self._arrived:
                    while not self._chunks:
                        self._arrived.wait()
                    chunk = self._chunks.popleft()
                done = chunk.finish is not None
                yield chunk
        finally:
            if not done:
                self.cancel()

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        """Yield chunks until the last one; leaving early, as when a client disconnects, cancels the request."""
        loop, done = asyncio.get_running_loop(), False
        try:
            while not done:
                with self._arrived:
                    chunk = self._chunks.popleft() if self._chunks else None
                    if chunk is None:
                        ready = asyncio.Event()
                        self._wake = partial(_set, loop, ready)
                if chunk is None:
                    await ready.wait()
                    continue
                done = chunk.finish is not None
                yield chunk
        finally:
            if not done:
                self.cancel()

    async def chunks(self) -> list[Chunk]:
        """Wait for the last chunk and return all of them; cheaper than `async for`, which wakes for every token.

        When it is cancelled, so is the request.
        """
        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        try:
            with self._arrived:
                self._is_whole, self._wake = True, partial(_set, loop, ready)
                waits = self.finished is None
            if waits:
                await ready.wait()
        except BaseException:
            self.cancel()
            raise
        with self._arrived:
            found = list(self._chunks)
            self._chunks.clear()
        return found

    def result(self) -> tuple[str, Chunk]:
        """Wait for the whole answer; return its text and the last chunk.

        Raises:
            ServeError: generating it failed.
        """
        parts = []
        for chunk in self:
            parts.append(chunk.text)
        if chunk.error is not None:
            raise chunk.error
        return "".join(parts), chunk


def _set(loop: asyncio.AbstractEventLoop, ready: asyncio.Event) -> None:
    with contextlib.suppress(RuntimeError):  # the reader's loop is closed, so nobody reads
        loop.call_soon_threadsafe(ready.set)
