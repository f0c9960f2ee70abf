"""tenants.yaml: tenants, weights, rights and limits as a file, with keys taken from the environment.

    tenants:
      news:
        weight: 2
        models: [headlines, "news-*"]        # a name, name@version, the start of names, or "*"
        base: true                           # may use the base model alone
        manage: false                        # may load, unload and pin its models
        limits: {requests_per_minute: 60, tokens_per_minute: 20000, tokens_per_day: 1000000, concurrent: 4}
        keys: [NEWS_KEY]                     # names of variables of the environment that hold the keys
    admin_keys: [MOLORA_ADMIN_KEY]

Keys themselves never stand in the file. Those made by `molora tenants add` go on working beside those of the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, select, update
from sqlalchemy.exc import DBAPIError

from ...errors import ConfigError, did_you_mean, raise_all
from ...hub.plain_yaml import read_yaml
from . import tables
from .keys import check_given, id_of, opens
from .store import Tenants
from .tables import keys
from .tenant import LIMITS, Limits, Tenant

MAX_BYTES = 1_000_000
_FIELDS = ("weight", "models", "base", "manage", "limits", "keys")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")


@dataclass
class TenantsFile:
    """What a file says.

    Attributes:
        tenants: in the order of the file.
        secrets: tenant, or None for admins -> variable of the environment -> key.
    """

    tenants: list[Tenant] = field(default_factory=list)
    secrets: dict[str | None, dict[str, str]] = field(default_factory=dict, repr=False)


def read_tenants(path: str | Path, environ: Mapping[str, str]) -> TenantsFile:
    """Read and check a file of tenants.

    Args:
        path: of the YAML file.
        environ: the environment, where the keys are.

    Raises:
        ConfigError: lists everything that is wrong; it never quotes a key.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path} has {path.stat().st_size:,} bytes, {MAX_BYTES:,} are allowed")
        content = read_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the file of tenants '{path}' cannot be read: {error}") from None
    problems: list[str] = []
    found = TenantsFile()
    content = _mapping(content, "the file", ("tenants", "admin_keys"), problems)
    entries = content.get("tenants", {})
    if not isinstance(entries, dict):
        problems.append(f"'tenants' must map names to what they may, got {type(entries).__name__}")
        entries = {}
    for name, entry in entries.items():
        _tenant(str(name), entry, environ, found, problems)
    _secrets(None, "admin_keys", content.get("admin_keys", []), environ, found, problems)
    owners: dict[str, str | None] = {}
    for owner, secrets in found.secrets.items():
        for variable, secret in secrets.items():
            if owners.setdefault(id_of(secret), owner) != owner:
                problems.append(f"the key in {variable} belongs to another tenant or admin too; each needs its own")
    raise_all(problems, ConfigError, f"the file of tenants '{path}'")
    return found


def _tenant(name: str, entry: Any, environ: Mapping[str, str], found: TenantsFile, problems: list[str]) -> None:
    what = f"tenant {name[:96]!r}"
    entry = _mapping({} if entry is None else entry, what, _FIELDS, problems)
    limits = _mapping(entry.get("limits") or {}, f"limits of {what}", LIMITS, problems)
    models = entry.get("models", [])
    if not isinstance(models, list):
        problems.append(f"models of {what} must be a list, got {type(models).__name__}")
        models = []
    try:
        tenant = Tenant(
            name,
            entry.get("weight", 1.0),
            frozenset(model if isinstance(model, str) else repr(model) for model in models),
            entry.get("base", True),
            entry.get("manage", False),
            Limits(**limits),
        )
        found.tenants.append(tenant.check())
    except ConfigError as error:
        problems += [line.strip().removeprefix("- ") for line in str(error).splitlines()]
    _secrets(name, f"keys of {what}", entry.get("keys", []), environ, found, problems)


def _mapping(value: Any, what: str, known: tuple[str, ...], problems: list[str]) -> dict[str, Any]:
    """Return the known entries of a mapping, and note what is wrong."""
    if not isinstance(value, dict):
        problems.append(f"{what} must be a mapping, got {type(value).__name__}")
        return {}
    problems += [f"{what} has no '{str(key)[:64]}'{did_you_mean(str(key), known)}" for key in value if key not in known]
    return {key: one for key, one in value.items() if key in known}


def _secrets(
    owner: str | None, what: str, names: Any, environ: Mapping[str, str], found: TenantsFile, problems: list[str]
) -> None:
    """Read keys from the variables of the environment that are named."""
    if not isinstance(names, list):
        problems.append(f"{what} must be a list of names of variables, got {type(names).__name__}")
        return
    for place, name in enumerate(names, start=1):
        if not isinstance(name, str) or not _VARIABLE.fullmatch(name) or name.startswith("mlr"):
            # it may well be a key that was written here by mistake, so it is not quoted
            problems.append(f"entry {place} of {what} is no name of a variable; keys themselves do not belong here")
        elif name not in environ:
            shown = name if len(name) < 32 else f"{place} of the list"  # so long, it may be a key as well
            problems.append(f"{what}: variable {shown} is not set; set it to the key or take it out")
        else:
            try:
                check_given(environ[name], f"variable {name} ({what})")
            except ConfigError as error:
                problems.append(str(error))
            else:
                found.secrets.setdefault(owner, {})[name] = environ[name]


def apply(found: TenantsFile, tenants: Tenants) -> list[str]:
    """Make a database say what a file says, in one step; returns remarks for the operator.

    Tenants that came from a file and are no longer there are turned off, and keys that came from variables which no
    longer hold them are revoked. Tenants made by commands stay as they are, unless the file has one of that name.
    """
    for left in (2, 1, 0):
        try:
            with tenants.database.write() as connection:
                notes = _apply(connection, found, tenants)
            break
        except DBAPIError:  # another server that starts now has written the same rows; the second try finds them
            if not left:
                raise
    tenants.forget()
    return notes


def _apply(connection: Connection, found: TenantsFile, tenants: Tenants) -> list[str]:
    table = tables.tenants
    from_files = select(table.c.name).where(table.c.origin == "file", table.c.is_off.is_(False))
    gone = set(connection.execute(from_files).scalars()) - {tenant.name for tenant in found.tenants}
    for tenant in sorted(
        found.tenants, key=lambda one: one.name
    ):  # servers lock in one order, whatever their files say
        tenants.put_in(connection, tenant, "file")
    connection.execute(update(table).where(table.c.name.in_(gone)).values(is_off=True))
    notes = [f"tenant '{name}' is no longer in the file and is turned off" for name in sorted(gone)]
    for owner in [None, *(tenant.name for tenant in found.tenants)]:
        notes += _apply_keys(connection, tenants, owner, found.secrets.get(owner, {}))
    return notes


def _apply_keys(connection: Connection, tenants: Tenants, owner: str | None, secrets: dict[str, str]) -> list[str]:
    """Make the keys of one tenant, or of the admins, that come from the environment be those given."""
    notes = []
    now = tenants.clock()
    mine = keys.c.tenant.is_(None) if owner is None else keys.c.tenant == owner
    wanted = {id_of(secret): variable for variable, secret in secrets.items()}
    rows = connection.execute(select(keys.c.id).where(mine, keys.c.label.startswith("env:"), keys.c.revoked.is_(None)))
    stale = [name for name in rows.scalars() if name not in wanted]
    connection.execute(update(keys).where(keys.c.id.in_(stale)).values(revoked=now))
    notes += [f"key {name} is in no variable any more and is revoked" for name in sorted(stale)]
    for name, variable in wanted.items():
        row = connection.execute(select(keys).where(keys.c.id == name)).one_or_none()
        if row is None:
            tenants.keep_key(connection, owner, secrets[variable], f"env:{variable}")
        elif row.tenant != owner or not opens(secrets[variable], row.salt, row.hash):
            raise ConfigError(f"the key in variable {variable} belongs to another tenant or admin already")
        elif row.revoked is not None:
            notes.append(f"the key in variable {variable} was revoked and stays so; put a new one there")
    return notes
