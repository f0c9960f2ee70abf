"""Quotas and usage: against a list of everything that happened, with several servers, and with servers that die."""

import os
import signal
import sys
import threading
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import event, func, select, text
from sqlalchemy.exc import OperationalError

from molora.serve.request import ServeError
from molora.serve.tenants import tables
from molora.serve.tenants.counting import DAY, MINUTE, SLOT
from molora.serve.tenants.store import Tenants
from molora.serve.tenants.tenant import Limits, Tenant
from tests.serve.databases import Clock, memory, opened


def tenant_of(tenants, name="news", **limits):
    tenants.put(Tenant(name, limits=Limits(**limits)))
    return tenants.get(name)


def refused(tenants, tenant, *request):
    with pytest.raises(ServeError) as caught:
        tenants.admit(tenant, *request)
    assert caught.value.status == 429
    return caught.value


def totals(tenants, name="news"):
    rows = tenants.usage(name)
    return tuple(sum(getattr(row, what) for row in rows) for what in ("requests", "input_tokens", "output_tokens"))


# --- one limit at a time ------------------------------------------------------------------------------------------


def test_concurrent_requests(tenants):
    news = tenant_of(tenants, concurrent=2)
    one, two = tenants.admit(news, 1, 1), tenants.admit(news, 1, 1)
    error = refused(tenants, news, 1, 1)
    assert (error.code, error.retry_after) == ("too_many_concurrent", 1.0)
    assert "2 at a time" in error.message
    one.settle(1, 1)
    three = tenants.admit(news, 1, 1)
    refused(tenants, news, 1, 1)
    three.release()
    two.release()
    assert tenants.quotas.running() == {}
    assert totals(tenants) == (1, 1, 1)


def test_requests_per_minute(tenants):
    news = tenant_of(tenants, requests_per_minute=2)
    tenants.admit(news, 1, 1).settle(1, 1)
    tenants.clock.wait(10)
    tenants.admit(news, 1, 1).settle(1, 1)
    error = refused(tenants, news, 1, 1)
    assert error.code == "rate_limit_exceeded" and 50 <= error.retry_after <= 50 + SLOT
    tenants.clock.wait(error.retry_after)
    tenants.admit(news, 1, 1).settle(1, 1)
    refused(tenants, news, 1, 1)


def test_tokens_per_minute_reserve_and_give_back(tenants):
    news = tenant_of(tenants, tokens_per_minute=100)
    grant = tenants.admit(news, 30, 50)
    assert refused(tenants, news, 10, 20).code == "rate_limit_exceeded"
    grant.settle(30, 10)  # 40 of 80: the rest comes back
    tenants.admit(news, 10, 50).settle(10, 50)
    refused(tenants, news, 1, 0)
    tenants.clock.wait(MINUTE + SLOT)
    tenants.admit(news, 50, 50).release()  # all of it comes back
    tenants.admit(news, 50, 50)


def test_tokens_per_day(tenants):
    news = tenant_of(tenants, tokens_per_day=100)
    tenants.admit(news, 10, 60).settle(10, 20)
    running = tenants.admit(news, 10, 40)
    error = refused(tenants, news, 10, 11)  # 30 used, 50 reserved
    assert error.code == "quota_exceeded" and error.retry_after == DAY / 2  # it is noon
    assert "20 of 100 are left for today" in error.message
    tenants.clock.wait(error.retry_after)
    assert refused(tenants, news, 100, 1).retry_after is None  # it never fits
    tenants.admit(news, 100, 0)
    running.settle(10, 40)  # belongs to the day on which it was admitted
    assert [(row.day, row.input_tokens, row.output_tokens) for row in tenants.usage()] == [("2026-01-07", 20, 60)]


def test_the_longest_wait_is_told(tenants):
    news = tenant_of(tenants, requests_per_minute=1, tokens_per_day=10, concurrent=1)
    tenants.admit(news, 5, 5)
    assert refused(tenants, news, 1, 1).code == "quota_exceeded"
    assert refused(tenants, news, 100, 1).retry_after is None


def test_a_request_that_never_fits_is_told_so(tenants):
    news = tenant_of(tenants, tokens_per_minute=10)
    error = refused(tenants, news, 8, 3)
    assert error.retry_after is None and "never fits" in error.message and "lower max_tokens" in error.message


def test_a_refused_request_costs_nothing(tenants):
    news = tenant_of(tenants, requests_per_minute=1, tokens_per_minute=100)
    for _ in range(5):
        refused(tenants, news, 101, 0)
    tenants.admit(news, 100, 0)


def test_limits_are_those_of_now_and_tenants_that_are_gone_are_refused(tenants):
    stale = tenant_of(tenants, concurrent=5)
    tenants.admit(stale, 1, 1)
    tenant_of(tenants, concurrent=1)
    refused(tenants, stale, 1, 1)
    with pytest.raises(ServeError) as caught:
        tenants.admit(Tenant("nobody"), 1, 1)
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")


def test_tenants_do_not_count_for_each_other(tenants):
    limits = {"concurrent": 1, "requests_per_minute": 1, "tokens_per_minute": 10, "tokens_per_day": 10}
    one, two = tenant_of(tenants, "one", **limits), tenant_of(tenants, "two", **limits)
    tenants.admit(one, 5, 5).settle(5, 5, "digest")
    tenants.admit(two, 5, 5)
    assert totals(tenants, "one") == (1, 5, 5) and totals(tenants, "two") == (0, 0, 0)


def test_only_the_first_end_of_a_grant_counts(tenants):
    news = tenant_of(tenants, tokens_per_minute=100)
    with tenants.admit(news, 10, 10) as grant:
        grant.settle(10, 5, "a")
        grant.settle(10, 5, "a")
        grant.release()
    with tenants.admit(news, 10, 10):
        pass  # nothing was generated
    assert totals(tenants) == (1, 10, 5)
    tenants.admit(news, 85, 0)
    refused(tenants, news, 1, 0)


def test_usage_is_by_day_and_program(tenants):
    news = tenant_of(tenants)
    for program, days in (("a", 0), ("a", 0), ("b", 0), ("a", 1)):
        tenants.clock.wait(days * DAY)
        tenants.admit(news, 3, 9).settle(3, 4, program)
    assert [(row.day, row.program, row.requests, row.input_tokens, row.output_tokens) for row in tenants.usage()] == [
        ("2026-01-07", "a", 2, 6, 8), ("2026-01-07", "b", 1, 3, 4), ("2026-01-08", "a", 1, 3, 4),
    ]  # fmt: skip
    assert [row.day for row in tenants.usage("news", since="2026-01-08")] == ["2026-01-08"]


# --- against a list of everything ---------------------------------------------------------------------------------

steps = st.lists(
    st.one_of(
        st.tuples(st.just("admit"), st.integers(0, 30), st.integers(0, 30)),
        st.tuples(st.just("wait"), st.sampled_from([0.3, 1.0, 7.5, 29.0, 58.5, 61.0])),
        st.tuples(st.just("settle"), st.integers(0, 5), st.integers(0, 30)),
        st.tuples(st.just("release"), st.integers(0, 5), st.just(0)),
    ),
    min_size=5,
    max_size=25,
)


@settings(max_examples=30, deadline=None)
@given(steps, st.integers(1, 6), st.integers(30, 90), st.integers(1, 4))
def test_no_minute_ever_exceeds_its_limits(sequence, requests, tokens, concurrent):
    """Whatever happens: in no 60 seconds more than the limits; and who waits as told is admitted."""
    with opened("sqlite://") as tenants:
        news = tenant_of(tenants, requests_per_minute=requests, tokens_per_minute=tokens, concurrent=concurrent)
        happened, running, settled = [], [], []  # (time, tokens as a list of one, changed when settled)
        for name, *values in sequence:
            now = tenants.clock()
            if name == "wait":
                tenants.clock.wait(values[0])
                tenants.quotas.beat()  # the real heart follows a real clock
            elif name == "admit":
                # the slots may hold back for up to SLOT seconds what a list of exact times would allow
                recent = [cost for at, cost in happened if at > now - MINUTE - SLOT]
                try:
                    grant = tenants.admit(news, *values)
                except ServeError as error:
                    full = len(recent) >= requests or sum(cost[0] for cost in recent) + sum(values) > tokens
                    assert full or len(running) >= concurrent  # refused for a reason
                    if error.code == "rate_limit_exceeded" and error.retry_after is not None:
                        tenants.clock.wait(error.retry_after)
                        tenants.quotas.beat()
                        for old, cost in running:
                            old.release()
                            happened.remove(next(one for one in happened if one[1] is cost))
                        running = []
                        tenants.admit(news, *values).release()
                else:
                    assert len(running) < concurrent
                    cost = [sum(values)]
                    happened.append((now, cost))
                    running.append((grant, cost))
            elif running:
                grant, cost = running.pop(values[0] % len(running))
                if name == "settle":
                    used = min(values[1], cost[0])
                    grant.settle(0, used)
                    cost[0] = used
                    settled.append(used)
                else:
                    grant.release()
                    happened.remove(next(one for one in happened if one[1] is cost))
            for end, _ in happened:
                window = [cost for at, cost in happened if end - MINUTE < at <= end]
                assert len(window) <= requests and sum(cost[0] for cost in window) <= tokens
        assert totals(tenants) == (len(settled), 0, sum(settled))
        assert tenants.quotas.running() == ({"news": len(running)} if running else {})


@pytest.mark.parametrize("offset", [0.0, 0.5, 1.0, 1.75])
def test_a_minute_is_sixty_seconds_wherever_it_begins(offset):
    """Refused while what was admitted is younger than 60 seconds, admitted as soon as it is SLOT older than that."""
    with opened("sqlite://") as tenants:
        news = tenant_of(tenants, requests_per_minute=1)
        tenants.clock.wait(offset)
        start = tenants.clock()
        tenants.admit(news, 1, 1).settle(1, 1)
        for quarter in range(4 * (MINUTE - 4), 4 * MINUTE):
            tenants.clock.now = start + quarter / 4
            error = refused(tenants, news, 1, 1)
            assert 0 < start + MINUTE - tenants.clock() <= error.retry_after <= start + MINUTE + SLOT - tenants.clock()
        tenants.clock.now = start + MINUTE + SLOT
        tenants.admit(news, 1, 1)


def test_old_slots_are_forgotten(tenants):
    news = tenant_of(tenants, requests_per_minute=1000)
    for _ in range(40):
        tenants.admit(news, 1, 1).settle(1, 1)
        tenants.clock.wait(10)
    with tenants.database.read() as connection:
        assert connection.execute(select(func.count()).select_from(tables.windows)).scalar_one() <= 14


# --- several servers ----------------------------------------------------------------------------------------------


def test_two_servers_count_together(tenants, database_url):
    news = tenant_of(tenants, concurrent=2, tokens_per_minute=100)
    with Tenants(database_url, clock=tenants.clock) as other:
        here, there = tenants.admit(news, 10, 10), other.admit(news, 10, 10)
        assert refused(tenants, news, 1, 1).code == refused(other, news, 1, 1).code == "too_many_concurrent"
        there.settle(10, 0)
        here.settle(10, 0)
        other.admit(news, 80, 0).settle(80, 0)
        assert refused(tenants, news, 1, 0).code == "rate_limit_exceeded"
        assert totals(tenants) == totals(other) == (3, 100, 0)


def test_threads_and_servers_never_pass_a_limit_together(tenants, database_url):
    """Eight threads on two servers try 20 times each; a limit that is read and written apart would be passed."""
    news = tenant_of(tenants, concurrent=5, requests_per_minute=40)
    admitted, most, running, lock = Counter(), 0, 0, threading.Lock()
    with Tenants(database_url, clock=tenants.clock) as other:

        def work(server):
            nonlocal most, running
            for _ in range(20):
                try:
                    grant = server.admit(news, 1, 1)
                except ServeError as error:
                    admitted[error.code] += 1
                    continue
                with lock:
                    running += 1
                    most = max(most, running)
                admitted["ok"] += 1
                with lock:
                    running -= 1
                grant.settle(1, 1)

        threads = [threading.Thread(target=work, args=(server,)) for server in (tenants, other) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
    assert sum(admitted.values()) == 160 and set(admitted) <= {"ok", "rate_limit_exceeded", "too_many_concurrent"}
    assert admitted["ok"] <= 40 and most <= 5
    assert totals(tenants) == (admitted["ok"],) * 3
    assert admitted["ok"] == 40  # and there was room for them: far more were tried


def test_the_slots_of_a_silent_server_come_back(tenants, database_url):
    news = tenant_of(tenants, concurrent=1, tokens_per_day=100)
    dead = Tenants(database_url, clock=tenants.clock, lease=30)
    grant = dead.admit(news, 50, 50)
    dead.quotas._stop.set()  # no more signs of life, as if it were killed
    tenants.clock.wait(29)
    assert refused(tenants, news, 1, 1).status == 429
    tenants.clock.wait(1)
    tenants.admit(news, 50, 50).settle(20, 20)
    grant.settle(30, 30)  # it was only slow: what it did counts after all, once
    assert totals(tenants) == (2, 50, 50)
    tenants.clock.wait(2 * DAY)
    tenants.quotas.beat()
    with tenants.database.read() as connection:
        assert connection.execute(select(tables.servers.c.id)).scalars().all() == [tenants.quotas.server]
    dead.database.close()


def test_a_closed_server_gives_back_what_it_holds(tenants, database_url):
    news = tenant_of(tenants, concurrent=1)
    with Tenants(database_url, clock=tenants.clock) as other:
        other.admit(news, 1, 1)
        refused(tenants, news, 1, 1)
    tenants.admit(news, 1, 1)


def test_usage_that_cannot_be_written_is_written_later_and_once(tenants):
    news = tenant_of(tenants, concurrent=1)
    grant, broken = tenants.admit(news, 5, 5), True

    def fail(*_):
        if broken:
            raise OperationalError("disk", {}, Exception("I/O error"))

    event.listen(tenants.database.engine, "commit", fail)
    grant.settle(5, 3, "a")  # does not raise: the caller has its answer
    broken = False
    assert totals(tenants) == (0, 0, 0)
    tenants.quotas.beat()
    tenants.quotas.beat()
    assert totals(tenants) == (1, 5, 3)


def test_a_commit_whose_answer_was_lost_is_not_repeated(tenants):
    """The row is written, but the caller hears of an error, as when the network breaks: the second try does nothing."""
    news = tenant_of(tenants)
    grant = tenants.admit(news, 5, 5)
    real = tenants.quotas._finish

    def lost(*args):
        real(*args)
        raise OperationalError("network", {}, Exception("connection reset"))

    tenants.quotas._finish = lost
    grant.settle(5, 3)
    tenants.quotas._finish = real
    tenants.quotas.beat()
    assert totals(tenants) == (1, 5, 3)


# --- kill -9 ------------------------------------------------------------------------------------------------------


def serve_busily(url, out):
    """What the server does that will be killed: three threads that admit and settle, and one request that runs on."""
    tenants = Tenants(url, lease=2.0)
    news = tenants.get("news")

    def work():
        while True:
            grant = tenants.admit(news, 3, 10)
            os.write(out, b"admitted\n")  # one call, so that lines of threads do not mix
            grant.settle(3, 4, "program")
            os.write(out, b"settled\n")

    held = tenants.admit(news, 1, 1)
    for _ in range(3):
        threading.Thread(target=work, daemon=True).start()
    threading.Event().wait(60)
    held.release()


@pytest.mark.parametrize("lines", [1, 40, 171])
def test_usage_survives_kill_9(tenants, database_url, lines):
    """A server with three busy threads is killed: all that it said was settled is there, and at most one more each."""
    tenants.clock.now = time.time()
    tenant_of(tenants, tokens_per_day=10**9, requests_per_minute=10**6, concurrent=10)
    ours, theirs = os.pipe()
    server = os.fork()
    if server == 0:
        try:
            serve_busily(database_url, theirs)
        finally:
            os._exit(1)
    os.close(theirs)
    with open(ours, encoding="ascii") as output:
        try:
            said = Counter(next(output).strip() for _ in range(lines))
        finally:
            os.kill(server, signal.SIGKILL)
            status = os.waitpid(server, 0)[1]
        said += Counter(line.strip() for line in output)
    assert os.WTERMSIG(status) == signal.SIGKILL  # it did not end by itself
    requests, read, written = totals(tenants)
    assert said["settled"] <= requests <= said["settled"] + 3
    assert (read, written) == (3 * requests, 4 * requests)
    # its slots: taken now, free once it has been silent for the lease
    tenants.clock.now = time.time()
    assert 1 <= sum(tenants.quotas.running().values()) <= 4
    tenants.quotas.lease = 2.0
    tenants.clock.wait(2.1)
    news = tenant_of(tenants, concurrent=1, tokens_per_day=read + written + 10)
    tenants.admit(news, 5, 5).settle(1, 1)  # neither its slots nor its reservations are held
    assert totals(tenants) == (requests + 1, read + 1, written + 1)
    with tenants.database.read() as connection:
        if database_url.startswith("sqlite"):
            assert connection.execute(text("PRAGMA integrity_check")).scalar_one() == "ok"


def killed_at(point, work):
    """Run `work(tenants)` in a process that is killed at its point-th statement or commit; whether it was."""
    child = os.fork()
    if child == 0:
        left = [point]

        def step(*_):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            work(step)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_a_kill_at_any_statement_leaves_all_or_nothing():
    """Admit and settle, killed before each statement and each commit: the request is there whole, or not at all."""
    with memory() as folder:
        with Tenants(str(folder / "t.db")) as tenants:
            tenant_of(tenants, tokens_per_minute=1000, tokens_per_day=10_000, concurrent=3)

        def work(step):
            tenants = Tenants(str(folder / "t.db"), clock=clock)
            news = tenants.get("news")
            tenants.quotas.beat()
            tenants.quotas._beating = threading.current_thread()  # no other thread, so that the points are the same
            for name in ("before_cursor_execute", "commit"):
                event.listen(tenants.database.engine, name, step)
            grant = tenants.admit(news, 10, 20)
            grant.settle(10, 5, "p")

        point, done, seen, clock = 0, 0, set(), Clock()
        while True:
            was_killed = killed_at(point, work)
            with Tenants(str(folder / "t.db"), clock=clock) as tenants:
                requests, read, written = totals(tenants)
                with tenants.database.read() as connection:
                    window = connection.execute(select(func.sum(tables.windows.c.tokens))).scalar() or 0
                    held = connection.execute(select(func.sum(tables.grants.c.tokens))).scalar() or 0
                assert (read, written) == (10 * requests, 5 * requests)
                # what is in the minute is what was settled in it, and what is still reserved
                assert window == 15 * (requests - done) + held and held in (0, 30)
                seen.add((requests - done, held))
            done = requests
            if not was_killed:
                break
            clock.wait(MINUTE + SLOT)  # a new minute, and the lease is over
            with Tenants(str(folder / "t.db"), clock=clock) as tenants, tenants.database.write() as connection:
                for table in (tables.grants, tables.windows):
                    connection.execute(table.delete())
            point += 1
        assert point > 10 and seen == {(0, 0), (0, 30), (1, 0)}  # every outcome, and no other
