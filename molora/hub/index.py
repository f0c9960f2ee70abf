"""Index: a cache of what the folders of a library say, in SQLite, for listing and searching.

The folders are the truth. Every use compares a stamp of each version (sizes and times of its files) with the stamps in
the index and reads again what differs, so an index that is lost, old or behind another process mends itself; one that
is damaged is deleted and built anew. Writers hold the library's lock. The index keeps SQLite's rollback journal and
not a write-ahead log: it works on network file systems too, and a damaged file can be replaced while others read it,
because nobody writes to it through a file that was opened before the lock was taken and found damaged. Where nothing
can be written, the index is built in memory.

Words are found by FTS5 where SQLite has it, else by LIKE: the same versions, ranked a little differently.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sqlite3
import unicodedata
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from ..errors import ConfigError, LoadError
from .card import AdapterCard
from .disk import INDEX, Disk
from .entry import Entry
from .names import Ref

T = TypeVar("T")
SCHEMA = 2  # odd numbers have FTS5
TRIES = 3  # to build an index that somebody damages meanwhile
WAIT = 30.0  # seconds for another process's transaction
# searched texts, and what a word in them weighs
FIELDS = {"name_words": 8.0, "task": 4.0, "description": 2.0, "rest": 1.0}
MAX_WORDS = 64  # of a search
_TABLE = f"""
CREATE TABLE versions (
    name TEXT, version INTEGER, stamp TEXT, entry TEXT, {", ".join(f"{field} TEXT" for field in FIELDS)},
    PRIMARY KEY (name, version)
)"""


@lru_cache(maxsize=1)
def has_fts5() -> bool:
    """Whether this SQLite can search words by FTS5."""
    with closing(sqlite3.connect(":memory:")) as db:
        try:
            db.execute("CREATE VIRTUAL TABLE probe USING fts5(words)")
        except sqlite3.OperationalError:
            return False
    return True


def words_of(text: str) -> list[str]:
    """Return the words of a text in small letters without accents, as they are stored and searched."""
    plain = unicodedata.normalize("NFKD", text.casefold().encode("utf-8", "ignore").decode())
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    return re.findall(r"[^\W_]+", plain)


class Index:
    """The index of one library.

    Args:
        disk: its folders.
        fts: search words by FTS5; by default where SQLite has it.
    """

    def __init__(self, disk: Disk, fts: bool | None = None) -> None:
        self.disk = disk
        self.path: Path = disk.root / INDEX
        self.fts = has_fts5() if fts is None else fts
        self.schema = 2 * SCHEMA + int(self.fts)

    def entries(self, name: str | None = None) -> list[Entry]:
        """Return every version, or those of one adapter, in order of name and version."""
        where, given = ("WHERE name = ?", (name,)) if name is not None else ("", ())
        query = f"SELECT name, version, entry FROM versions {where} ORDER BY name, version"
        rows = self._use(lambda db: db.execute(query, given).fetchall())
        return [self._entry(*row) for row in rows]

    def find(self, text: str) -> dict[Ref, float]:
        """Return the versions that hold a word that starts with one of the text's, and a score: more is better.

        Raises:
            ConfigError: the text holds no word.
        """
        wanted = list(dict.fromkeys(words_of(text)))[:MAX_WORDS]
        if not wanted:
            raise ConfigError(f"the text {text!r} holds no word to search for")
        found = self._use(lambda db: _find_fts(db, wanted) if self.fts else _find_like(db, wanted))
        return {Ref(name, version): score for name, version, score in found}

    def sync(self) -> None:
        """Bring the index up to date with the folders."""
        self._use(lambda db: None)

    def rebuild(self) -> None:
        """Forget the index and read every folder again."""
        with self.disk.changing():
            self._delete()
            try:
                self._mended(lambda db: None)
            except sqlite3.DatabaseError as error:
                raise self._cannot_be_built(error) from error

    # --- inside -------------------------------------------------------------------------------------------------------

    def _use(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Return what `work` does with an index that is up to date."""
        there, _ = self.disk.scan()  # tells when there is no library
        if not there and not self.path.exists():
            return self._in_memory(work)  # of nothing: a folder that is no library is left as it is
        try:
            return self._attempt(work)
        except sqlite3.DatabaseError:
            pass  # damaged, of another version of molora, or not to be written
        except ConfigError:  # no lock on a folder that cannot be written
            return self._in_memory(work)
        try:
            with self.disk.changing():
                return self._mended(work)
        except (ConfigError, OSError):
            return self._in_memory(work)
        except sqlite3.DatabaseError as error:
            raise self._cannot_be_built(error) from error

    def _mended(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do `work`, building the index anew where it is damaged; the caller holds the lock.

        First as it is, since another process may have mended it. Then anew, and more than once: a program that
        deletes or overwrites the file holds no lock, and may do so while it is being built.
        """
        for _ in range(TRIES):
            try:
                return self._attempt(work)
            except sqlite3.DatabaseError:
                self._delete()
        return self._attempt(work)

    def _cannot_be_built(self, error: sqlite3.DatabaseError) -> LoadError:
        return LoadError(f"the index '{self.path}' cannot be built: {error}; is the disk full?")

    def _attempt(self, work: Callable[[sqlite3.Connection], T]) -> T:
        with closing(self._connect()) as db:
            if self._is_stale(db):
                with self.disk.changing():
                    self._sync(db)
            return work(db)

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=WAIT, isolation_level=None)

    def _delete(self) -> None:
        # the file first: SQLite drops a journal without a file, but would play it into a new one
        for path in (self.path, self.path.with_name(f"{INDEX}-journal")):
            with suppress(FileNotFoundError):
                path.unlink()

    def _in_memory(self, work: Callable[[sqlite3.Connection], T]) -> T:
        with closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
            self._sync(db)
            return work(db)

    def _is_stale(self, db: sqlite3.Connection) -> bool:
        (schema,) = db.execute("PRAGMA user_version").fetchone()
        if schema == 0:
            return True
        if schema != self.schema:
            raise sqlite3.DatabaseError(f"index of schema {schema}, not {self.schema}")
        return _stamps(db) != self.disk.scan()[0]

    def _sync(self, db: sqlite3.Connection) -> None:
        """Bring the rows up to date in one transaction; the caller holds the lock, unless the index is in memory."""
        db.execute("BEGIN IMMEDIATE")
        try:
            if db.execute("PRAGMA user_version").fetchone()[0] == 0:
                db.execute(_TABLE)
                if self.fts:
                    db.execute(f"CREATE VIRTUAL TABLE texts USING fts5({', '.join(FIELDS)})")
                db.execute(f"PRAGMA user_version = {self.schema}")
            known, there = _stamps(db), self.disk.scan()[0]
            for ref in [ref for ref, stamp in known.items() if there.get(ref) != stamp]:
                self._forget(db, ref)
            for ref, stamp in there.items():
                if known.get(ref) != stamp:
                    self._insert(db, ref, stamp)
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise

    def _forget(self, db: sqlite3.Connection, ref: Ref) -> None:
        if self.fts:
            db.execute(
                "DELETE FROM texts WHERE rowid = (SELECT rowid FROM versions WHERE name = ? AND version = ?)", ref
            )
        db.execute("DELETE FROM versions WHERE name = ? AND version = ?", ref)

    def _insert(self, db: sqlite3.Connection, ref: Ref, stamp: str) -> None:
        entry = self.disk.entry(ref)
        texts = _texts(entry)
        fields = [f" {' '.join(words_of(texts[name]))}" for name in FIELDS]
        row = [*ref, stamp, json.dumps(_to_row(entry)), *fields]
        cursor = db.execute(f"INSERT INTO versions VALUES ({', '.join('?' * len(row))})", row)
        if self.fts:
            marks = ", ".join("?" * len(fields))
            db.execute(
                f"INSERT INTO texts (rowid, {', '.join(FIELDS)}) VALUES (?, {marks})", [cursor.lastrowid, *fields]
            )

    def _entry(self, name: str, version: int, row: str) -> Entry:
        try:
            content = json.loads(row)
            card = AdapterCard.from_dict(content.pop("card"))
            content["problems"] = tuple(content["problems"])
            return Entry(name, version, self.disk.folder(Ref(name, version)), card, **content)
        except (ValueError, TypeError, KeyError, ConfigError):  # a row that nobody wrote like this
            return self.disk.entry(Ref(name, version))


def _stamps(db: sqlite3.Connection) -> dict[Ref, str]:
    rows = db.execute("SELECT name, version, stamp FROM versions")
    return {Ref(name, version): stamp for name, version, stamp in rows}


def _to_row(entry: Entry) -> dict[str, Any]:
    kept = ("kind", "rank", "parameters", "bytes", "problems")
    content = {f.name: getattr(entry, f.name) for f in dataclasses.fields(entry) if f.name in kept}
    return {**content, "card": entry.card.to_dict()}


def _texts(entry: Entry) -> Mapping[str, str]:
    card = entry.card
    rest = " ".join((card.base, card.licence, entry.kind, *card.authors, *card.data, *card.prompts))
    return {"name_words": entry.name, "task": card.task, "description": card.description, "rest": rest}


def _find_fts(db: sqlite3.Connection, wanted: list[str]) -> list[tuple[str, int, float]]:
    query = " OR ".join(f'"{word}"*' for word in wanted)
    weights = ", ".join(str(weight) for weight in FIELDS.values())
    return db.execute(
        f"SELECT v.name, v.version, t.score FROM (SELECT rowid AS id, -bm25(texts, {weights}) AS score FROM texts "
        "WHERE texts MATCH ?) AS t JOIN versions AS v ON v.rowid = t.id ORDER BY t.score DESC, v.name, v.version",
        (query,),
    ).fetchall()


def _find_like(db: sqlite3.Connection, wanted: list[str]) -> list[tuple[str, int, float]]:
    terms = " + ".join(f"{weight} * ({field} LIKE ?)" for _ in wanted for field, weight in FIELDS.items())
    return db.execute(
        f"SELECT * FROM (SELECT name, version, {terms} AS score FROM versions) "
        "WHERE score > 0 ORDER BY score DESC, name, version",
        [f"% {word}%" for word in wanted for _ in FIELDS],
    ).fetchall()
