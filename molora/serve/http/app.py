"""create_app: a Service as an ASGI application."""

from __future__ import annotations

import logging
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from ..request import ServeError
from ..service import Service
from . import adapters, metrics, openai, page, tenancy
from .limits import BodyLimit

logger = logging.getLogger("molora.serve")


def create_app(
    service: Service, *, drain: float = 30.0, max_body: int = 8 << 20, docs: bool = True, close: bool = True
) -> FastAPI:
    """Return the application of a server.

    Args:
        service: what it serves.
        drain: seconds that running answers get to end when the server is told to stop.
        max_body: bytes of the largest request body.
        docs: whether /docs and /openapi.json exist.
        close: whether the service ends with the application.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        if close:
            await run_in_threadpool(service.close, drain)

    app = FastAPI(
        title="molora",
        version="1",
        summary="One base model, many tenants, each with an adapter or a mixture of their own.",
        lifespan=lifespan,
        openapi_url="/openapi.json" if docs else None,
        docs_url=None,  # FastAPI's pages load scripts from elsewhere
        redoc_url=None,
        separate_input_output_schemas=False,
    )
    app.state.service = service
    app.state.meter = metrics.Meter(service)
    app.add_middleware(BodyLimit, limit=max_body)
    app.add_middleware(metrics.Watch, meter=app.state.meter)
    for router in (openai.router, adapters.router, tenancy.router, metrics.router, page.router):
        app.include_router(router)
    app.add_exception_handler(ServeError, _served)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _failed)
    return app


def answer(error: ServeError) -> JSONResponse:
    """Return an error as the OpenAI API writes it."""
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, round(error.retry_after + 0.5)))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


async def _served(request: Request, error: Any) -> JSONResponse:
    return answer(error)


async def _invalid(request: Request, error: Any) -> JSONResponse:
    problems = []
    for one in error.errors()[:8]:
        where = ".".join(str(part) for part in one["loc"] if part not in ("body", "query", "path"))
        problems.append((where, f"{where}: {one['msg']}" if where else one["msg"]))
    text = "; ".join(text for _, text in problems)
    return answer(ServeError(f"the request is not valid: {text}", param=problems[0][0] or None))


async def _http(request: Request, error: Any) -> JSONResponse:
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    found = answer(ServeError(f"{request.method} {request.url.path}: {error.detail}", error.status_code, code))
    found.headers.update(error.headers or {})
    return found


async def _failed(request: Request, error: Any) -> JSONResponse:
    name = uuid.uuid4().hex[:12]
    logger.error("request %s to %s failed", name, request.url.path, exc_info=error)
    return answer(ServeError(f"the server failed; its log names this as {name}", 500, "internal_error"))
