"""create_app: a Service as an ASGI application."""

from __future__ import annotations

import logging
import math
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from anyio import CapacityLimiter
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from ..request import ServeError
from ..service import Service
from . import adapters, embeddings, metrics, openai, page, tenancy
from .limits import BodyLimit

logger = logging.getLogger("molora.serve")
WAITERS = 64  # requests that wait for the model in a thread: embeddings, and prompts that a selector reads


def create_app(
    service: Service,
    *,
    drain: float = 30.0,
    max_body: int = 8 << 20,
    docs: bool = True,
    close: bool = True,
    open_metrics: bool = False,
) -> FastAPI:
    """Return the application of a server.

    Args:
        service: what it serves.
        drain: seconds that running answers get to end when the server is told to stop.
        max_body: bytes of the largest request body.
        docs: whether /docs and /openapi.json exist.
        close: whether the service ends with the application.
        open_metrics: whether /metrics needs no admin key where there are tenants.
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
    app.state.open_metrics = open_metrics
    app.state.waiters = CapacityLimiter(WAITERS)
    app.state.meter = metrics.Meter(service)
    app.add_middleware(BodyLimit, limit=max_body)
    app.add_middleware(metrics.Watch, meter=app.state.meter)
    for router in (openai.router, embeddings.router, adapters.router, tenancy.router, metrics.router, page.router):
        app.include_router(router)
    handle_errors(app)
    app.openapi = lambda: _described(app)  # type: ignore[method-assign]
    return app


def handle_errors(app: FastAPI) -> None:
    """Let an application answer every error in OpenAI's shape."""
    app.add_exception_handler(ServeError, _served)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _failed)


def _described(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI description, with the errors that there are in place of FastAPI's own."""
    if app.openapi_schema is None:
        told = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        for path in told["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)  # such requests are answered 400, as by OpenAI
                for status, told_of in operation["responses"].items():
                    if status >= "400":  # errors are JSON, whatever the answer would be
                        told_of["content"] = {"application/json": next(iter(told_of["content"].values()))}
        for name in ("HTTPValidationError", "ValidationError"):
            told["components"]["schemas"].pop(name, None)
        app.openapi_schema = told
    return app.openapi_schema


def answer(error: ServeError) -> JSONResponse:
    """Return an error as the OpenAI API writes it."""
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    body = error.body()
    # a request may hold what no text can, half of a pair of surrogates, and an error repeats it
    body["error"]["message"] = error.message.encode(errors="backslashreplace").decode()
    return JSONResponse(body, status_code=error.status, headers=headers)


async def _served(request: Request, error: Any) -> JSONResponse:
    return answer(error)


async def _invalid(request: Request, error: Any) -> JSONResponse:
    problems = []
    for one in error.errors()[:8]:
        where = ".".join(str(part) for part in one["loc"] if part not in ("body", "query", "path"))
        where = where.encode(errors="backslashreplace").decode()[:200]
        problems.append((where, f"{where}: {one['msg']}" if where else one["msg"]))
    text = "; ".join(text for _, text in problems)
    return answer(ServeError(f"the request is not valid: {text}", param=problems[0][0] or None))


async def _http(request: Request, error: Any) -> JSONResponse:
    code = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}.get(error.status_code, "http_error")
    found = answer(ServeError(f"{request.method} {request.url.path}: {error.detail}", error.status_code, code))
    found.headers.update(error.headers or {})
    return found


async def _failed(request: Request, error: Any) -> JSONResponse:
    name = uuid.uuid4().hex[:12]
    logger.error("request %s to %s failed", name, request.url.path, exc_info=error)
    return answer(ServeError(f"the server failed; its log names this as {name}", 500, "internal_error"))
