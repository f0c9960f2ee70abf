"""Tenants: keys and who they open for, rights, what is stored, and that secrets are seen nowhere."""

import logging
import sqlite3
import threading
from dataclasses import replace

import pytest
from sqlalchemy import select, update

from molora.errors import ConfigError
from molora.serve.request import ServeError
from molora.serve.tenants import tables
from molora.serve.tenants.database import Database
from molora.serve.tenants.keys import check_given, id_of
from molora.serve.tenants.store import Tenants
from molora.serve.tenants.tenant import EVERYBODY, Limits, Tenant, resolve
from tests.serve.databases import Clock, memory, opened

NEWS = Tenant("news", 2.0, frozenset({"headlines", "news-*", "law@2"}), True, False, Limits(60, 1000, 5000, 4))


# --- tenants and keys ---------------------------------------------------------------------------------------------


def test_what_is_put_is_what_is_read(tenants):
    tenants.put(NEWS)
    tenants.put(Tenant("a"))
    assert tenants.all() == [Tenant("a"), NEWS]
    changed = replace(NEWS, models=frozenset({"other"}), limits=Limits())
    tenants.put(changed)
    assert tenants.get("news") == changed
    with pytest.raises(ConfigError, match="tenant 'new' is unknown; did you mean 'news'"):
        tenants.get("new")


def test_a_key_opens_for_its_tenant_alone(tenants):
    tenants.put(NEWS)
    tenants.put(Tenant("a"))
    news, other, admin = tenants.add_key("news"), tenants.add_key("a"), tenants.add_key(None, "ops")
    assert tenants.authenticate(news.secret) == NEWS
    assert tenants.authenticate(other.secret) == Tenant("a")
    assert tenants.authenticate(admin.secret) is None and tenants.is_admin(admin.secret)
    assert not tenants.is_admin(news.secret)
    wrong = [news.secret[:-1], news.secret + "x", news.secret.swapcase(), "", "x", "\0", "ü", "\ud800", "x" * 100_000]
    wrong.append(news.secret[:-1] + ("A" if news.secret[-1] != "A" else "B"))
    wrong.append(news.secret.replace(news.id, other.id))  # the id of one, the secret of another
    for key in wrong:
        assert tenants.authenticate(key) is None and not tenants.is_admin(key), key


def test_keys_end(tenants):
    tenants.put(NEWS)
    clock = tenants.clock
    one, two = tenants.add_key("news"), tenants.add_key("news", expires=clock() + 100)
    assert tenants.authenticate(one.secret) and tenants.authenticate(two.secret)
    clock.wait(99)
    assert tenants.authenticate(two.secret)
    clock.wait(1)
    assert tenants.authenticate(two.secret) is None  # to the second, though it was read a second ago
    assert tenants.authenticate(tenants.add_key("news", expires=0.0).secret) is None  # long over, and not for ever
    assert tenants.revoke(one.id) == [one.id] and tenants.revoke(one.id) == []
    assert tenants.authenticate(one.secret) is None
    assert [key.is_good(clock()) for key in tenants.keys("news")] == [False] * 3
    with pytest.raises(ConfigError, match="neither the id of a key nor a tenant"):
        tenants.revoke("nobody")


def test_keys_are_rotated(tenants):
    tenants.put(NEWS)
    old, older, admin = tenants.add_key("news"), tenants.add_key("news"), tenants.add_key(None, "ops")
    new = tenants.rotate(old.id, grace=60)
    assert [bool(tenants.authenticate(key.secret)) for key in (old, older, new)] == [True, True, True]
    tenants.clock.wait(60)
    assert [bool(tenants.authenticate(key.secret)) for key in (old, older, new)] == [False, True, True]
    newest = tenants.rotate("news")
    assert [bool(tenants.authenticate(key.secret)) for key in (old, older, new, newest)] == [False, False, False, True]
    fresh = tenants.rotate(admin.id)
    assert tenants.is_admin(fresh.secret) and not tenants.is_admin(admin.secret)
    with pytest.raises(ConfigError, match="revoked or has expired"):
        tenants.rotate(old.id)


def test_another_server_notices_within_the_time_of_the_cache(tenants, database_url):
    """What is revoked or taken away on one server ends on others after `cache` seconds, and not later."""
    tenants.put(NEWS)
    one, two = tenants.add_key("news"), tenants.add_key("news")
    with Tenants(database_url, cache=5.0, clock=tenants.clock) as other:
        assert other.authenticate(one.secret) == NEWS and other.authenticate(two.secret) == NEWS
        tenants.revoke(one.id)
        tenants.put(Tenant("news"))
        tenants.clock.wait(5.0)
        assert other.authenticate(one.secret) is None
        assert other.authenticate(two.secret) == Tenant("news")


def test_a_recognised_key_costs_no_look_at_the_database(tenants, monkeypatch):
    tenants.put(NEWS)
    key = tenants.add_key("news").secret
    assert tenants.authenticate(key) == NEWS
    monkeypatch.setattr(tenants.database, "read", lambda: pytest.fail("the database was read"))
    assert tenants.authenticate(key) == NEWS


def test_a_key_revoked_while_it_is_looked_up_is_not_remembered():
    """The row was read before, the cache is written after the revocation: without care it would live on."""
    with opened() as tenants:
        tenants.put(NEWS)
        key = tenants.add_key("news")
        real, once = tenants.database.read, threading.Lock()

        class Slow:
            def __init__(self):
                self.inside = real()

            def __enter__(self):
                return self.inside.__enter__()

            def __exit__(self, *error):
                done = self.inside.__exit__(*error)
                if once.acquire(blocking=False):
                    tenants.revoke(key.id)  # between the reading and the remembering
                return done

        tenants.database.read = Slow
        assert tenants.authenticate(key.secret) == NEWS  # it was good when it was read
        tenants.database.read = real
        assert tenants.authenticate(key.secret) is None


def test_guessable_keys_are_refused():
    for key, why in (("short", "5 characters"), ("a" * 64, "could be guessed"), ("with space " * 5, "no key")):
        with pytest.raises(ConfigError, match=why) as caught:
            check_given(key, "variable X")
        assert key not in str(caught.value)
    check_given("0123456789abcdefghijklmnopqrstuv", "variable X")


@pytest.mark.parametrize(
    ("tenant", "why"),
    [
        (Tenant("a b"), "a name is letters"),
        (Tenant(""), "a name is letters"),
        (Tenant("a", weight=0), "weight must be a number"),
        (Tenant("a", weight=float("nan")), "weight must be a number"),
        (Tenant("a", weight="2"), "weight must be a number"),
        (Tenant("a", models=frozenset({"a*b"})), "neither a name"),
        (Tenant("a", models=frozenset({"**"})), "neither a name"),
        (Tenant("a", models=frozenset({"[a-z]"})), "neither a name"),
        (Tenant("a", limits=Limits(concurrent=0)), "limit 'concurrent' must be a whole number from 1"),
        (Tenant("a", limits=Limits(tokens_per_day=1.5)), "limit 'tokens_per_day'"),
        (Tenant("a", base=1), "base must be true or false"),
    ],
)
def test_bad_tenants_are_refused(tenant, why):
    with opened() as tenants, pytest.raises(ConfigError, match=why):
        tenants.put(tenant)


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(ConfigError) as caught:
        Tenant("a b", -1, frozenset({"*x"}), limits=Limits(0, 0)).check()
    assert "5 problems" in str(caught.value)


# --- rights -------------------------------------------------------------------------------------------------------


def test_rights():
    assert NEWS.visible(["headlines", "headlines@7", "headlines2", "news-a", "news", "law", "law@2", "law@3", "*"]) == [
        "headlines", "headlines@7", "news-a", "law@2",
    ]  # fmt: skip
    assert EVERYBODY.may("anything") and not Tenant("none").may("anything")


def test_unknown_and_forbidden_are_the_same():
    known = {"headlines": "headlines", "secret": "secret", "best": "secret", "mine": "headlines"}
    assert resolve(NEWS, "headlines", known) == resolve(NEWS, "mine", known) == "headlines"
    assert resolve(NEWS, "headlines", iter(known)) == "headlines"
    assert resolve(NEWS, "gemma", known, base=("gemma",)) == resolve(NEWS, "gemma", known, base="gemma") == "gemma"
    no_base = replace(NEWS, base=False)
    for tenant, name in ((NEWS, "secret"), (NEWS, "best"), (NEWS, "nothing"), (no_base, "gemma"), (NEWS, "gem")):
        with pytest.raises(ServeError) as caught:
            resolve(tenant, name, known, base="gemma")
        with pytest.raises(ServeError) as unknown:
            resolve(tenant, name, ())
        assert caught.value.body() == unknown.value.body()
        assert (caught.value.status, caught.value.code, caught.value.param) == (404, "model_not_found", "model")
        assert vars(caught.value) == vars(unknown.value) and caught.value.__cause__ is None
    with pytest.raises(ServeError) as long:
        resolve(NEWS, "x\n" * 10_000, known)
    assert len(long.value.message) < 400 and "\n" not in long.value.message


def test_an_alias_gives_no_right():
    """A pattern that covers the alias does not cover what it stands for."""
    tenant = Tenant("a", models=frozenset({"best"}))
    with pytest.raises(ServeError):
        resolve(tenant, "best", {"best": "secret"})


# --- secrets ------------------------------------------------------------------------------------------------------


def test_keys_are_seen_nowhere(tenants, caplog):
    """Not in the database, in any repr, in any log down to DEBUG, nor in errors."""
    caplog.set_level(logging.DEBUG)
    for name in ("sqlalchemy.engine", "sqlalchemy.pool"):
        caplog.set_level(logging.DEBUG, logger=name)
    tenants.put(NEWS)
    key, admin = tenants.add_key("news"), tenants.add_key(None, "ops")
    secrets = [key.secret, admin.secret]
    tenants.authenticate(key.secret), tenants.is_admin(admin.secret), tenants.authenticate(key.secret + "x")
    with pytest.raises(Exception) as clash, tenants.database.write() as connection:
        tenants.keep_key(connection, "news", key.secret, "again")  # its id is there already
    with tenants.database.read() as connection:
        stored = [repr(row) for table in tables.META.sorted_tables for row in connection.execute(select(table))]
    seen = [repr(key), repr(tenants), repr(vars(tenants)), repr(tenants.database), str(clash.value), caplog.text]
    seen += [repr(tenants.keys()), repr(tenants.authenticate(key.secret)), *stored]
    for secret in secrets:
        part = secret.rpartition("_")[2] if secret.count("_") == 2 else secret[-43:]
        assert not [text for text in seen if part[:12] in text or secret in text]
    assert "select" in caplog.text.lower()  # the log was really on


def test_the_same_key_is_stored_differently_each_time():
    stored = []
    for _ in range(2):
        with opened() as tenants:
            with tenants.database.write() as connection:
                tenants.keep_key(connection, None, "k" * 10 + "0123456789abcdefghijklmnop", "x")
            with tenants.database.read() as connection:
                stored.append(connection.execute(select(tables.keys)).one())
    assert stored[0].id == stored[1].id == id_of("k" * 10 + "0123456789abcdefghijklmnop")
    assert stored[0].hash != stored[1].hash and stored[0].salt != stored[1].salt


def test_a_password_in_the_url_is_not_shown():
    with pytest.raises(ConfigError) as caught:
        Tenants("postgresql+psycopg://molora:hunter2secret@127.0.0.1:1/none")
    assert "hunter2secret" not in str(caught.value) and caught.value.__suppress_context__
    with pytest.raises(ConfigError, match="cannot read it") as caught:
        Tenants("postgresql+nodriver://molora:hunter2secret@host/none")
    assert "hunter2secret" not in str(caught.value)


# --- the database -------------------------------------------------------------------------------------------------


def test_tables_of_another_version_are_refused(tenants, database_url):
    with tenants.database.write() as connection:
        connection.execute(update(tables.schema).values(version=7))
    with pytest.raises(ConfigError, match="tables of version 7, this molora knows version 1"):
        Tenants(database_url)


def test_what_is_no_database_is_refused(tmp_path):
    (tmp_path / "text.db").write_text("this is no database " * 100)
    for url, why in (
        (str(tmp_path / "text.db"), "not a database"),
        (str(tmp_path / "none" / "t.db"), "there is no folder"),
        (str(tmp_path), "cannot be opened"),
        ("nosuch://x", "cannot read it"),
    ):
        with pytest.raises(ConfigError, match=why):
            Tenants(url)


def test_the_file_is_for_its_owner_alone():
    with memory() as folder, Tenants(str(folder / "t.db")) as tenants:
        tenants.put(NEWS)
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
        journal = sqlite3.connect(folder / "t.db").execute("PRAGMA journal_mode").fetchone()
        assert journal == ("wal",)


def test_many_open_a_new_database_at_once(database_url):
    """Each creates the tables if nobody has; one wins, none fails."""
    errors, start = [], threading.Barrier(8)

    def work():
        start.wait(10)
        try:
            Database(database_url).close()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not errors
    Database(database_url).close()


def test_a_database_in_memory_serves_threads():
    with Tenants("sqlite://", clock=Clock()) as tenants:
        tenants.put(NEWS)
        found = []
        key = tenants.add_key("news").secret
        threads = [
            threading.Thread(target=lambda: found.append((tenants.authenticate(key), tenants.forget())[0]))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert found == [NEWS] * 8


def test_a_database_that_does_not_answer_is_a_503(tenants):
    tenants.put(NEWS)
    key = tenants.add_key("news").secret
    with tenants.database.write() as connection:
        tables.keys.drop(connection)
        tables.grants.drop(connection)
    for call in (lambda: tenants.authenticate(key), lambda: tenants.admit(NEWS, 1, 1)):
        with pytest.raises(ServeError) as caught:
            call()
        assert (caught.value.status, caught.value.code) == (503, "tenants_unavailable")
        assert "molora_" not in caught.value.message  # nothing about the inside
