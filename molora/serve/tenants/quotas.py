"""Quotas: what a tenant's request may use is reserved before it starts and settled when it ends.

All counting is in the database, one short transaction per step, so servers that share it count together.

- A minute is any 60 seconds: what was admitted is kept in slots of `SLOT` seconds. A slot counts until all of it is
  60 seconds old, so a limit is never exceeded, and tokens return up to `SLOT` seconds late.
- A request reserves its prompt and the longest answer that it allows; the rest is given back when it is settled.
- Usage is written when a request is settled, exactly once. A killed server loses nothing that was settled; what it had
  running is not counted as usage, and its slots and reservations of the day come back after `lease` seconds, in which
  it did not say that it is alive. What it had admitted stays in its minute.
- Clocks of machines that share a database must agree within a few seconds.
"""

from __future__ import annotations

import logging
import math
import secrets
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sqlalchemy import Connection, Select, case, delete, func, insert, select, update
from sqlalchemy.exc import SQLAlchemyError

from ..request import ServeError
from . import tables
from .counting import DAY, LOWER, MINUTE, SLOT, add_to, day_of, is_windowed, minute, refused
from .database import Database, answering
from .tables import grants, servers, usage, windows
from .tenant import Limits, Tenant

LEASE = 30.0  # seconds after which a silent server counts as dead

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class UsageRow:
    """What a tenant used on one day of UTC through one program."""

    tenant: str
    day: str
    program: str
    requests: int
    input_tokens: int
    output_tokens: int


class Grant:
    """The permission for one request; end it with `settle` or `release`, or as a context that releases it.

    Attributes:
        id: of the grant.
        tenant: name of the tenant.
        tokens: how many were reserved.
    """

    def __init__(self, quotas: Quotas, name: str, tenant: str, now: float, tokens: int) -> None:
        self._quotas, self._lock, self._is_open = quotas, threading.Lock(), True
        self.id, self.tenant, self.tokens = name, tenant, tokens
        self.slot, self.day = int(now // SLOT), day_of(now)

    def __repr__(self) -> str:
        return f"Grant({self.id!r}, tenant={self.tenant!r}, tokens={self.tokens}, open={self._is_open})"

    def settle(self, input_tokens: int, output_tokens: int, program: str = "base") -> None:
        """Record what the request used, and give back the rest; only the first end of a grant counts.

        Never fails: when the database cannot be written now, it is tried again until the server stops.

        Args:
            input_tokens, output_tokens: as generated, also of an answer that broke off.
            program: digest of what served the request.
        """
        if self._end():
            self._quotas.finish(self, (max(0, int(input_tokens)), max(0, int(output_tokens)), program[:128]))

    def release(self) -> None:
        """Give everything back: nothing was generated. Does nothing once the grant has ended."""
        if self._end():
            self._quotas.finish(self, None)

    def _end(self) -> bool:
        with self._lock:
            was_open, self._is_open = self._is_open, False
            return was_open

    def __enter__(self) -> Grant:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


class Quotas:
    """Admits requests and records usage.

    Args:
        database: where everything is.
        clock: seconds since 1970.
        lease: seconds without a sign of life after which a server's open grants stop counting.
    """

    def __init__(self, database: Database, clock: Callable[[], float], lease: float = LEASE) -> None:
        self.database, self.clock, self.lease = database, clock, lease
        self.server = secrets.token_hex(8)
        self._lock, self._starting = threading.Lock(), threading.Lock()
        self._unsettled: list[tuple[Grant, tuple[int, int, str] | None]] = []
        self._stop = threading.Event()
        self._beating: threading.Thread | None = None

    # --- admission ------------------------------------------------------------------------------------------------

    def admit(self, tenant: Tenant, input_tokens: int, max_output: int) -> Grant:
        """Reserve what a request may use.

        Limits are those in the database at this moment, whatever `tenant` says.

        Raises:
            ServeError: 429 `rate_limit_exceeded`, `quota_exceeded` or `too_many_concurrent`, with `retry_after` when
                waiting helps; 401 when the tenant is gone; 503 when the database does not answer.
        """
        self._start()
        tokens = max(0, int(input_tokens)) + max(0, int(max_output))
        with answering(), self.database.write() as connection:
            now = self.clock()
            limits = self._limits(connection, tenant.name)
            refusals = list(self._refusals(connection, tenant.name, limits, tokens, now))
            if not refusals:
                grant = Grant(self, secrets.token_hex(16), tenant.name, now, tokens)
                self._enter(connection, grant, now, has_window=is_windowed(limits))
                return grant
        # the longest wait: after a shorter one the request would be refused for another reason
        raise max(refusals, key=lambda error: math.inf if error.retry_after is None else error.retry_after)

    def _limits(self, connection: Connection, name: str) -> Limits:
        """Lock a tenant, so that its counts stand still for the rest of the transaction, and return its limits."""
        table = tables.tenants
        row = connection.execute(
            select(table.c.is_off, *(table.c[one] for one in Limits.__dataclass_fields__))
            .where(table.c.name == name)
            .with_for_update()  # on SQLite the transaction holds the only write lock anyway
        ).one_or_none()
        if row is None or row.is_off:
            raise ServeError("this key is not valid any more", status=401, code="invalid_api_key")
        return Limits(*row[1:])

    def _refusals(
        self, connection: Connection, name: str, limits: Limits, tokens: int, now: float
    ) -> Iterator[ServeError]:
        """Yield a refusal for each limit that the request would exceed."""
        if is_windowed(limits):
            rows = connection.execute(
                select(windows.c.slot, windows.c.requests, windows.c.tokens)
                .where(windows.c.tenant == name, windows.c.slot >= int((now - MINUTE) // SLOT))
                .order_by(windows.c.slot)
            ).all()
            for what, limit, need, column in (
                ("requests", limits.requests_per_minute, 1, 1),
                ("tokens", limits.tokens_per_minute, tokens, 2),
            ):
                refusal = minute(what, limit, need, [(row[0], row[column]) for row in rows], now)
                if refusal is not None:
                    yield refusal
        if limits.concurrent is None and limits.tokens_per_day is None:
            return
        is_today = grants.c.created >= now - now % DAY
        running, held = connection.execute(
            select(func.count(), func.sum(case((is_today, grants.c.tokens), else_=0)))
            .select_from(grants)
            .where(grants.c.tenant == name, grants.c.server.in_(self._alive(now)))
        ).one()
        if limits.concurrent is not None and running >= limits.concurrent:
            yield refused(
                f"{running} requests are running or waiting, {limits.concurrent} at a time are allowed",
                "too_many_concurrent",
                1.0,
            )
        if limits.tokens_per_day is not None:
            used = connection.execute(
                select(func.sum(usage.c.input_tokens + usage.c.output_tokens)).where(
                    usage.c.tenant == name, usage.c.day == day_of(now)
                )
            ).scalar()
            taken = int(used or 0) + int(held or 0)
            if taken + tokens > limits.tokens_per_day:
                is_hopeless = tokens > limits.tokens_per_day
                yield refused(
                    f"this request may use {tokens} tokens, {max(0, limits.tokens_per_day - taken)} of "
                    f"{limits.tokens_per_day} are left for today (UTC)" + (LOWER if is_hopeless else ""),
                    "quota_exceeded", None if is_hopeless else DAY - now % DAY,
                )  # fmt: skip

    def _enter(self, connection: Connection, grant: Grant, now: float, has_window: bool) -> None:
        connection.execute(
            insert(grants),
            {"id": grant.id, "tenant": grant.tenant, "server": self.server, "slot": grant.slot, "tokens": grant.tokens,
             "created": now},
        )  # fmt: skip
        if has_window:
            key = {"tenant": grant.tenant, "slot": grant.slot}
            if add_to(connection, windows, key, {"requests": 1, "tokens": grant.tokens}):
                past = windows.c.tenant == grant.tenant, windows.c.slot < int((now - 2 * MINUTE) // SLOT)
                connection.execute(delete(windows).where(*past))  # once per slot, when its row is new

    # --- the end of a request ---------------------------------------------------------------------------------------

    def finish(self, grant: Grant, used: tuple[int, int, str] | None) -> None:
        """End a grant: record what was used (input tokens, output tokens, program), or nothing for None."""
        try:
            self._finish(grant, used)
        except SQLAlchemyError as error:
            log.warning("usage of tenant %s cannot be written now, it will be tried again: %s", grant.tenant,
                        type(error).__name__)  # fmt: skip
            with self._lock:
                self._unsettled.append((grant, used))

    def _finish(self, grant: Grant, used: tuple[int, int, str] | None) -> None:
        with self.database.write() as connection:
            # the same order of locks as in admit: the tenant, then what belongs to it
            connection.execute(select(tables.tenants.c.name).where(tables.tenants.c.name == grant.tenant)
                               .with_for_update())  # fmt: skip
            if connection.execute(delete(grants).where(grants.c.id == grant.id)).rowcount != 1:
                return  # recorded already, by a try whose answer was lost
            spent = 0 if used is None else used[0] + used[1]
            connection.execute(
                update(windows)
                .where(windows.c.tenant == grant.tenant, windows.c.slot == grant.slot)
                .values(
                    requests=windows.c.requests - int(used is None), tokens=windows.c.tokens + (spent - grant.tokens)
                )
            )
            if used is not None:
                key = {"tenant": grant.tenant, "day": grant.day, "program": used[2]}
                add_to(connection, usage, key, {"requests": 1, "input_tokens": used[0], "output_tokens": used[1]})

    def usage(self, tenant: str | None = None, since: str | None = None) -> list[UsageRow]:
        """Return usage by tenant, day and program; `since` is a day such as 2026-01-31."""
        wanted = select(usage).order_by(usage.c.tenant, usage.c.day, usage.c.program)
        if tenant is not None:
            wanted = wanted.where(usage.c.tenant == tenant)
        if since is not None:
            wanted = wanted.where(usage.c.day >= since)
        with answering(), self.database.read() as connection:
            return [UsageRow(*row) for row in connection.execute(wanted)]

    def running(self) -> dict[str, int]:
        """Return how many requests of each tenant run or wait, on all servers that are alive."""
        alive = grants.c.server.in_(self._alive(self.clock()))
        counted = select(grants.c.tenant, func.count()).where(alive).group_by(grants.c.tenant)
        with answering(), self.database.read() as connection:
            return {name: count for name, count in connection.execute(counted)}

    def _alive(self, now: float) -> Select[tuple[str]]:
        return select(servers.c.id).where(servers.c.seen > now - self.lease)

    # --- signs of life ------------------------------------------------------------------------------------------------

    def beat(self) -> None:
        """Say that this server is alive, write what could not be written, forget servers that died a day ago."""
        with self._lock:
            again, self._unsettled = self._unsettled, []
        for grant, used in again:
            self.finish(grant, used)
        now = self.clock()
        with self.database.write() as connection:
            if connection.execute(update(servers).where(servers.c.id == self.server).values(seen=now)).rowcount == 0:
                connection.execute(insert(servers), {"id": self.server, "seen": now})
            dead = select(servers.c.id).where(servers.c.seen < now - max(DAY, self.lease))
            connection.execute(delete(grants).where(grants.c.server.in_(dead)))
            connection.execute(delete(servers).where(servers.c.seen < now - max(DAY, self.lease)))

    def _start(self) -> None:
        """Begin to beat, before the first grant."""
        with self._starting:
            if self._beating is None:
                with answering():
                    self.beat()
                self._beating = threading.Thread(target=self._beat_on, name="molora-tenants", daemon=True)
                self._beating.start()

    def _beat_on(self) -> None:
        while not self._stop.wait(self.lease / 4):
            try:
                self.beat()
            except SQLAlchemyError as error:
                log.warning("the database of tenants does not answer: %s", type(error).__name__)

    def close(self) -> None:
        """Write what is left, and give back what this server still holds."""
        self._stop.set()
        with self._starting:
            beating, self._beating = self._beating, None
        if beating is None:
            return
        beating.join()
        try:
            self.beat()
            with self.database.write() as connection:
                connection.execute(delete(grants).where(grants.c.server == self.server))
                connection.execute(delete(servers).where(servers.c.id == self.server))
        except SQLAlchemyError as error:
            log.warning("open grants could not be given back: %s", type(error).__name__)
        if self._unsettled:
            log.error("the usage of %d requests could not be written and is lost", len(self._unsettled))
