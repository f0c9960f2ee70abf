"""How quotas are counted: minutes in slots, days of UTC, sums in rows of the database."""

from __future__ import annotations

import datetime
from typing import Any

from sqlalchemy import Connection, insert, update

from ..request import ServeError
from .tenant import Limits

SLOT = 2  # seconds
MINUTE = 60
DAY = 86400

LOWER = "; it never fits: shorten the prompt or lower max_tokens"


def is_windowed(limits: Limits) -> bool:
    """Whether any limit is per minute."""
    return limits.requests_per_minute is not None or limits.tokens_per_minute is not None


def refused(why: str, code: str, wait: float | None) -> ServeError:
    """Return the answer to a request that is over a limit."""
    return ServeError(f"over the limit of this tenant: {why}", status=429, code=code, retry_after=wait)


def minute(what: str, limit: int | None, need: int, slots: list[tuple[int, int]], now: float) -> ServeError | None:
    """Return the refusal when `need` more would exceed what 60 seconds allow; slots are (number, count), oldest first.

    The wait ends when the slots that must leave have left.
    """
    taken = sum(count for _, count in slots)
    if limit is None or taken + need <= limit:
        return None
    text = f"{taken} {what} in the last minute, this request needs {need}, {limit} per minute are allowed"
    if need > limit:
        return refused(text + LOWER, "rate_limit_exceeded", None)
    for slot, count in slots:
        taken -= count
        if taken + need <= limit:
            return refused(text, "rate_limit_exceeded", max(0.001, (slot + 1) * SLOT + MINUTE - now))
    raise AssertionError("an empty minute has room for what fits into one")


def add_to(connection: Connection, table: Any, key: dict[str, Any], amounts: dict[str, int]) -> bool:
    """Add amounts to the row with this key, or create it; returns whether it is new. The tenant must be locked."""
    at = [table.c[name] == value for name, value in key.items()]
    sums = {name: table.c[name] + amount for name, amount in amounts.items()}
    if connection.execute(update(table).where(*at).values(sums)).rowcount:
        return False
    connection.execute(insert(table), {**key, **amounts})
    return True


def day_of(now: float) -> str:
    """Return the day of UTC at a time, as 2026-01-31."""
    return datetime.datetime.fromtimestamp(now, datetime.timezone.utc).date().isoformat()
