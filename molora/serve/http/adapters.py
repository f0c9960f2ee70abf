"""/v1/adapters: what is loaded and where; load, unload, pin; and the bodies that vLLM's clients send for it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse, Response
from starlette.concurrency import run_in_threadpool

from ..request import ServeError
from .caller import Caller, Manager, Served
from .described import ADAPTER, ADAPTERS, ERRORS
from .schemas import LoadBody, PinBody, VllmLoadBody, VllmUnloadBody

router = APIRouter(prefix="/v1", tags=["adapters"])


@router.get("/adapters", responses={200: ADAPTERS, **ERRORS})
def adapters(service: Served, tenant: Caller) -> dict[str, Any]:
    """List the adapters and mixtures that the caller may use, with where they are and whether they are in use."""
    return {"object": "list", "data": [_told(entry, service.name) for entry in service.entries(tenant)]}


@router.post("/adapters", responses={200: ADAPTER, **ERRORS})
async def load(body: LoadBody, service: Served, tenant: Manager) -> dict[str, Any]:
    """Register an adapter of the library and begin to load it; the answer does not wait for that."""
    entry = await run_in_threadpool(service.load, tenant, body.name, body.as_, body.pin)
    return _told(entry, service.name)


@router.get("/adapters/{name:path}", responses={200: ADAPTER, **ERRORS})
def adapter(name: str, service: Served, tenant: Caller) -> dict[str, Any]:
    """Describe one adapter or mixture."""
    return _told(service.entry(tenant, name), service.name)


@router.patch("/adapters/{name:path}", responses={200: ADAPTER, **ERRORS})
async def pin(name: str, body: PinBody, service: Served, tenant: Manager) -> dict[str, Any]:
    """Keep an adapter in its slot, or let it be evicted again."""
    entry = await run_in_threadpool(service.pin, tenant, name, body.pinned)
    return _told(entry, service.name)


@router.delete("/adapters/{name:path}", status_code=204, response_class=Response, responses=ERRORS)
async def unload(name: str, service: Served, tenant: Manager) -> Response:
    """Forget an adapter: new requests do not find it, running ones end with it."""
    await run_in_threadpool(service.unload, tenant, name)
    return Response(status_code=204)


@router.post("/load_lora_adapter", response_class=PlainTextResponse, responses=ERRORS)
async def vllm_load(body: VllmLoadBody, service: Served, tenant: Manager) -> str:
    """Load an adapter as vLLM does; `lora_path` is the name of an adapter in the server's library, not a path."""
    if not body.load_inplace and any(entry.name == body.lora_name for entry in service.entries(tenant)):
        raise ServeError(
            f"the adapter '{body.lora_name}' is loaded already; unload it first, or send load_inplace: true",
            param="lora_name",
        )
    await run_in_threadpool(service.load, tenant, body.lora_path, body.lora_name, False)
    return f"Success: LoRA adapter '{body.lora_name}' added successfully."


@router.post("/unload_lora_adapter", response_class=PlainTextResponse, responses=ERRORS)
async def vllm_unload(body: VllmUnloadBody, service: Served, tenant: Manager) -> str:
    """Unload an adapter as vLLM does."""
    await run_in_threadpool(service.unload, tenant, body.lora_name)
    return f"Success: LoRA adapter '{body.lora_name}' removed successfully."


def _told(entry: Any, parent: str) -> dict[str, Any]:
    """Return what a client is told about an adapter."""
    names = "name kind digest rank bytes state in_use waiting pinned last_load_ms error packed".split()
    return {"object": "adapter", "parent": parent, **{name: getattr(entry, name) for name in names}}
