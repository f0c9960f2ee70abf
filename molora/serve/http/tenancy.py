"""/v1/feedback and /v1/tenants/{tenant}/...: how good answers were, and how a tenant's requests were routed."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool

from .caller import Admin, Caller, Key, Served
from .described import BANDIT, ERRORS, FEEDBACK, ROUTING
from .schemas import FeedbackBody

router = APIRouter(prefix="/v1", tags=["tenants"])


@router.post("/feedback", responses={200: FEEDBACK, **ERRORS})
async def feedback(body: FeedbackBody, service: Served, tenant: Caller) -> dict[str, Any]:
    """Tell how good one of the caller's answers was, once; bandits learn from it which adapter `auto` takes."""
    return await run_in_threadpool(service.take_feedback, tenant, body.response_id, body.reward)


@router.get("/tenants/{name}/routing", responses={200: ROUTING, **ERRORS})
async def routing(name: str, service: Served, key: Key) -> dict[str, Any]:
    """Report what a tenant's requests used: shares, entropy, abstentions, drift, tokens. For itself, or an admin."""
    return await run_in_threadpool(service.routing, None if key is None else key.credentials, name)


@router.post("/tenants/{name}/learn", responses={200: BANDIT, **ERRORS})
async def learn(name: str, service: Served, admin: Admin) -> dict[str, Any]:
    """Let a tenant's bandit learn from the rewards so far, as its next version. For admins."""
    return await run_in_threadpool(service.learn, name)
