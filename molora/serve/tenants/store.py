"""Tenants: who they are, their keys and rights, and through `quotas` what they may use and did use."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from sqlalchemy import Connection, case, delete, insert, select, update

from ...errors import ConfigError, did_you_mean
from . import tables
from .database import Database, answering
from .keys import KeyInfo, NewKey, id_of, new_key, opens, sealed
from .quotas import LEASE, Grant, Quotas, UsageRow
from .tables import keys, rights
from .tenant import LIMITS, Limits, Tenant

CACHE = 5.0  # seconds for which a recognised key is remembered
CACHED = 10_000  # keys that are remembered at most
_NOTHING = b"\0" * 16, b"\0" * 32  # salt and hash that no key has


class Tenants:
    """All tenants of one database; any thread may call any method, and several servers may share the database.

    A key that is revoked or a right that is taken away stops working at once on this object, and within `cache`
    seconds on other servers. A key that expires does so to the second.

    Args:
        url: of the database: `sqlite:///tenants.db`, a file name, `postgresql+psycopg://user@host/name`.
        cache: seconds for which a recognised key is remembered, so that not every request reads the database.
        lease: seconds after which a server that is silent counts as dead, and its running requests no longer count.
        clock: seconds since 1970.
    """

    def __init__(
        self, url: str, cache: float = CACHE, lease: float = LEASE, clock: Callable[[], float] = time.time
    ) -> None:
        self.database = Database(url)
        self.cache, self.clock = cache, clock
        self.quotas = Quotas(self.database, clock, lease)
        self._lock, self._generation = threading.Lock(), 0
        # digest of a key -> (tenant, None for an admin; until when); never the key itself
        self._known: OrderedDict[bytes, tuple[Tenant | None, float]] = OrderedDict()

    def __repr__(self) -> str:
        return f"Tenants({self.database.shown!r})"

    def __enter__(self) -> Tenants:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back what this server holds and close the database."""
        self.quotas.close()
        self.database.close()

    # --- tenants ----------------------------------------------------------------------------------------------------

    def put(self, tenant: Tenant, origin: str = "command") -> None:
        """Create a tenant, or give one of this name these weights, rights and limits."""
        tenant.check()
        with self.database.write() as connection:
            self.put_in(connection, tenant, origin)
        self.forget()

    def put_in(self, connection: Connection, tenant: Tenant, origin: str) -> None:
        """Do what `put` does, in a transaction of the caller."""
        table = tables.tenants
        row = {"weight": float(tenant.weight), "base": tenant.base, "manage": tenant.manage, "is_off": False}
        row |= asdict(tenant.limits)
        # a command that changes a tenant of the file leaves it the file's, which can still turn it off
        kept = origin if origin == "file" else case((table.c.is_off, origin), else_=table.c.origin)
        changed = update(table).where(table.c.name == tenant.name).values(origin=kept, **row)
        if connection.execute(changed).rowcount == 0:
            connection.execute(insert(table), {"name": tenant.name, "created": self.clock(), "origin": origin, **row})
        connection.execute(delete(rights).where(rights.c.tenant == tenant.name))
        if tenant.models:
            patterns = [{"tenant": tenant.name, "pattern": pattern} for pattern in sorted(tenant.models)]
            connection.execute(insert(rights), patterns)

    def get(self, name: str) -> Tenant:
        """Return a tenant; raise ConfigError when there is none of this name."""
        with self.database.read() as connection:
            self._check_known(connection, name)
            return _read(connection, name)[0]

    def all(self) -> list[Tenant]:
        """Return all tenants by name, but those that their file no longer has."""
        with self.database.read() as connection:
            return _read(connection)

    def _check_known(self, connection: Connection, name: str) -> None:
        names = connection.execute(select(tables.tenants.c.name)).scalars().all()
        if name not in names:
            raise ConfigError(f"tenant '{name}' is unknown{did_you_mean(name, names)}")

    # --- keys -------------------------------------------------------------------------------------------------------

    def add_key(self, tenant: str | None, label: str = "", expires: float | None = None) -> NewKey:
        """Make a key of a tenant, or for None an admin key; this is the only time that it can be read.

        Args:
            tenant: its name.
            label: what to remember it by.
            expires: seconds since 1970.
        """
        with self.database.write() as connection:
            if tenant is not None:
                self._check_known(connection, tenant)
            name, secret = new_key("admin" if tenant is None else "tenant")
            self.keep_key(connection, tenant, secret, label, expires)
        return NewKey(name, tenant, secret)

    def keep_key(
        self, connection: Connection, tenant: str | None, secret: str, label: str, expires: float | None = None
    ) -> None:
        """Store the hash of a key, in a transaction of the caller."""
        salt, stored = sealed(secret)
        row = {"id": id_of(secret), "tenant": tenant, "label": label[:128], "salt": salt, "hash": stored}
        connection.execute(insert(keys), {**row, "created": self.clock(), "expires": expires, "revoked": None})

    def keys(self, tenant: str | None = None, admin: bool = False) -> list[KeyInfo]:
        """Return what is known of keys: of all tenants, of one, or of the admins."""
        shown = select(*(keys.c[name] for name in KeyInfo.__dataclass_fields__)).order_by(keys.c.created, keys.c.id)
        shown = shown.where(keys.c.tenant.is_(None) if admin else keys.c.tenant.is_not(None))
        if tenant is not None:
            shown = shown.where(keys.c.tenant == tenant)
        with self.database.read() as connection:
            return [KeyInfo(*row) for row in connection.execute(shown)]

    def revoke(self, what: str) -> list[str]:
        """Make one key useless, given by its id, or all of a tenant; returns the ids of those that were good.

        Raises:
            ConfigError: there is no such key or tenant.
        """
        now = self.clock()
        with self.database.write() as connection:
            good = [one for one in self._find(connection, what) if one.is_good(now)]
            connection.execute(update(keys).where(keys.c.id.in_([one.id for one in good])).values(revoked=now))
        self.forget()
        return [one.id for one in good]

    def rotate(self, what: str, grace: float = 0.0) -> NewKey:
        """Make a new key in place of one, given by its id, or of all keys of a tenant.

        Args:
            what: the id of a key, or the name of a tenant.
            grace: seconds for which the old ones go on working.
        """
        now = self.clock()
        with self.database.write() as connection:
            found = self._find(connection, what)
            good = [one for one in found if one.is_good(now)]
            if not good and what in {one.id for one in found}:
                raise ConfigError(f"key '{what}' is revoked or has expired; make a new one with molora tenants add")
            owner = good[0].tenant if good else what
            name, secret = new_key("admin" if owner is None else "tenant")
            label = good[0].label if good and not good[0].label.startswith("env:") else ""
            self.keep_key(connection, owner, secret, label)
            for one in good:
                end = {"revoked": now} if grace <= 0 else {"expires": min(now + grace, one.expires or now + grace)}
                connection.execute(update(keys).where(keys.c.id == one.id).values(end))
        self.forget()
        return NewKey(name, owner, secret)

    def _find(self, connection: Connection, what: str) -> list[KeyInfo]:
        """Return the key with this id, or the keys of the tenant of this name."""
        shown = select(*(keys.c[name] for name in KeyInfo.__dataclass_fields__))
        rows = connection.execute(shown.where(keys.c.id == what)).all()
        if not rows:
            names = connection.execute(select(tables.tenants.c.name)).scalars().all()
            if what not in names:
                raise ConfigError(f"'{what}' is neither the id of a key nor a tenant{did_you_mean(what, names)}")
            rows = connection.execute(shown.where(keys.c.tenant == what)).all()
        return [KeyInfo(*row) for row in rows]

    # --- recognising callers ----------------------------------------------------------------------------------------

    def authenticate(self, key: str) -> Tenant | None:
        """Return the tenant whose key this is; None for any other text, and for admin keys.

        Raises:
            ServeError: 503 when the database does not answer.
        """
        found = self._lookup(key)
        return None if found is None else found[0]

    def is_admin(self, key: str) -> bool:
        """Whether this is an admin key."""
        found = self._lookup(key)
        return found is not None and found[0] is None

    def _lookup(self, key: str) -> tuple[Tenant | None] | None:
        """Return (tenant,) for a key of a tenant, (None,) for an admin key, None for any other text."""
        digest, now = hashlib.sha256(key.encode(errors="replace")).digest(), self.clock()
        with self._lock:
            cached = self._known.get(digest)
            generation = self._generation
        if cached is not None and now < cached[1]:
            return (cached[0],)
        with answering(), self.database.read() as connection:
            row = connection.execute(select(keys).where(keys.c.id == id_of(key))).one_or_none()
            # compares something for unknown keys too, so that the time does not tell which ids exist
            is_right = opens(key, *((row.salt, row.hash) if row is not None else _NOTHING))
            if (
                row is None
                or not is_right
                or row.revoked is not None
                or (row.expires is not None and row.expires <= now)
            ):
                return None
            found = None if row.tenant is None else next(iter(_read(connection, row.tenant, only_on=True)), None)
            if row.tenant is not None and found is None:
                return None
        with self._lock:
            if generation == self._generation:  # nothing was revoked while the database was read
                until = now + self.cache if row.expires is None else min(now + self.cache, row.expires)
                self._known[digest] = found, until
                self._known.move_to_end(digest)
                while len(self._known) > CACHED:
                    self._known.popitem(last=False)
        return (found,)

    def forget(self) -> None:
        """Read every key and right anew from now on."""
        with self._lock:
            self._known.clear()
            self._generation += 1

    # --- quotas -----------------------------------------------------------------------------------------------------

    def admit(self, tenant: Tenant, input_tokens: int, max_output: int) -> Grant:
        """Reserve what a request may use; see Quotas.admit."""
        return self.quotas.admit(tenant, input_tokens, max_output)

    def usage(self, tenant: str | None = None, since: str | None = None) -> list[UsageRow]:
        """Return usage by tenant, day and program; `since` is a day such as 2026-01-31."""
        return self.quotas.usage(tenant, since)


def _read(connection: Connection, name: str | None = None, only_on: bool | None = None) -> list[Tenant]:
    """Return tenants: all that are on, or one by its name, `only_on` if it is."""
    table = tables.tenants
    wanted, patterns = select(table).order_by(table.c.name), select(rights)
    if name is not None:
        wanted, patterns = wanted.where(table.c.name == name), patterns.where(rights.c.tenant == name)
    if only_on if only_on is not None else name is None:
        wanted = wanted.where(table.c.is_off.is_(False))
    models: dict[str, set[str]] = {}
    for owner, pattern in connection.execute(patterns):
        models.setdefault(owner, set()).add(pattern)
    return [_tenant(row, models.get(row.name, set())) for row in connection.execute(wanted)]


def _tenant(row: Any, models: set[str]) -> Tenant:
    limits = Limits(**{name: getattr(row, name) for name in LIMITS})
    return Tenant(row.name, row.weight, frozenset(models), row.base, row.manage, limits)
