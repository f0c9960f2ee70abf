"""The parts of a cluster that need no cluster: affinity, scaling, balance, desired state."""

import collections
import dataclasses
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest

from molora.errors import ConfigError
from molora.serve.cluster.balance import FORGET, Balance
from molora.serve.cluster.fleet import together
from molora.serve.cluster.options import ClusterOptions
from molora.serve.cluster.scaling import EXPECTED, QUEUED, QueuedTokens, Work
from molora.serve.cluster.sharing import Sharing
from molora.serve.engine.fair import Scheduler
from molora.serve.options import ServeOptions
from molora.serve.request import Auto, Base, Mixture, ServeError, Weighted
from molora.serve.store.resident import Residence

# --- options ----------------------------------------------------------------------------------------------------------


def test_options_name_every_problem_at_once():
    wrong = {"target_tokens": 0, "max_replicas": 1, "ingresses": 0, "gpus": -1, "address": 3, "health": True}
    with pytest.raises(ConfigError) as caught:
        ServeOptions(model="m", replicas=2, cluster=wrong)
    for name in wrong:
        assert f"cluster.{name}" in str(caught.value)
    with pytest.raises(ConfigError, match="'targettokens' is unknown; did you mean 'target_tokens'"):
        ClusterOptions.of({"targettokens": 3}, 1)
    with pytest.raises(ConfigError, match="replicas must be a whole number from 1"):
        ServeOptions(model="m", replicas=0)
    assert ClusterOptions.of({"max_replicas": 3}, 3).max_replicas == 3


# --- affinity ---------------------------------------------------------------------------------------------------------

SETS = [f"set{n}" for n in range(400)]


def order(key, replicas, load=None, spill=10):
    affinity = pytest.importorskip("molora.serve.cluster.affinity", exc_type=ImportError)
    loads = load or {}
    return affinity.ordered(key, replicas, str, lambda one: loads.get(one, 0), spill)


def test_a_set_stays_on_its_replica_and_sets_are_spread():
    replicas = [f"r{n}" for n in range(4)]
    homes = {key: order(key, replicas)[0] for key in SETS}
    assert homes == {key: order(key, replicas[::-1])[0] for key in SETS}  # whoever asks
    counts = collections.Counter(homes.values())
    assert set(counts) == set(replicas) and min(counts.values()) > 60  # 100 expected, sd 8.7


def test_only_what_must_moves_when_replicas_come_and_go():
    replicas = [f"r{n}" for n in range(4)]
    homes = {key: order(key, replicas)[0] for key in SETS}
    for key, home in homes.items():
        grown = order(key, [*replicas, "new"])[0]
        assert grown in (home, "new")
        left = order(key, [one for one in replicas if one != "r2"])[0]
        assert left == (home if home != "r2" else order(key, replicas)[1])
    assert {order(key, replicas[:2] + replicas[3:])[0] for key in SETS if homes[key] == "r2"} == {"r0", "r1", "r3"}


def test_a_full_replica_is_tried_after_the_others():
    replicas = ["r0", "r1", "r2"]
    first, second, third = order("s", replicas)
    assert order("s", replicas, {first: 9}) == [first, second, third]
    assert order("s", replicas, {first: 10}) == [second, third, first]
    assert order("s", replicas, {first: 12, second: 10, third: 11}) == [second, third, first]  # the least full
    assert order("", replicas, {"r0": 3, "r1": 1, "r2": 2}) == ["r1", "r2", "r0"]  # the base model: the idlest


def test_a_program_needs_one_replica_for_all_its_adapters():
    affinity = pytest.importorskip("molora.serve.cluster.affinity", exc_type=ImportError)
    assert affinity.set_of(Weighted((("b", 0.5), ("a", 0.5)))) == affinity.set_of(Weighted((("a", 1.0), ("b", 2.0))))
    keys = {
        affinity.set_of(one)
        for one in (Base(), Mixture("m"), Weighted((("a", 1.0),)), Weighted((("a", 1.0), ("b", 1.0))))
    }
    assert len(keys) == 4 and affinity.set_of(Auto("x", frozenset())) == ""


# --- scaling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("queued", "wanted"),
    [({}, 2), ({"a": 0, "b": 0}, 1), ({"a": 1000, "b": 0}, 1), ({"a": 1001, "b": 1}, 2), ({"a": 9000}, 9)],
)
def test_replicas_follow_the_tokens_that_are_queued(queued, wanted):
    context = SimpleNamespace(aggregated_metrics={QUEUED: queued}, target_num_replicas=2)
    assert QueuedTokens(1000)(context) == (wanted, {})


def test_the_policy_needs_no_molora_where_it_runs():
    config = pytest.importorskip("ray.serve.config")
    code = """
import sys
from types import SimpleNamespace
sys.modules["molora"] = None
from ray import cloudpickle
rule = cloudpickle.loads(bytes.fromhex(sys.argv[1]))(target=5)
print(rule(SimpleNamespace(aggregated_metrics={"queued_tokens": {"r": 11}}, target_num_replicas=1)))
"""
    sent = config.AutoscalingPolicy(
        policy_function=QueuedTokens, policy_kwargs={"target": 5}
    ).get_serialized_policy_def()
    command = [sys.executable, "-c", code, sent.hex()]
    assert subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout == "(3, {})\n"


def test_work_is_what_was_asked_for_and_not_yet_done():
    work = Work()
    work.asked("a", 100, 20)
    work.asked("b", 10, None)
    assert work.tokens == 100 + 20 + 10 + EXPECTED
    work.drew("a", 1)  # so its prompt has been read
    assert work.tokens == 19 + 10 + EXPECTED
    work.drew("b", 1000)
    assert work.tokens == 19 + EXPECTED  # how long it was so far says nothing of how long it will be
    work.drew("a", 30)
    assert work.tokens == EXPECTED  # never below zero
    for name in ("a", "b", "never"):
        work.ended(name, 8)
    assert work.tokens == 0
    for _ in range(400):
        work.asked("c", 0, None)
        work.ended("c", 8)
    work.asked("d", 0, None)
    assert work.tokens == pytest.approx(8, rel=0.05)  # what answers have on average


# --- balance ----------------------------------------------------------------------------------------------------------


def test_reports_that_are_lost_or_repeated_change_nothing():
    balance = Balance()
    for who in ("r1", "r2"):
        balance.report(who, {})
    balance.report("r1", {"a": 5.0})
    for _ in range(3):
        balance.report("r1", {"a": 12.0, "b": 1.0})
    assert balance.report("r2", {"a": 100.0})[1] == {"a": 12.0, "b": 1.0}
    assert balance.report("r1", {"a": 12.0, "b": 1.0})[1] == {"a": 100.0}
    assert balance.totals() == {"a": 112.0, "b": 1.0}


def test_a_new_balance_has_a_new_epoch_and_counts_from_then_on():
    first, second = Balance(), Balance()
    assert first.epoch != second.epoch
    second.report("r1", {"a": 1000.0})  # got before it was there
    assert second.report("r2", {})[1].get("a", 0.0) == 0.0
    second.report("r1", {"a": 1007.0})
    assert second.report("r2", {})[1] == {"a": 7.0}


def test_replicas_that_are_gone_are_forgotten_but_not_what_they_did():
    now = [0.0]
    balance = Balance(lambda: now[0])
    for number in range(50):
        balance.report(f"r{number}", {})
        balance.report(f"r{number}", {"a": 1.0})
        now[0] += FORGET + 1
    assert len(balance._last) == 1 and balance.totals() == {"a": 50.0}


def drive(balance, rounds, credit=1e9):
    """Two replicas; `greedy` waits at both, `small` at the second. Returns what each got at each."""
    replicas = [Scheduler(), Scheduler()]
    sharing = [Sharing(one, f"r{n}", balance.report if balance else broken, credit) for n, one in enumerate(replicas)]
    got = collections.Counter()
    for number, one in enumerate(replicas):
        for tenant in ("greedy", "small")[: number + 1]:
            for _ in range(rounds):
                one.push(tenant, 1.0, object(), 10)
    for turn in range(rounds // 2):
        for number, one in enumerate(replicas):
            before = {name: share.input for name, share in one.shares().items()}
            assert one.pop() is not None
            for name, share in one.shares().items():
                got[number, name] += share.input - before[name]
            if turn % 2 == 0:
                try:
                    sharing[number].exchange()
                except ConnectionError:
                    assert balance is None
    return got


def broken(who, got):
    raise ConnectionError("the actor is lost")


def test_a_tenant_that_gets_much_elsewhere_leaves_the_rest_to_others():
    alone, shared = drive(None, 200), drive(Balance(), 200)
    assert alone[1, "small"] == alone[1, "greedy"] == 500  # each replica is fair for itself
    # max-min: the greedy one has the first replica to itself, so the second one is for the other
    assert shared[0, "greedy"] == 1000 and shared[1, "small"] >= 0.95 * 1000


def test_nobody_is_held_back_by_more_than_the_credit():
    got = drive(Balance(), 200, credit=40)
    # behind by 40 it waits for four requests of ten tokens, so it still has about every fifth turn
    assert 150 <= got[1, "greedy"] <= 300


def test_what_was_got_elsewhere_during_a_pause_is_no_debt():
    scheduler = Scheduler()
    scheduler.push("a", 1.0, object(), 1)
    scheduler.charge_elsewhere("never", 50.0, 1e9)
    item = object()
    scheduler.push("b", 1.0, item, 1)
    scheduler.remove(item)
    scheduler.charge_elsewhere("b", 50.0, 1e9)
    assert set(scheduler.shares()) == {"a", "b"} and scheduler.shares()["b"].counter == 0.0


# --- what replicas tell -----------------------------------------------------------------------------------------------


def residence(name, state="disk", **changes):
    told = Residence(name, "lora", None, 4, 100, state, 0, 0, False, None, None, "", True)
    return dataclasses.replace(told, **changes)


def test_an_adapter_is_offered_when_every_replica_has_it():
    first = [residence("a", "ready", in_use=2, digest="d"), residence("b"), residence("new")]
    second = [residence("b", "errored", error="damaged", waiting=1), residence("a", in_use=1)]
    found = {one.name: one for one in together([first, second])}
    assert set(found) == {"a", "b"}
    assert (found["a"].state, found["a"].in_use, found["a"].digest) == ("ready", 3, "d")
    assert (found["b"].state, found["b"].waiting, found["b"].error) == ("disk", 1, "damaged")
    assert together([]) == [] and together([first, []]) == []


def test_errors_keep_what_clients_are_told_on_their_way():
    error = ServeError("full", 429, "queue_full", "model", retry_after=2.5)
    back = pickle.loads(pickle.dumps(error))
    assert back.body() == error.body() and (back.status, back.retry_after, str(back)) == (429, 2.5, "full")


def test_errors_of_the_way_become_answers():
    remote = pytest.importorskip("molora.serve.cluster.remote", exc_type=ImportError)
    from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

    for error in (ActorDiedError(), ActorUnavailableError("gone", b"\0" * 16)):
        told = remote.error_of(error)
        assert (told.status, told.code) == (503, "replica_lost") and told.retry_after
    inner = ServeError("no", 404, "model_not_found")
    assert remote.error_of(RayTaskError("f", "trace", inner)).code == "model_not_found"
    assert remote.error_of(inner) is inner
    strange = remote.error_of(RayTaskError("f", "secret trace", ValueError("x")))
    assert strange.status == 500 and "secret" not in strange.message and "ValueError" in strange.message
