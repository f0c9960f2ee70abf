"""What the commands `molora tenants ...` do: call the library and print."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from ...errors import ConfigError
from ...reports.tables import table
from .file import apply as apply_file
from .file import read_tenants
from .keys import KeyInfo, NewKey
from .store import Tenants
from .tenant import LIMITS, Tenant

DEFAULT = "tenants.db"
HOUR = 3600.0


def run(args: argparse.Namespace) -> int:
    """Run one command; returns the exit code."""
    commands: dict[str, Callable[[argparse.Namespace, Tenants], int]] = {
        "add": add, "list": list_, "rotate": rotate, "revoke": revoke, "usage": usage, "apply": apply,
    }  # fmt: skip
    with Tenants(args.db or os.environ.get("MOLORA_TENANTS") or DEFAULT) as tenants:
        return commands[args.tenants_command](args, tenants)


def add(args: argparse.Namespace, tenants: Tenants) -> int:
    """Create a tenant or change what is given of one, and make a key."""
    limits = {name: getattr(args, name) for name in LIMITS if getattr(args, name) is not None}
    given: dict[str, Any] = {"weight": args.weight, "base": args.base, "manage": args.manage}
    given = {name: value for name, value in given.items() if value is not None}
    if args.model is not None:
        given["models"] = frozenset(args.model)
    if args.admin and (given or limits or args.no_key):
        raise ConfigError("--admin makes a key that belongs to no tenant: it goes with --expires-days alone")
    if args.expires_days is not None and not 0 < args.expires_days < 1e6:
        raise ConfigError(f"--expires-days must be a number above 0, got {args.expires_days}")
    if not args.admin:
        known = {tenant.name: tenant for tenant in tenants.all()}
        old = known.get(args.name, Tenant(args.name))
        given["limits"] = replace(old.limits, **{name: value or None for name, value in limits.items()})
        if old != (new := replace(old, **given)) or args.name not in known:
            tenants.put(new)
    if args.no_key:
        return _print({"tenant": args.name}) if args.json else 0
    expires = None if args.expires_days is None else tenants.clock() + args.expires_days * 24 * HOUR
    return _show_key(args, tenants.add_key(None if args.admin else args.name, args.name if args.admin else "", expires))


def _show_key(args: argparse.Namespace, key: NewKey) -> int:
    if args.json:
        return _print({"id": key.id, "tenant": key.tenant, "key": key.secret})
    whose = "an admin key" if key.tenant is None else f"a key of tenant '{key.tenant}'"
    print(f"{whose}, id {key.id}; keep it, it is not shown again:\n{key.secret}")
    return 0


def list_(args: argparse.Namespace, tenants: Tenants) -> int:
    """List tenants and keys."""
    now, found = tenants.clock(), tenants.all()
    by_tenant: dict[str | None, list[KeyInfo]] = {}
    for key in [*tenants.keys(), *tenants.keys(admin=True)]:
        by_tenant.setdefault(key.tenant, []).append(key)
    if args.json:
        listed = [
            {
                **asdict(one),
                "models": sorted(one.models),
                "keys": [_key(key, now) for key in by_tenant.get(one.name, [])],
            }
            for one in found
        ]
        return _print({"tenants": listed, "admin_keys": [_key(key, now) for key in by_tenant.get(None, [])]})
    rows = [
        [one.name, f"{one.weight:g}", " ".join(sorted(one.models)) or None, "yes" if one.base else "no",
         "yes" if one.manage else "no", *(getattr(one.limits, limit) for limit in LIMITS),
         sum(key.is_good(now) for key in by_tenant.get(one.name, []))]
        for one in found
    ]  # fmt: skip
    print(table(["tenant", "weight", "models", "base", "manage", "req/min", "tok/min", "tok/day", "at once", "keys"],
                rows, left=(0, 2)))  # fmt: skip
    if by_tenant:
        print()
        keys = [key for owner in sorted(by_tenant, key=lambda one: one or "") for key in by_tenant[owner]]
        print(table(["key", "of", "label", "made", "state"],
                    [[key.id, key.tenant or "(admin)", key.label or None, _time(key.created), _state(key, now)]
                     for key in keys], left=(0, 1, 2, 3, 4)))  # fmt: skip
    return 0


def _key(key: KeyInfo, now: float) -> dict[str, Any]:
    return {**asdict(key), "state": _state(key, now)}


def _state(key: KeyInfo, now: float) -> str:
    if key.revoked is not None:
        return f"revoked {_time(key.revoked)}"
    if key.expires is None:
        return "good"
    return f"{'expires' if key.is_good(now) else 'expired'} {_time(key.expires)}"


def _time(seconds: float) -> str:
    return f"{datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc):%Y-%m-%d %H:%M}"


def rotate(args: argparse.Namespace, tenants: Tenants) -> int:
    """Make a new key in place of others."""
    if not 0 <= args.grace_hours < 1e6:
        raise ConfigError(f"--grace-hours must be a number from 0, got {args.grace_hours}")
    return _show_key(args, tenants.rotate(args.what, args.grace_hours * HOUR))


def revoke(args: argparse.Namespace, tenants: Tenants) -> int:
    """Make keys useless."""
    revoked = tenants.revoke(args.what)
    if args.json:
        return _print({"revoked": revoked})
    print(f"revoked: {', '.join(revoked)}" if revoked else f"'{args.what}' had no key that was good")
    return 0


def usage(args: argparse.Namespace, tenants: Tenants) -> int:
    """Show what was used."""
    if args.since is not None and not re.fullmatch(r"\d{4}-\d\d-\d\d", args.since):
        raise ConfigError(f"--since must be a day such as 2026-01-31, got '{args.since}'")
    if args.name is not None:
        tenants.get(args.name)
    rows = tenants.usage(args.name, args.since)
    if args.json:
        return _print([asdict(row) for row in rows])
    header = ["tenant", "day", "program", "requests", "input tokens", "output tokens"]
    print(table(header, [[row.tenant, row.day, row.program[:20], row.requests, row.input_tokens, row.output_tokens]
                         for row in rows], left=(0, 1, 2)))  # fmt: skip
    return 0


def apply(args: argparse.Namespace, tenants: Tenants) -> int:
    """Read a file of tenants into the database."""
    found = read_tenants(args.file, os.environ)
    notes = apply_file(found, tenants)
    if args.json:
        return _print({"tenants": [tenant.name for tenant in found.tenants], "notes": notes})
    print(f"{len(found.tenants)} tenants of {args.file} are in the database" + "".join(f"\n{note}" for note in notes))
    return 0


def _print(content: Any) -> int:
    print(json.dumps(content, indent=1))
    return 0
