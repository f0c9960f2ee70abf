"""Who calls: the tenant behind a request's key, and the admin."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.concurrency import run_in_threadpool

from ..request import ServeError
from ..service import Service
from ..tenants.tenant import Tenant

_bearer = HTTPBearer(auto_error=False, description="A key of the server, as in `Authorization: Bearer KEY`.")
Key = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


async def _service(request: Request) -> Service:  # a plain function would cost every request a hop to a thread
    return request.app.state.service


async def _tenant(request: Request, key: Key) -> Tenant:
    service: Service = request.app.state.service
    if service.tenants is None:
        return service.tenant_of(None)
    return await run_in_threadpool(service.tenant_of, None if key is None else key.credentials)


def _manager(tenant: Annotated[Tenant, Depends(_tenant)]) -> Tenant:
    if not tenant.manage:
        raise ServeError(
            "this key may not load, unload or pin adapters; ask the operator for a tenant with manage: true",
            status=403,
            code="not_allowed",
        )
    return tenant


def _admin(request: Request, key: Key) -> None:
    """Raise ServeError unless the key is an admin's; without tenants everybody is one."""
    if not request.app.state.service.is_admin(None if key is None else key.credentials):
        raise ServeError("an admin key is needed; `molora tenants` makes one", 401, "invalid_api_key")


Served = Annotated[Service, Depends(_service)]
Caller = Annotated[Tenant, Depends(_tenant)]
Manager = Annotated[Tenant, Depends(_manager)]
Admin = Annotated[None, Depends(_admin)]
