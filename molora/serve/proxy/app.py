"""create_route_app: a Proxy as an ASGI application with OpenAI's endpoints."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool

from ..http.app import handle_errors
from ..http.caller import Caller, Key
from ..http.limits import BodyLimit
from ..http.metrics import Watch
from ..http.pieces import gone, until_gone
from ..http.schemas import FeedbackBody
from ..request import ServeError
from ..tenants.tenant import Tenant, not_found
from .metrics import RouteMeter
from .plan import Plan
from .proxy import Proxy
from .stream import Passing
from .text import Kind
from .upstream import returned

router = APIRouter()
MAX_WHY = 300  # characters of a header
# bodies are the upstream server's, so they are not described beyond what the router reads
BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"type": "object", "required": ["model"]}}},
    }
}


def create_route_app(
    proxy: Proxy,
    *,
    timeout: float = 300.0,
    max_body: int = 8 << 20,
    docs: bool = True,
    close: bool = True,
    open_metrics: bool = False,
) -> FastAPI:
    """Return the application of a router.

    Args:
        proxy: decides, and knows the upstream server.
        timeout: seconds for a request.
        max_body: bytes of the largest request body.
        docs: whether /openapi.json exists.
        close: whether the proxy ends with the application.
        open_metrics: whether /metrics needs no admin key where there are tenants.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        if close:
            await proxy.close()

    app = FastAPI(
        title="molora route",
        version="1",
        summary="Picks the adapter by the prompt, for any OpenAI-compatible server.",
        lifespan=lifespan,
        openapi_url="/openapi.json" if docs else None,
        docs_url=None,  # FastAPI's pages load scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = proxy  # whose callers caller.py tells apart
    app.state.timeout, app.state.open_metrics = timeout, open_metrics
    app.state.meter = RouteMeter(proxy)
    app.add_middleware(BodyLimit, limit=max_body)
    app.add_middleware(Watch, meter=app.state.meter)
    app.include_router(router)
    handle_errors(app)
    return app


def _proxy(request: Request) -> Proxy:
    return request.app.state.service


Routed = Annotated[Proxy, Depends(_proxy)]


# --- answers ----------------------------------------------------------------------------------------------------------


@router.post("/v1/chat/completions", response_model=None, tags=["openai"], openapi_extra=BODY)
async def chat(request: Request, proxy: Routed, tenant: Caller) -> Response:
    """Forward a chat; with `model: auto` to the adapter that fits what its users say."""
    return await _forwarded(request, proxy, tenant, "chat", "chat/completions")


@router.post("/v1/completions", response_model=None, tags=["openai"], openapi_extra=BODY)
async def complete(request: Request, proxy: Routed, tenant: Caller) -> Response:
    """Forward a prompt; with `model: auto` to the adapter that fits it."""
    return await _forwarded(request, proxy, tenant, "completions", "completions")


@router.post("/v1/embeddings", response_model=None, tags=["openai"], openapi_extra=BODY)
async def embed(request: Request, proxy: Routed, tenant: Caller) -> Response:
    """Forward texts to embed; with `model: auto` with the adapter that fits them."""
    return await _forwarded(request, proxy, tenant, "embeddings", "embeddings")


async def _forwarded(request: Request, proxy: Proxy, tenant: Tenant, kind: Kind, path: str) -> Response:
    deadline = asyncio.get_running_loop().time() + request.app.state.timeout
    body, meter = _object(await request.body()), request.app.state.meter
    plan = await proxy.plan(tenant, body, kind, run_in_threadpool)
    is_handed_on = False
    try:
        with meter.forwarding():
            opened = proxy.upstream.open(path, plan.body, request.headers, deadline)
            response = await until_gone(request, opened)
            if response is None:
                return _left(proxy, plan)
            headers = {**returned(response), **_headers(plan)}
            if plan.streams and response.headers.get("content-type", "").startswith("text/event-stream"):
                is_handed_on = True
                return Passing(proxy, plan, response, deadline, headers, meter.failed)
            try:
                told = await until_gone(request, proxy.upstream.read(response, deadline))
            finally:
                await response.aclose()
        return _left(proxy, plan) if told is None else JSONResponse(_told(proxy, plan, told), headers=headers)
    except ServeError as error:
        if error.code in ("upstream_timeout", "upstream_closed"):  # it may have been at work all the time
            proxy.settle(plan, plan.read)
        raise _as_told(error, plan) from None
    finally:
        if not is_handed_on:
            proxy.settle(plan, None)  # where an answer came, that was settled by it


def _left(proxy: Proxy, plan: Plan) -> Response:
    """End a request whose client has left; the prompt may have been read, so it counts."""
    proxy.settle(plan, plan.read)
    return gone()


def _told(proxy: Proxy, plan: Plan, told: dict[str, Any]) -> dict[str, Any]:
    """Return a whole answer as the client gets it."""
    proxy.same(plan, told.get("id"))
    proxy.settle(plan, told.get("usage"), len(told.get("choices") or ()))
    if plan.model != plan.shown and told.get("model") == plan.model:
        told["model"] = plan.shown
    if plan.told:
        extra = told.get("molora")
        told["molora"] = {**(extra if isinstance(extra, dict) else {}), **plan.told}
    return told


def _as_told(error: ServeError, plan: Plan) -> ServeError:
    """Return an error as the caller may see it: an upstream server's 404 may list what others use."""
    if error.status != 404:
        return error
    if not plan.is_auto:
        return not_found(plan.shown)
    message = f"'{plan.shown}' was chosen, which the model server does not have"
    return ServeError(message, 502, "upstream_lacks_model")


def _headers(plan: Plan) -> dict[str, str]:
    headers = {"x-molora-response-id": plan.id}
    if plan.told:
        # header values are Latin-1, and names may be anything
        plain = (plan.shown, str(plan.told["why"])[:MAX_WHY])
        name, why = ("".join(c if c.isprintable() else " " for c in text) for text in plain)
        name, why = (text.encode("ascii", "backslashreplace").decode() for text in (name, why))
        abstained = "true" if plan.told["abstained"] else "false"
        headers |= {"x-molora-model": name, "x-molora-abstained": abstained, "x-molora-why": why}
    return headers


def _object(text: bytes) -> dict[str, Any]:
    """Return the JSON object of a body; raise ServeError for anything else."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        told = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ServeError(f"the request is no JSON: {error or type(error).__name__}") from None
    if not isinstance(told, dict):
        raise ServeError("the request must be a JSON object")
    return told


# --- models, feedback -------------------------------------------------------------------------------------------------


@router.get("/v1/models", tags=["openai"])
async def models(proxy: Routed, tenant: Caller) -> dict[str, Any]:
    """List what the caller may ask for: the upstream server's models, and `auto`."""
    return {"object": "list", "data": await proxy.listed(tenant)}


@router.get("/v1/models/{name:path}", tags=["openai"])
async def model(name: str, proxy: Routed, tenant: Caller) -> dict[str, Any]:
    """Describe one model; unknown and forbidden ones are told alike."""
    found = next((one for one in await proxy.listed(tenant) if one["id"] == name), None)
    if found is None:
        raise not_found(name)
    return found


@router.post("/v1/feedback", tags=["tenants"])
async def feedback(body: FeedbackBody, proxy: Routed, tenant: Caller) -> dict[str, Any]:
    """Tell how good one of the caller's answers was, by its id or by the header x-molora-response-id."""
    return await run_in_threadpool(proxy.take_feedback, tenant, body.response_id, body.reward)


# --- operation --------------------------------------------------------------------------------------------------------


@router.get("/metrics", response_class=Response, tags=["operation"])
def metrics(request: Request, proxy: Routed, key: Key) -> Response:
    """Return the metrics of this router for Prometheus; they name adapters, so an admin key is needed."""
    if not (request.app.state.open_metrics or proxy.is_admin(None if key is None else key.credentials)):
        raise ServeError(
            "metrics name adapters, so an admin key is needed; or start with open_metrics: true",
            status=401,
            code="invalid_api_key",
        )
    return Response(request.app.state.meter.text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/healthz", tags=["operation"])
async def health() -> Mapping[str, bool]:
    """Tell that the router runs."""
    return {"healthy": True}


@router.get("/readyz", tags=["operation"])
async def ready(proxy: Routed) -> JSONResponse:
    """Tell whether requests should be sent here: not while the upstream server cannot be reached."""
    try:
        await proxy.upstream.models()
    except ServeError as error:
        return JSONResponse({"ready": False, "upstream": error.code}, status_code=503)
    return JSONResponse({"ready": True, "upstream": "ok"})
