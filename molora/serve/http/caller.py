"""Who calls: the tenant behind a request's key, and the admin."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from ..request import ServeError
from ..service import Service
from ..tenants.tenant import Tenant

_bearer = HTTPBearer(auto_error=False, description="A key of the server, as in `Authorization: Bearer KEY`.")
Key = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


def _service(request: Request) -> Service:
    return request.app.state.service


def _tenant(request: Request, key: Key) -> Tenant:
    return request.app.state.service.tenant_of(None if key is None else key.credentials)


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
    tenants: Any = request.app.state.service.tenants
    if tenants is not None and (key is None or not tenants.is_admin(key.credentials)):
        raise ServeError("an admin key is needed; `molora tenants` makes one", 401, "invalid_api_key")


Served = Annotated[Service, Depends(_service)]
Caller = Annotated[Tenant, Depends(_tenant)]
Manager = Annotated[Tenant, Depends(_manager)]
Admin = Annotated[None, Depends(_admin)]
