"""The fair scheduler: against a loop over one list, and against the bounds of arXiv 2401.00588, section 4."""

import random
import threading
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molora.errors import ConfigError
from molora.serve.engine.fair import W_IN, W_OUT, Scheduler


@dataclass(eq=False)
class Job:
    tenant: str
    input: int
    output: int
    done: int = 0
    adapter: str = ""


class Reference:
    """The rules said plainly: one list of everything that waits, and everything recomputed at every call."""

    def __init__(self):
        self.waiting, self.counters, self.weights, self.passed, self.last = [], {}, {}, set(), None

    def tenants(self):
        return list(dict.fromkeys(job.tenant for job in self.waiting))

    def push(self, tenant, weight, job):
        self.weights[tenant] = weight
        if tenant not in self.tenants():
            self.passed.discard(tenant)
            those = [t for t in self.tenants() if t not in self.passed] or self.tenants() or [self.last]
            self.counters[tenant] = max(self.counters.get(tenant, 0.0), min(self.counters.get(t, 0.0) for t in those))
        self.waiting.append(job)

    def pop(self, admissible, fits):
        def turn(tenant):
            return self.counters[tenant], [job.tenant for job in self.waiting].index(tenant)

        for tenant in sorted(self.tenants(), key=turn):
            could = [job for job in self.waiting if job.tenant == tenant and admissible(job)]
            if could:
                self.passed.discard(tenant)
                if not fits(could[0]):
                    return None
                self.remove(could[0])
                self.charge(tenant, could[0].input, 0)
                return could[0]
            self.passed.add(tenant)
        return None

    def charge(self, tenant, input, output):
        self.counters[tenant] += (W_IN * input + W_OUT * output) / self.weights[tenant]

    def remove(self, job):
        if job not in self.waiting:
            return False
        self.waiting.remove(job)
        if job.tenant not in self.tenants():
            self.last = job.tenant
        return True


WEIGHTS = {"a": 1.0, "b": 2.0, "c": 0.5, "d": 3.0}
calls = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.sampled_from("abcd"), st.integers(0, 50), st.sampled_from("xyz")),
        st.tuples(st.just("pop"), st.sets(st.sampled_from("xyz")), st.integers(0, 60)),
        st.tuples(st.just("charge"), st.sampled_from("abcd"), st.integers(0, 20)),
        st.tuples(st.just("remove"), st.integers(0, 30)),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(calls)
def test_every_answer_is_that_of_the_plain_loop(sequence):
    ours, plain, jobs = Scheduler(), Reference(), []
    for call in sequence:
        if call[0] == "push":
            job = Job(call[1], call[2], 0, adapter=call[3])
            jobs.append(job)
            ours.push(job.tenant, WEIGHTS[job.tenant], job, job.input)
            plain.push(job.tenant, WEIGHTS[job.tenant], job)
        elif call[0] == "pop":
            rules = (lambda job, r=call[1]: job.adapter in r), (lambda job, room=call[2]: job.input <= room)
            assert ours.pop(*rules) is plain.pop(*rules)
        elif call[0] == "charge" and call[1] in plain.counters:
            ours.charge(call[1], output=call[2])
            plain.charge(call[1], 0, call[2])
        elif call[0] == "remove" and jobs:
            job = jobs[call[1] % len(jobs)]
            assert ours.remove(job) == plain.remove(job)
        assert len(ours) == len(plain.waiting)
        assert set(ours) == set(plain.waiting)
        assert {name: share.counter for name, share in ours.shares().items()} == plain.counters


# --- the bounds of the paper --------------------------------------------------------------------------------------


@dataclass
class Server:
    """A continuous batch with room for `room` tokens: admits by the scheduler, generates one token each per step."""

    weights: dict[str, float]
    room: int
    scheduler: Scheduler = field(default_factory=Scheduler)
    running: list[Job] = field(default_factory=list)
    service: dict[str, float] = field(default_factory=dict)

    def push(self, job):
        self.scheduler.push(job.tenant, self.weights[job.tenant], job, job.input)

    def held(self):
        return sum(job.input + job.output for job in self.running)  # the end is reserved, as the engine does

    def serve(self, job, tokens):
        self.service[job.tenant] = self.service.get(job.tenant, 0.0) + tokens

    def step(self):
        while (job := self.scheduler.pop(fits=lambda j: self.held() + j.input + j.output <= self.room)) is not None:
            self.running.append(job)
            self.serve(job, W_IN * job.input)
        for job in self.running:
            job.done += 1
            self.serve(job, W_OUT)
            self.scheduler.charge(job.tenant, output=1)
        self.running = [job for job in self.running if job.done < job.output]


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(st.sampled_from("abcde"), st.sampled_from([0.5, 1.0, 2.0, 4.0]), min_size=2, max_size=5),
    st.integers(0, 2**31),
    st.sampled_from([40, 100, 400]),
)
def test_backlogged_tenants_stay_within_the_bound_of_the_paper(weights, seed, room):
    """Theorem 4.4: over any time in which two tenants wait, their service per weight differs by at most 2 U / w."""
    draw = random.Random(seed)
    server, longest = Server(weights, room), 20
    kinds = {t: (draw.randint(1, longest), draw.randint(1, 20)) for t in weights}  # very unlike each other
    history = []
    for _ in range(150):
        for tenant in weights:
            share, (inputs, outputs) = server.scheduler.shares().get(tenant), kinds[tenant]
            # each holds two tokens or more, so a step cannot start as many as that
            for _ in range(share.waiting if share else 0, room // 2 + 1):
                server.push(Job(tenant, draw.randint(1, inputs), draw.randint(1, outputs)))
        server.step()
        assert all(share.waiting for share in server.scheduler.shares().values())  # backlogged, or it proves nothing
        history.append({t: server.service.get(t, 0.0) / weights[t] for t in weights})
        bound = max(W_IN * longest, W_OUT * room) / min(weights.values())
        counters = [share.counter for share in server.scheduler.shares().values()]
        assert max(counters) - min(counters) <= bound  # lemma 4.3
    for start in range(0, len(history), 10):
        for end in range(start + 1, len(history), 10):
            got = [history[end][t] - history[start][t] for t in weights]
            assert max(got) - min(got) <= 2 * bound


def test_service_is_in_proportion_to_the_weights():
    """The same as figures: over a long time the shares are the weights."""
    weights = {"one": 1.0, "two": 2.0, "five": 5.0}
    server, draw = Server(weights, 200), random.Random(3)
    for _ in range(4000):
        for tenant in weights:
            waiting = server.scheduler.shares()[tenant].waiting if tenant in server.scheduler.shares() else 0
            for _ in range(waiting, 60):
                server.push(Job(tenant, draw.randint(1, 10), draw.randint(1, 10)))
        server.step()
    total = sum(server.service.values())
    for tenant, weight in weights.items():
        assert server.service[tenant] / total == pytest.approx(weight / 8, rel=0.02)


def test_a_greedy_tenant_takes_no_more_than_its_share_and_five_percent():
    """One tenant asks for fifty times as much as two others, whose requests always wait too."""
    weights = {"greedy": 1.0, "b": 1.0, "c": 1.0}
    server = Server(weights, 300)
    for step in range(3000):
        for _ in range(50):
            if len(server.scheduler) < 20_000:
                server.push(Job("greedy", 30, 30))
        for tenant in "bc":
            if step % 2 == 0:
                server.push(Job(tenant, 10, 10))
        server.step()
    shares = server.scheduler.shares()
    assert shares["b"].waiting and shares["c"].waiting  # they asked for more than they got
    assert server.service["greedy"] / sum(server.service.values()) <= 1 / 3 + 0.05


def test_who_asks_for_little_gets_all_of_it_beside_a_greedy_one():
    """Below its share, a tenant is served as if it were nearly alone: it waits for room, not for the greedy queue."""
    server, waited, arrived = Server({"greedy": 1.0, "small": 1.0}, 300), [], {}
    for step in range(2000):
        for _ in range(20):
            if len(server.scheduler) < 5000:
                server.push(Job("greedy", 30, 30))
        if step % 20 == 0:
            job = Job("small", 10, 10)
            arrived[id(job)] = step, job
            server.push(job)
        server.step()
        waited += [step - arrived.pop(id(job))[0] for job in server.running if id(job) in arrived]
    assert len(waited) >= 99
    assert max(waited) <= 30  # steps; a greedy request runs for 30, and the queue of the greedy one for thousands


def test_an_idle_tenant_banks_no_credit():
    server = Server({"a": 1.0, "b": 1.0}, 60)
    for _ in range(500):
        server.push(Job("a", 5, 5))
        server.step()
    before = dict(server.service)
    for tenant in "ab":
        for _ in range(400):
            server.push(Job(tenant, 5, 5))
    for _ in range(100):
        server.step()
    got = {t: server.service[t] - before.get(t, 0.0) for t in "ab"}
    assert server.scheduler.shares()["a"].waiting and server.scheduler.shares()["b"].waiting
    assert abs(got["a"] - got["b"]) <= 2 * max(W_IN * 5, W_OUT * 60)  # and not the service of 500 steps
    assert before["a"] > 5 * 2 * W_OUT * 60  # which is far more than that


def test_a_tenant_whose_adapter_loads_gives_no_credit_to_others():
    """Its counter stands still for long; who comes then starts where the others are, not where it is."""
    scheduler = Scheduler()
    loading, ready = Job("loads", 1, 1, adapter="cold"), lambda job: job.adapter != "cold"
    scheduler.push("loads", 1.0, loading, 1)
    for _ in range(100):
        for _ in range(2):
            scheduler.push("works", 1.0, Job("works", 10, 0), 10)
        scheduler.pop(ready)
    scheduler.push("new", 1.0, Job("new", 1, 1), 1)
    assert scheduler.shares()["new"].counter == scheduler.shares()["works"].counter == 1000
    assert scheduler.pop() is loading  # the one that was passed over kept its turn


def test_it_is_work_conserving_and_passes_over_what_is_not_ready():
    scheduler = Scheduler()
    jobs = [Job("a", 1, 1, adapter="cold"), Job("a", 1, 1, adapter="warm"), Job("b", 1, 1, adapter="cold")]
    for job in jobs:
        scheduler.push(job.tenant, 1.0, job)
    warm = lambda job: job.adapter == "warm"  # noqa: E731
    assert scheduler.pop(warm) is jobs[1]
    assert scheduler.pop(warm) is None  # what waits is not ready
    assert [scheduler.pop(), scheduler.pop(), scheduler.pop()] == [jobs[0], jobs[2], None]


def test_a_large_request_is_not_overtaken_for_want_of_room():
    scheduler = Scheduler()
    large, small = Job("a", 90, 1), Job("b", 1, 1)
    scheduler.push("a", 1.0, large, 90)
    scheduler.push("b", 1.0, small, 1)
    assert scheduler.pop(fits=lambda job: job.input < 50) is None
    assert scheduler.pop(fits=lambda job: True) is large


def test_a_change_of_weight_counts_from_then_on():
    scheduler = Scheduler()
    scheduler.push("a", 1.0, Job("a", 0, 0))
    scheduler.charge("a", input=10)
    scheduler.push("a", 4.0, Job("a", 0, 0))
    scheduler.charge("a", output=10)
    assert scheduler.shares()["a"].counter == 10 + 20 / 4


def test_what_waits_is_listed_in_turns():
    scheduler = Scheduler()
    jobs = {name: Job(name[0], 0, 0) for name in ("a1", "a2", "b1", "b2", "b3")}
    for job in jobs.values():
        scheduler.push(job.tenant, 1.0, job)
    scheduler.charge("a", input=1)
    assert list(scheduler) == [jobs[name] for name in ("b1", "a1", "b2", "a2", "b3")]


def test_wrong_use_is_refused():
    scheduler, job = Scheduler(), Job("a", 1, 1)
    for weight in (0, -1, float("nan"), float("inf"), "2"):
        with pytest.raises(ConfigError, match="weight of tenant 'a' must be a number above 0"):
            scheduler.push("a", weight, job)
    assert len(scheduler) == 0 and scheduler.shares() == {}
    scheduler.push("a", 1, job)
    with pytest.raises(ValueError, match="waits already"):
        scheduler.push("a", 1, job)
    with pytest.raises(ValueError, match="negative"):
        scheduler.charge("a", output=-1)
    with pytest.raises(KeyError, match="never had"):
        scheduler.charge("b", output=1)
    assert scheduler.remove(job) and not scheduler.remove(job)


def test_many_threads_take_every_item_once():
    scheduler, taken, removed = Scheduler(), [], []
    jobs = [Job(f"t{i % 7}", 1, 1) for i in range(2100)]
    pushed = threading.Barrier(6)

    def push(part):
        for job in part:
            scheduler.push(job.tenant, 1.0, job, 1)
        pushed.wait(10)

    def pop():
        while True:
            job = scheduler.pop()
            if job is not None:
                taken.append(job)
                scheduler.charge(job.tenant, output=1)
            elif pushed.n_waiting == 0 and len(scheduler) == 0 and len(taken) + len(removed) == len(jobs):
                return

    def remove():
        for job in jobs[::5]:
            if scheduler.remove(job):
                removed.append(job)
        pushed.wait(10)

    threads = [threading.Thread(target=push, args=(jobs[i::5],)) for i in range(5)]
    threads += [threading.Thread(target=remove), *(threading.Thread(target=pop, daemon=True) for _ in range(3))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert sorted(map(id, taken + removed)) == sorted(map(id, jobs))
    assert sum(share.input for share in scheduler.shares().values()) == len(taken)
    assert sum(share.output for share in scheduler.shares().values()) == len(taken)


def test_removing_is_quick_however_many_wait():
    """A hundred thousand that leave in the worst order; a search of the queue for each would take minutes."""
    scheduler, jobs = Scheduler(), [Job("a", 1, 1) for _ in range(100_000)]
    for job in jobs:
        scheduler.push("a", 1.0, job)
    for job in reversed(jobs):
        assert scheduler.remove(job)
    assert len(scheduler) == 0
