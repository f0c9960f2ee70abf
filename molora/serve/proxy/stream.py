"""Passing: server-sent events on their way from the upstream server to a client.

Events pass as they are, but for three things: the last one of a choice tells what was chosen; a model is called what
the client calls it; and usage that only the tenant's account needs stays here. A stream that breaks off ends with an
error in it, never as if it were complete.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import StreamingResponse

from ..request import ServeError
from .plan import Plan
from .proxy import Proxy

QUIET = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")
DONE = b"[DONE]"


async def events(pieces: AsyncIterator[bytes], most: int) -> AsyncIterator[bytes]:
    """Yield whole events, without the empty line after them; what is left at the end is no event.

    Args:
        pieces: bytes as they come.
        most: bytes of an event.

    Raises:
        ServeError: an event is larger.
    """
    kept, looked = bytearray(), 0
    async for piece in pieces:
        kept += piece
        while (end := _END.search(kept, max(0, looked - 3))) is not None:
            yield bytes(kept[: end.start()])
            del kept[: end.end()]
            looked = 0
        looked = len(kept)
        if looked > most:
            raise ServeError("the model server cannot be understood", 502, "upstream_invalid")


def data_of(event: bytes) -> bytes | None:
    """Return the data of an event; None when it has none, as a comment that keeps the connection alive."""
    lines = [line[5:].removeprefix(b" ") for line in event.splitlines() if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None


class Passing(StreamingResponse):
    """A stream of the upstream server as an answer to the client; when the client leaves, the upstream request ends.

    Args:
        proxy: told of ids and usage.
        plan: of the request.
        response: of the upstream server, open.
        deadline: of the loop's clock.
        headers: of the answer.
        failed: told when it breaks off.
    """

    def __init__(
        self,
        proxy: Proxy,
        plan: Plan,
        response: Any,
        deadline: float,
        headers: dict[str, str],
        failed: Callable[[ServeError], None],
    ) -> None:
        super().__init__(self._events(), media_type="text/event-stream", headers={**QUIET, **headers})
        self._proxy, self._plan, self._response, self._deadline = proxy, plan, response, deadline
        self._usage: Any = None
        self._tell = failed
        self._counted, self._failed = 0, False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the events; whatever happens, let go of the upstream server and settle."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            read = {"prompt_tokens": self._plan.prompt}
            self._proxy.settle(self._plan, self._usage or read, self._counted)
            await self._response.aclose()

    async def _events(self) -> AsyncIterator[bytes]:
        upstream, done = self._proxy.upstream, False
        try:
            async for event in events(upstream.pieces(self._response, self._deadline), upstream.max_answer):
                data = data_of(event)
                done = done or data == DONE
                passed = event if data is None or data == DONE else self._passed(event, data)
                if passed is not None:
                    yield passed + b"\n\n"
            if not done and not self._failed:
                raise ServeError("the model server broke off its answer", 502, "upstream_closed")
        except ServeError as error:
            self._tell(error)
            yield b"data: " + json.dumps(error.body()).encode() + b"\n\n"

    def _passed(self, event: bytes, data: bytes) -> bytes | None:
        """Return what the client gets of an event; None for nothing."""
        try:
            told = json.loads(data)
        except (ValueError, RecursionError):
            raise ServeError("the model server cannot be understood", 502, "upstream_invalid") from None
        if not isinstance(told, dict):
            return event
        if "error" in told and not told.get("choices"):
            self._failed = True
            message, code, param = self._proxy.upstream.words(data)
            error = ServeError(message or "the model server failed", 502, code or "upstream_error", param)
            return b"data: " + json.dumps(error.body()).encode()
        if self._counted == 0:
            self._proxy.same(self._plan, told.get("id"))
        if isinstance(told.get("usage"), dict):
            self._usage = told["usage"]
            if self._plan.hides_usage and not told.get("choices"):
                return None
        return b"data: " + json.dumps(told, ensure_ascii=False).encode() if self._edited(told) else event

    def _edited(self, told: dict[str, Any]) -> bool:
        """Change an event in place; returns whether it was changed."""
        plan, changed = self._plan, False
        choices = [one for one in told.get("choices") or () if isinstance(one, dict)]
        self._counted += len(choices)
        if plan.hides_usage and told.get("usage") is not None:
            told["usage"], changed = None, True
        if plan.model != plan.shown and told.get("model") == plan.model:
            told["model"], changed = plan.shown, True
        if plan.told and any(one.get("finish_reason") for one in choices):
            extra = told.get("molora")
            told["molora"], changed = {**(extra if isinstance(extra, dict) else {}), **plan.told}, True
        return changed
