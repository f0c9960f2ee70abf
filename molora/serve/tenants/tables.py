"""The tables of tenants, keys, rights, quotas and usage."""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, Boolean, Column, Float, ForeignKey, Integer, LargeBinary, MetaData, String, Table

VERSION = 1  # of the tables; a change of them is a new number

META = MetaData()


def _table(name: str, *columns: Column[Any]) -> Table:
    return Table(f"molora_{name}", META, *columns)


def _tenant(**options: Any) -> Column[Any]:
    return Column("tenant", String(96), ForeignKey("molora_tenants.name", ondelete="CASCADE"), **options)


schema = _table("schema", Column("version", Integer, primary_key=True))
tenants = _table(
    "tenants",
    Column("name", String(96), primary_key=True),
    Column("weight", Float, nullable=False),
    Column("base", Boolean, nullable=False),  # may use the base model alone
    Column("manage", Boolean, nullable=False),  # may load, unload and pin what it may use
    Column("origin", String(16), nullable=False),  # "file" or "command"
    Column("is_off", Boolean, nullable=False),  # no longer in the file that it came from
    Column("requests_per_minute", BigInteger),
    Column("tokens_per_minute", BigInteger),
    Column("tokens_per_day", BigInteger),
    Column("concurrent", BigInteger),
    Column("created", Float, nullable=False),
)
rights = _table("rights", _tenant(primary_key=True), Column("pattern", String(128), primary_key=True))
keys = _table(
    "keys",
    Column("id", String(32), primary_key=True),
    _tenant(),  # none: an admin key
    Column("label", String(128), nullable=False),  # "env:NAME" when it comes from a variable of the environment
    Column("salt", LargeBinary, nullable=False),
    Column("hash", LargeBinary, nullable=False),
    Column("created", Float, nullable=False),
    Column("expires", Float),
    Column("revoked", Float),
)
usage = _table(
    "usage",
    _tenant(primary_key=True),
    Column("day", String(10), primary_key=True),  # of UTC, 2026-01-31
    Column("program", String(128), primary_key=True),  # digest of what served: weights, mixture, router
    Column("requests", BigInteger, nullable=False),
    Column("input_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
)
# What was admitted in each slot of a few seconds, so that every window of a minute can be summed.
windows = _table(
    "windows",
    _tenant(primary_key=True),
    Column("slot", BigInteger, primary_key=True),
    Column("requests", BigInteger, nullable=False),
    Column("tokens", BigInteger, nullable=False),
)
# Requests that run: what they may use at most. They count while the server that admitted them is alive.
grants = _table(
    "grants",
    Column("id", String(32), primary_key=True),
    _tenant(nullable=False, index=True),
    Column("server", String(32), nullable=False, index=True),
    Column("slot", BigInteger, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Column("created", Float, nullable=False),
)
servers = _table("servers", Column("id", String(32), primary_key=True), Column("seen", Float, nullable=False))
