"""The page at `/`, and /v1/overview, which it shows.

The page is a few files of this package, without a build and without anything from elsewhere, so it works with the
network cut. It shows what the key that is entered may see, and keeps the key in the tab's sessionStorage alone:

- Adapters: where each is (disk, queued, loading, warm, ready, errored and why), how many requests use it or wait for
  it, rank or number of experts, size, time of its last load, and whether it is pinned; filtered and paged by the
  server, so that ten thousand cost the browser no more than 25. A key with `manage` can load, pin and unpin.
- Routing: a prompt answered token by token by the base model, an adapter, a mixture or `auto`. Of a mixture every token
  is coloured by the expert with the largest mean gate, and chosen tokens tell their gates and entropy; under the answer
  is the entropy of all of them. For `auto` it says what was chosen, with what scores, and why.
- Shares: what each tenant got of the engine beside what its weight is due; a tenant's key sees its own row, an admin's
  all of them, and what the engine does. An admin key reads; it asks for no answers.

It asks the server every two seconds, ever more rarely while it is hidden, and stops at an error until told to go on.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, HTTPException, Query, Response
from fastapi.responses import FileResponse

from ..engine.fair import W_IN, W_OUT, Share
from ..service import Service
from ..tenants.tenant import Tenant
from .caller import Key, Served
from .described import ERRORS

router = APIRouter(tags=["operation"])
FOLDER = Path(__file__).parent / "static"
PARTS = ("page.js", "common.js", "routing.js", "tokens.js", "tables.js", "page.css")
# nothing from elsewhere may run in it, no text may become markup, and no other page may frame it
POLICY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # asked for anew each time, answered by its tag
}
STATES = ("ready", "warm", "loading", "queued", "disk", "errored")
MOST = 100  # tenants that are told by name
State = Literal["ready", "warm", "loading", "queued", "disk", "errored"]


@router.get("/", include_in_schema=False)
def index() -> FileResponse:
    """Return the page."""
    return FileResponse(FOLDER / "index.html", media_type="text/html", headers=POLICY)


@router.get("/page/{name}", include_in_schema=False)
def part(name: str) -> FileResponse:
    """Return a script or the style of the page."""
    if name not in PARTS:  # nothing but these, whatever the name says
        raise HTTPException(404, "not a part of the page")
    kind = "text/css" if name.endswith(".css") else "text/javascript"
    return FileResponse(FOLDER / name, media_type=kind, headers=POLICY)


# --- what it shows --------------------------------------------------------------------------------------------------


@router.get("/v1/overview", responses=ERRORS)
def overview(
    service: Served,
    key: Key,
    response: Response,
    contains: Annotated[str, Query(max_length=256)] = "",
    state: State | None = None,
    offset: Annotated[int, Query(ge=0, le=1 << 31)] = 0,
    limit: Annotated[int, Query(ge=0, le=200)] = 50,
) -> dict[str, Any]:
    """Report adapters with residency, and shares: of a tenant what it may see, for an admin everything.

    `contains` and `state` filter adapters, `offset` and `limit` say which of those that are found are listed.
    """
    response.headers["Cache-Control"] = "no-store"
    tenant = _viewer(service, None if key is None else key.credentials)
    entries = sorted(service.store.entries(), key=_name) if tenant is None else service.entries(tenant)
    found = [one for one in entries if contains.lower() in one.name.lower() and state in (None, one.state)]
    counts = Counter(one.state for one in entries)
    sees_all = tenant is None or service.tenants is None
    return {
        "object": "overview",
        "model": service.name,
        "caller": _caller(service, tenant),
        "selectors": list(service.engine.selectors),
        "chat": getattr(service.tokenizer, "chat_template", None) is not None,
        "adapters": {
            "data": [asdict(one) for one in found[offset : offset + limit]],
            "found": len(found),
            "total": len(entries),
            "states": {one: counts[one] for one in STATES},
        },
        "shares": _shares(service.engine.shares(), None if sees_all or tenant is None else tenant),
        "engine": _engine(service) if sees_all else None,
    }


def _name(entry: Any) -> str:
    return entry.name


def _viewer(service: Service, key: str | None) -> Tenant | None:
    """Return whose key this is, None for an admin; raise ServeError 401 when it is nobody's."""
    is_admin = service.tenants is not None and service.is_admin(key)  # without tenants everybody is one, and may ask
    return None if is_admin else service.tenant_of(key)


def _caller(service: Service, tenant: Tenant | None) -> dict[str, Any]:
    if tenant is None:
        return {"kind": "admin", "name": None, "base": False, "manage": False}
    kind = "everybody" if service.tenants is None else "tenant"
    return {"kind": kind, "name": tenant.name, "base": tenant.base, "manage": tenant.manage}


def _shares(shares: dict[str, Share], only: Tenant | None) -> list[dict[str, Any]]:
    """Return what tenants got, those that got most first; of one tenant alone, or of all."""
    costs = {name: W_IN * one.input + W_OUT * one.output for name, one in shares.items()}
    whole, weights = sum(costs.values()), sum(one.weight for one in shares.values())

    def told(name: str) -> dict[str, Any]:
        one = shares[name]
        part, due = costs[name] / whole if whole else 0.0, one.weight / weights
        numbers = {"weight": one.weight, "input": one.input, "output": one.output, "waiting": one.waiting}
        return {"tenant": name, **numbers, "share": part, "due": due}

    if only is not None:
        idle = {"weight": only.weight, "input": 0, "output": 0, "waiting": 0, "share": 0.0, "due": None}
        return [told(only.name) if only.name in shares else {"tenant": only.name, **idle}]
    return [told(name) for name in sorted(shares, key=lambda name: (-costs[name], name))[:MOST]]


def _engine(service: Service) -> dict[str, Any]:
    stats = service.engine.stats()
    names = "healthy draining running waiting tokens_in tokens_cached tokens_out kv_used kv_capacity".split()
    return {name: getattr(stats, name) for name in names}
