"""BodyLimit: refuses request bodies that are too large, also those that do not say how large they are."""

from __future__ import annotations

from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from ..request import ServeError


class BodyLimit:
    """ASGI middleware that answers 413 once a body is larger than `limit` bytes; nothing more of it is read."""

    def __init__(self, app: Any, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on while its body is small enough."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        stated = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if stated.isdigit() and int(stated) > self.limit:
            await self._refuse(scope, receive, send)
            return
        read = 0

        async def counted() -> Any:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.limit:
                raise HTTPException(413, self._text)  # FastAPI lets no other error of reading through
            return message

        await self.app(scope, counted, send)

    @property
    def _text(self) -> str:
        return f"the body is larger than {self.limit} bytes"

    async def _refuse(self, scope: Any, receive: Any, send: Any) -> None:
        error = ServeError(self._text, 413, "body_too_large")
        await JSONResponse(error.body(), status_code=413, headers={"Connection": "close"})(scope, receive, send)
