"""Pieces of several answers on their way to one client, and what happens when it leaves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response

from ..request import Base, Chunk, Mixture, ServeError, Weighted
from ..stream import Stream

T = TypeVar("T")


@dataclass(frozen=True)
class Piece:
    """A chunk of one of the answers.

    Attributes:
        index: of the answer.
        chunk: the chunk; its finish is one that OpenAI knows, or there is an error.
        offset: characters of the answer before it.
        stream: where it comes from.
    """

    index: int
    chunk: Chunk
    offset: int
    stream: Stream

    def chosen(self) -> dict[str, Any]:
        """Return which experts acted, and why, where a selector chose."""
        program = self.stream.request.program
        if isinstance(program, Weighted):
            acted: dict[str, Any] = {"adapters": dict(program.weights)}
        elif isinstance(program, Mixture):
            acted = {"mixture": program.name}
        else:
            acted = {"base": isinstance(program, Base)}
        return {**acted, **(dict(self.chunk.chosen) if self.chunk.chosen else {})}


async def _pieces(index: int, stream: Stream) -> AsyncIterator[Piece]:
    offset = 0
    async for chunk in stream:
        yield Piece(index, _told(chunk), offset, stream)
        offset += len(chunk.text)


def _told(chunk: Chunk) -> Chunk:
    """Return a chunk whose end a client knows; who cancelled an answer does not read it, so another one did."""
    if chunk.finish != "cancelled":
        return chunk
    error = ServeError("the server has ended this answer, since it is going down; ask again", 503, "draining")
    return replace(chunk, finish="error", error=error)


async def merged(streams: Sequence[Stream]) -> AsyncIterator[Piece]:
    """Yield the pieces of all answers as they come."""
    if len(streams) == 1:
        async for piece in _pieces(0, streams[0]):
            yield piece
        return
    queue: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()

    async def forward(index: int, stream: Stream) -> None:
        try:
            async for piece in _pieces(index, stream):
                queue.put_nowait(piece)
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(forward(index, stream)) for index, stream in enumerate(streams)]
    try:
        left = len(tasks)
        while left:
            piece = await queue.get()
            if isinstance(piece, BaseException):
                raise piece
            if piece is None:
                left -= 1
            else:
                yield piece
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def whole(streams: Sequence[Stream]) -> list[Piece]:
    """Return every answer as one piece; when this is cancelled, so are the answers."""

    async def one(index: int, stream: Stream) -> Piece:
        chunks = await stream.chunks()
        text = "".join(chunk.text for chunk in chunks)
        tokens = tuple(token for chunk in chunks for token in chunk.tokens)
        return Piece(index, replace(_told(chunks[-1]), text=text, tokens=tokens), 0, stream)

    return list(await asyncio.gather(*(one(index, stream) for index, stream in enumerate(streams))))


async def until_gone(request: Request, work: Awaitable[T]) -> T | None:
    """Return the result of some work; None when the client has left before, and the work was cancelled."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def gone() -> Response:
    """Return an answer that nobody reads; 499 is what proxies log for a client that has left."""
    return Response(status_code=499)
