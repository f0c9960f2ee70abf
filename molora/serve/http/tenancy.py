"""/v1/feedback and /v1/tenants/{tenant}/routing: how good answers were, and how a tenant's requests were routed."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool

from .caller import Caller, Key, Served
from .schemas import FeedbackBody

router = APIRouter(prefix="/v1", tags=["tenants"])


@router.post("/feedback")
async def feedback(body: FeedbackBody, service: Served, tenant: Caller) -> dict[str, Any]:
    """Tell how good one of the caller's answers was; selectors may learn from it."""
    return await run_in_threadpool(service.take_feedback, tenant, body.response_id, body.reward)


@router.get("/tenants/{name}/routing")
async def routing(name: str, service: Served, key: Key) -> dict[str, Any]:
    """Report what a tenant's requests used: shares, entropy, abstentions, tokens. For itself, or for an admin."""
    return await run_in_threadpool(service.routing, None if key is None else key.credentials, name)
