"""The database of tenants: SQLite, or PostgreSQL by its URL.

The SQL is what both know. On SQLite a write transaction takes the write lock when it begins, waits for others that
write, and does not wait for the disk at its end (`synchronous=NORMAL` with a write-ahead log): what was committed
survives a killed process; a power cut may take the last moments, never the file.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, QueuePool, create_engine, event, insert, inspect, make_url, select
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError

from ...errors import ConfigError
from ..request import ServeError
from .tables import META, VERSION, schema

BUSY = 30.0  # seconds that a write waits for others on SQLite

log = logging.getLogger(__name__)


class Database:
    """The connection: `write()` and `read()` give transactions.

    Args:
        url: of SQLAlchemy, such as `sqlite:///tenants.db` or `postgresql+psycopg://user@host/name`, or a file name.

    Raises:
        ConfigError: the database cannot be opened, or its tables are of another version.
    """

    def __init__(self, url: str) -> None:
        given = url if "://" in url else f"sqlite:///{url}"
        try:
            parsed = make_url(given)
            options: dict[str, Any] = {"pool_pre_ping": True}
            self._is_sqlite = parsed.get_backend_name() == "sqlite"
            if self._is_sqlite:
                options = _sqlite_options(parsed.database)
            self.engine: Engine = create_engine(parsed, hide_parameters=True, **options)
        except (ArgumentError, NoSuchModuleError, ImportError) as error:
            # the text of these errors may quote the whole URL, and with it a password
            why = f"'{error.name}' is not installed" if isinstance(error, ImportError) else "SQLAlchemy cannot read it"
            raise ConfigError(
                f"the database of tenants cannot be opened: {why}; write a URL such as sqlite:///tenants.db or "
                "postgresql+psycopg://user@host/name"
            ) from None
        self.shown = parsed.render_as_string(hide_password=True)
        # SQLite lets waiting writers try again after pauses, in no order; within this process a lock is quicker
        self._writing = threading.Lock() if self._is_sqlite else nullcontext()
        if self._is_sqlite:
            _listen(self.engine)
        self._open()

    def __repr__(self) -> str:
        return f"Database({self.shown!r})"

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """Yield a transaction that is committed at the end, or rolled back by an exception."""
        with self._writing, self.engine.connect() as connection:
            connection.info["writes"] = True
            try:
                with connection.begin():
                    yield connection
            finally:
                connection.info.pop("writes", None)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Yield a transaction that only reads."""
        with self.engine.connect() as connection, connection.begin():
            yield connection

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    def _open(self) -> None:
        try:
            try:
                self._create()
            except DBAPIError:
                self._create()  # another process created the tables in the same moment, or something is really wrong
            with self.read() as connection:
                found = connection.execute(select(schema.c.version)).scalars().all()
        except SQLAlchemyError as error:
            reason = getattr(error, "orig", None) or error
            self.close()
            raise ConfigError(f"the database of tenants '{self.shown}' cannot be opened: {reason}") from None
        if found != [VERSION]:
            self.close()
            raise ConfigError(
                f"the database of tenants '{self.shown}' has tables of version {', '.join(map(str, found)) or 'none'}, "
                f"this molora knows version {VERSION}: use the molora that wrote it, or another database"
            )

    def _create(self) -> None:
        """Create the tables in a database that has none of them."""
        with self.read() as connection:
            if inspect(connection).has_table(schema.name):
                return
        with self.write() as connection:
            if not inspect(connection).has_table(schema.name):
                META.create_all(connection)
                connection.execute(insert(schema), {"version": VERSION})


def _sqlite_options(file: str | None) -> dict[str, Any]:
    if file in (None, "", ":memory:"):  # one connection, or each would have a database of its own
        return {
            "poolclass": QueuePool,
            "pool_size": 1,
            "max_overflow": 0,
            "connect_args": {"check_same_thread": False},
        }
    path = Path(str(file))
    if not path.parent.is_dir():
        raise ConfigError(f"the database of tenants cannot be '{path}': there is no folder '{path.parent}'")
    try:  # hashes of keys and who used what are nobody else's business
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        raise ConfigError(f"the database of tenants '{path}' cannot be opened: {error.strerror}") from None
    return {"connect_args": {"timeout": BUSY}}


def _run(cursor: Any, statement: str) -> None:
    """Run a statement; SQLite does not wait by itself when two processes turn on the log of a new file at once."""
    end = time.monotonic() + BUSY
    while True:
        try:
            cursor.execute(statement)
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > end:
                raise
            time.sleep(0.01)


def _listen(engine: Engine) -> None:
    """Set up connections of SQLite: its own BEGIN, at once for writing; a write-ahead log; foreign keys."""

    @event.listens_for(engine, "connect")
    def connected(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # Python's module begins nothing by itself
        cursor = connection.cursor()
        for pragma in (f"busy_timeout={int(BUSY * 1000)}", "journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
            _run(cursor, f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begun(connection: Connection) -> None:
        # a transaction that reads first and writes later could find that another one wrote in between
        connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.info.get("writes") else "BEGIN")


@contextmanager
def answering() -> Iterator[None]:
    """Turn errors of the database into a 503 that tells nothing about it; the log says more."""
    try:
        yield
    except SQLAlchemyError as error:
        log.error("the database of tenants does not answer: %s", getattr(error, "orig", None) or type(error).__name__)
        raise ServeError(
            "tenants cannot be checked now; try again", 503, "tenants_unavailable", retry_after=5
        ) from None
