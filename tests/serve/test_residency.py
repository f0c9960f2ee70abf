"""The bookkeeping of an adapter store, driven step by step without threads: no sequence of calls breaks its rules."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from molora.serve.request import ServeError
from molora.serve.store.filling import next_place, next_read
from molora.serve.store.residency import Residency
from molora.serve.store.resident import Resident
from tests.serve.adapters import Nothing

NAMES = [f"a{number}" for number in range(5)]
SLOTS = {"small": 2, "large": 3, "mixtures": 1}
CPU = 25  # two copies of ten bytes


class Clock:
    """A clock that tests move."""

    def __init__(self):
        self.time = 0.0

    def __call__(self):
        return self.time


def table_of(buckets=None, cpu=CPU, patience=5.0):
    clock = Clock()
    table = Residency(buckets or SLOTS, cpu, 10.0, patience, clock)
    table.clock = clock
    return table


def add(table, name, bucket="small", nbytes=10, number=None):
    table.numbers = getattr(table, "numbers", 0) + 1
    kind = "mixture" if bucket == "mixtures" else "lora"
    resident = Resident(name, Nothing(nbytes=nbytes, kind=kind), bucket, number or table.numbers)
    table.add(resident)
    return resident


def take_out(table):
    """What the engine's thread does with mixtures that were unregistered."""
    doomed, table.doomed = table.doomed, []
    for resident in doomed:
        table.taken_out(resident)


def pump(table, ms=1.0):
    """Do all the work there is, as loader threads and the engine would."""
    for _ in range(100):
        take_out(table)
        if (resident := next_read(table)) is not None:
            table.read_done(resident, resident.source.load(), ms / 1e3)
        elif (found := next_place(table, False) or next_place(table, True)) is not None:
            table.place_done(found[0], ms / 1e3)
        else:
            return
    raise AssertionError("there is work without end")


def check(table):
    """What must hold at every moment."""
    placed = 0
    everyone = set(table.names.values())
    for bucket in table.buckets.values():
        assert len(bucket.taken) <= bucket.capacity
        for slot, resident in bucket.taken.items():
            assert 0 <= slot < bucket.capacity and resident.slot == slot and resident.place is not None
            assert resident.bucket == bucket.name
            placed += resident.ready
        residents = list(bucket.taken.values())
        assert len(set(residents)) == len(residents)
        assert sum(one.bucket == bucket.name for one in table.pins) < bucket.capacity
        everyone.update(residents)
    for resident in everyone:
        assert not (resident.users and not resident.ready), "an adapter in use lost its place"
        assert (resident.place is None) == (resident.slot is None)
        assert not (resident.ready and resident.busy)
    assert len({one.place for one in everyone if one.place}) == sum(one.place is not None for one in everyone)
    assert sum(table.copies.values()) <= table.cpu_bytes
    assert all(one.loaded is not None or one.busy for one in table.copies)
    done = table.counters
    assert done.loads - done.evictions - done.removals == placed


class StoreMachine(RuleBasedStateMachine):
    """Register, want, lease, release, unregister, pin, and threads that take their time or fail, in any order."""

    @initialize()
    def start(self):
        self.table = table_of()
        self.leases = []  # (residents, their places)
        self.kept = {}  # the places of those that are pinned
        self.reading, self.placing = [], []
        for name, bucket in zip(NAMES, ("small", "small", "small", "large", "mixtures"), strict=True):
            add(self.table, name, bucket)

    @rule(name=st.sampled_from(NAMES), bucket=st.sampled_from(sorted(SLOTS)))
    def register(self, name, bucket):
        add(self.table, name, bucket)
        assert self.table.names[name].digest is None

    @rule(names=st.lists(st.sampled_from(NAMES), max_size=5))
    def want(self, names):
        self.table.want(names)
        assert list(self.table.wanted) == [
            self.table.names[name] for name in dict.fromkeys(names) if name in self.table.names
        ]

    @rule(names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=3))
    def lease(self, names):
        ready = all(name in self.table.names and self.table.names[name].ready for name in names)
        before = {one: one.users for one in self.table.names.values()}
        try:
            got = self.table.acquire(names)
        except ServeError as error:
            assert error.status in (400, 404, 424)
            got = None
        else:
            assert got is None or ready
            if got is None:
                assert all(self.table.names[name] in self.table.order() for name in names)
        if got is None:
            assert {one: one.users for one in self.table.names.values()} == before  # all or nothing
        else:
            self.leases.append((got, [one.place for one in got]))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data):
        residents, _ = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        self.table.release(residents)

    @rule(name=st.sampled_from(NAMES))
    def unregister(self, name):
        if name in self.table.names:
            self.table.drop(name)
        with pytest.raises(ServeError):
            self.table.find(name)

    @rule(name=st.sampled_from(NAMES), pinned=st.booleans())
    def pin(self, name, pinned):
        if name not in self.table.names:
            return
        if not pinned:
            self.table.pins.discard(self.table.names[name])
            return
        try:
            self.table.pin(name)
        except ServeError as error:
            assert error.code == "pin_refused"

    @rule()
    def begin_reading(self):
        resident = next_read(self.table)
        if resident is not None:
            self.reading.append(resident)

    @precondition(lambda self: self.reading)
    @rule(data=st.data(), fails=st.booleans())
    def end_reading(self, data, fails):
        resident = self.reading.pop(data.draw(st.integers(0, len(self.reading) - 1)))
        if fails:
            self.table.failed(resident, ServeError("broken", 424, "adapter_load_failed"))
        else:
            self.table.read_done(resident, resident.source.load(), 0.001)

    @rule(mixtures=st.booleans())
    def begin_placing(self, mixtures):
        found = next_place(self.table, mixtures)
        if found is not None:
            self.placing.append(found[0])

    @precondition(lambda self: self.placing)
    @rule(data=st.data(), fails=st.booleans())
    def end_placing(self, data, fails):
        resident = self.placing.pop(data.draw(st.integers(0, len(self.placing) - 1)))
        if fails:
            self.table.failed(resident, ServeError("broken", 424, "adapter_load_failed"))
        else:
            self.table.place_done(resident, 0.001)

    @rule()
    def work(self):
        """Loaders that are quick."""
        pump(self.table)

    @rule()
    def engine_step(self):
        take_out(self.table)

    @rule(seconds=st.sampled_from([0.1, 3.0, 20.0]))
    def wait(self, seconds):
        self.table.clock.time += seconds

    @invariant()
    def rules_hold(self):
        if not hasattr(self, "table"):
            return
        check(self.table)
        for residents, places in self.leases:  # nothing that is lent moves
            assert [one.place for one in residents] == places and all(one.ready and one.users for one in residents)
        for one, place in self.kept.items():  # nor what is pinned
            assert one.place == place or one not in self.table.pins
        self.kept = {one: one.place for one in self.table.pins if one.ready}
        counted = {}
        for residents, _ in self.leases:
            for one in residents:
                counted[one] = counted.get(one, 0) + 1
        assert all(one.users == count for one, count in counted.items())
        assert all(not one.users for one in self.table.names.values() if one not in counted)

    def teardown(self):
        """When all that runs has ended, whatever is wanted first can be had: nothing is stuck."""
        if not hasattr(self, "table"):
            return
        for residents, _ in self.leases:
            self.table.release(residents)
        for resident in self.reading:
            self.table.read_done(resident, resident.source.load(), 0.001)
        for resident in self.placing:
            self.table.place_done(resident, 0.001)
        self.table.clock.time += 100
        for name in list(self.table.names):
            self.table.want([name])
            pump(self.table)
            got = self.table.acquire([name])
            assert got is not None, f"'{name}' never becomes ready"
            self.table.release(got)
            check(self.table)


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(
    max_examples=80, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


# --- what the rules are for -------------------------------------------------------------------------------------------


def test_two_requests_that_want_overlapping_sets_both_get_theirs():
    """Each wants both places: together they would hold one each and wait for ever, if loading followed no order."""
    table = table_of({"small": 2}, cpu=1000)
    for name in "abc":
        add(table, name)
    done, waiting = [], [["a", "b"], ["b", "c"], ["c", "a"]]
    for _ in range(20):
        table.want([name for names in waiting for name in names])
        pump(table)
        for names in list(waiting):
            got = table.acquire(names)
            if got is not None:
                waiting.remove(names)
                done.append(names)
                table.release(got)
        if not waiting:
            break
    assert done == [["a", "b"], ["b", "c"], ["c", "a"]]
    check(table)


def test_sets_that_are_only_asked_for_do_not_wait_for_each_other():
    """Without `want`: each of three requests would keep one of the three places, and wait for a second one."""
    table = table_of({"small": 3}, cpu=1000)
    for name in "abcxyz":
        add(table, name)
    waiting = [["a", "x"], ["b", "y"], ["c", "z"]]
    for first, _ in waiting:
        assert table.acquire([first]) is None
    pump(table)
    for _ in range(10):
        for names in list(waiting):
            got = table.acquire(names)
            if got is not None:
                waiting.remove(names)
                table.release(got)
        table.clock.time += 3  # the single ones are never asked for again
        pump(table)
    assert not waiting
    check(table)


def test_what_is_wanted_later_takes_no_place_from_what_is_wanted_sooner():
    table = table_of({"small": 2}, cpu=1000)
    for name in "abcd":
        add(table, name)
    table.want("abcd")
    pump(table)
    assert [table.told(table.names[name]).state for name in "abcd"] == ["ready", "ready", "warm", "warm"]
    lent = table.acquire(["a"])
    table.want("cb")  # a runs, b is wanted after c
    pump(table)
    assert [table.told(table.names[name]).state for name in "abcd"] == ["ready", "warm", "ready", "warm"]
    table.release(lent)
    pump(table)
    assert table.names["b"].ready and table.counters.evictions == 2


def test_what_cost_more_to_load_stays_longer_but_not_for_ever():
    """By hand: credits a = 99, b = 1; each newcomer takes the cheap place and is worth one more than the last."""
    table = table_of({"small": 2}, cpu=1000)
    for name in ("a", "b", *(f"c{n}" for n in range(150))):
        add(table, name)
    for name, ms in (("a", 49.5), ("b", 0.5)):
        table.want([name])
        pump(table, ms)
        table.release(table.acquire([name]))
    rounds = 0
    while table.names["a"].ready:
        table.want([f"c{rounds}"])
        pump(table, 0.5)
        table.clock.time += 1
        table.release(table.acquire([f"c{rounds}"]))
        rounds += 1
    assert 95 <= rounds <= 101, rounds


def test_with_equal_costs_the_least_recently_used_goes():
    table = table_of({"small": 3}, cpu=1000)
    for name in "abcde":
        add(table, name)
    for name in "abcab":  # c is the oldest
        table.want([name])
        pump(table)
        table.clock.time += 1
        table.release(table.acquire([name]))
    table.want("d")
    pump(table)
    assert not table.names["c"].ready and table.names["a"].ready and table.names["b"].ready


def test_a_set_that_never_fits_is_refused_at_once():
    table = table_of({"small": 2}, cpu=1000)
    for name in "abc":
        add(table, name)
    with pytest.raises(ServeError, match="3 adapters in 'small' at once, which has 2 places") as refused:
        table.acquire(["a", "b", "c"])
    assert refused.value.status == 400
    table.pin("a")
    with pytest.raises(ServeError, match="1 of them pinned"):
        table.acquire(["b", "c"])
    assert table.acquire(["a", "b"]) is None  # the pinned one has its own place


def test_pins_leave_a_place_for_others():
    table = table_of({"small": 2, "mixtures": 1}, cpu=1000)
    for name in "ab":
        add(table, name)
    add(table, "m", "mixtures")
    table.pin("a")
    table.pin("a")
    with pytest.raises(ServeError, match="1 of the 2 places of 'small' are pinned") as refused:
        table.pin("b")
    assert refused.value.code == "pin_refused" and refused.value.status == 409
    with pytest.raises(ServeError, match="pinned"):
        table.pin("m")
    pump(table)
    assert table.names["a"].ready
    table.want("b")
    pump(table)
    place = table.names["a"].place
    table.clock.time += 1000
    for name in "cdefgh":
        add(table, name)
        table.want(name)
        pump(table)
        assert table.names["a"].ready and table.names[name].ready
    assert table.counters.evictions == 6 and table.counters.loads == 8 and table.names["a"].place is place


def test_adapters_that_are_always_in_use_give_way_to_one_that_waits_too_long():
    table = table_of({"small": 1}, cpu=1000, patience=5.0)
    add(table, "busy")
    add(table, "starved")
    table.want(["busy"])
    pump(table)
    running = table.acquire(["busy"])
    assert table.acquire(["starved"]) is None
    pump(table)
    for _ in range(3):  # new requests go on beginning before the last one ends
        following = table.acquire(["busy"])
        assert following is not None
        table.release(running)
        running = following
        table.clock.time += 1
        pump(table)
    table.clock.time += 5
    pump(table)
    assert table.acquire(["busy"]) is None  # no new ones now
    table.release(running)
    pump(table)
    got = table.acquire(["starved"])
    assert got is not None
    table.release(got)
    pump(table)
    assert table.acquire(["busy"]) is not None  # and back again
    check(table)


def test_a_drained_adapter_is_lent_again_when_nobody_waits_any_more():
    table = table_of({"small": 1}, cpu=1000, patience=5.0)
    add(table, "busy")
    add(table, "starved")
    table.want(["busy"])
    pump(table)
    table.acquire(["busy"])
    table.acquire(["starved"])
    pump(table)
    table.clock.time += 6
    pump(table)
    assert table.acquire(["busy"]) is None
    table.want(["busy"])  # the one that waited was given up
    assert table.acquire(["busy"]) is not None


def test_copies_in_memory_are_bounded_and_the_oldest_go():
    table = table_of({"small": 2, "large": 3}, cpu=30)
    for name in "abcde":
        add(table, name, "large")
    for name in "abcde":
        table.want([name])
        pump(table)
        table.clock.time += 1
    assert {one.name for one in table.copies} == set("cde") and table.counters.drops == 2
    assert sum(one.ready for one in table.names.values()) == 3
    assert table.told(table.names["a"]).state == "disk"


def test_hits_and_misses_count_each_lent_adapter_once():
    table = table_of({"small": 2}, cpu=1000)
    add(table, "a")
    for _ in range(4):
        assert table.acquire(["a"]) is None
    pump(table)
    for _ in range(3):
        table.release(table.acquire(["a"]))
    assert (table.counters.hits, table.counters.misses) == (2, 1)
