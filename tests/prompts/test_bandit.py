"""Bandits find the better adapter, log what they drew with, survive a restart; off-policy estimates are unbiased."""

import functools
import itertools
import random

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch

from molora.errors import ConfigError, LoadError
from molora.prompts.bandit import Bandit
from molora.prompts.choice import Choice
from molora.prompts.events import EventLog
from molora.prompts.offpolicy import Round, always, ips, rounds, snips
from molora.prompts.policies import Belief, probability_of_best
from molora.prompts.registry import policies

POLICIES = list(policies)


def scored(**shares):
    best = max(shares, key=shares.get)
    return Choice({best: 1.0}, shares, shares, False, "", version="abc")


def play(bandit, means, number, choice, seed=0, prefix="r"):
    """Answer and reward `number` prompts; a coin of mean `means[name]` is the reward. Returns what was picked."""
    rng, picked = random.Random(seed), []
    for i in range(number):
        pick = bandit.pick(choice, f"{prefix}{i}")
        bandit.feedback(f"{prefix}{i}", float(rng.random() < means[pick.name]))
        picked.append(pick.name)
    return picked


# --- policies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_probabilities_are_some_and_name_order_is_nothing(policy):
    made = policies.build(policy)
    prior = {"b": 0.5, "a": 0.2, "c": 0.3}
    found = made.probabilities(prior, {"a": Belief(20, 19.0)})
    assert sum(found.values()) == pytest.approx(1.0) and set(found) == set(prior)
    assert all(share >= 0.05 / 3 - 1e-12 for share in found.values())  # the share that explores
    assert found == made.probabilities(dict(sorted(prior.items())), {"a": Belief(20, 19.0)})
    even = made.probabilities({"a": 0.5, "b": 0.5}, {})
    assert even["a"] == pytest.approx(0.5) and even["b"] == pytest.approx(0.5)
    assert made.probabilities({"a": 1.0}, {}) == {"a": 1.0}


@pytest.mark.parametrize("policy", POLICIES)
def test_rewards_raise_and_misses_lower_a_probability(policy):
    made, prior = policies.build(policy), {"a": 0.5, "b": 0.5}
    good, bad = made.probabilities(prior, {"a": Belief(5, 5.0)}), made.probabilities(prior, {"a": Belief(5, 0.0)})
    assert good["a"] > 0.55 > 0.45 > bad["a"]
    sure = made.probabilities(prior, {"a": Belief(10_000, 6000.0), "b": Belief(10_000, 4000.0)})
    assert sure["a"] > 0.85


def test_softmax_is_the_formula():
    made = policies.build({"name": "softmax", "explore": 0.1, "trust": 3.0, "temperature": 0.5})
    found = made.probabilities({"a": 0.7, "b": 0.3}, {"b": Belief(2, 1.5)})
    means = np.array([0.7, (1.5 + 3 * 0.3) / 5])
    shares = np.exp(means / 0.5) / np.exp(means / 0.5).sum()
    assert list(found.values()) == pytest.approx(list(0.9 * shares + 0.05))
    assert policies.build({"name": "softmax", "trust": 0}).probabilities({"a": 0.5, "b": 0.5}, {})["a"] == 0.5


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0]),
        ([3.0, 1.5], [1.0, 4.0]),
        ([40.0, 1.0, 12.5], [60.0, 1.0, 20.0]),
        ([500.0, 520.0], [500.0, 480.0]),
        ([50_000.0, 50_100.0, 1.0], [50_000.0, 49_900.0, 9.0]),
    ],
)
def test_the_probability_of_being_best_is_the_integral(a, b):
    found = probability_of_best(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))
    betas = [scipy.stats.beta(x, y) for x, y in zip(a, b, strict=True)]
    for i, one in enumerate(betas):
        others = betas[:i] + betas[i + 1 :]
        marks = sorted({float(beta.ppf(q)) for beta in betas for q in (1e-9, 0.01, 0.5, 0.99, 1 - 1e-9)})

        def density(x, one=one, others=others):
            return one.pdf(x) * np.prod([other.cdf(x) for other in others])

        parts = [scipy.integrate.quad(density, *pair)[0] for pair in itertools.pairwise([0.0, *marks, 1.0])]
        assert float(found[i]) == pytest.approx(sum(parts), abs=2e-4)
    assert float(found.sum()) == pytest.approx(1.0)


# --- the bandit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_it_finds_the_better_adapter_against_the_selector(policy):
    """The selector prefers `a`, users are better served by `b`; nothing is known of another situation."""
    bandit = Bandit(policy, frozen=False)
    play(bandit, {"a": 0.3, "b": 0.8}, 400, scored(a=0.6, b=0.4))
    later = play(bandit, {"a": 0.3, "b": 0.8}, 200, scored(a=0.6, b=0.4), prefix="s")
    assert later.count("b") > 0.85 * 200
    assert bandit.version == 600 and set(bandit.beliefs) == {"a"}
    found = bandit.pick(scored(a=0.2, c=0.8), "new").probabilities  # the situation is `c`
    assert found == policies.build(policy).probabilities({"a": 0.2, "c": 0.8}, {})


@pytest.mark.parametrize("policy", POLICIES)
def test_it_is_frozen_until_it_is_told(policy):
    bandit, choice = Bandit(policy), scored(a=0.6, b=0.4)
    before = bandit.pick(choice, "x").probabilities
    play(bandit, {"a": 0.0, "b": 1.0}, 50, choice)
    assert bandit.version == 0 and bandit.pick(choice, "y").probabilities == before
    assert bandit.update() == 1 and bandit.update() == 1  # nothing new makes no version
    after = bandit.pick(choice, "z")
    assert after.probabilities["b"] > before["b"] and after.version == 1


@pytest.mark.parametrize("policy", POLICIES)
def test_it_draws_with_the_probabilities_it_logs(policy):
    bandit, choice = Bandit(policy), scored(a=0.5, b=0.3, c=0.2)
    picks = [bandit.pick(choice, f"id {i}") for i in range(2000)]
    expected = picks[0].probabilities
    counts = [sum(pick.name == name for pick in picks) for name in expected]
    assert scipy.stats.chisquare(counts, [2000 * share for share in expected.values()]).pvalue > 1e-4
    assert all(pick.probability == expected[pick.name] for pick in picks)
    logged = [event for event in bandit.log if event["event"] == "pick"]
    assert [event["name"] for event in logged] == [pick.name for pick in picks]
    assert logged[0]["probabilities"] == expected and logged[0]["selector"] == "abc"
    again = Bandit(policy)  # a draw is decided by seed, tenant and id
    assert [again.pick(choice, f"id {i}").name for i in range(50)] == [pick.name for pick in picks[:50]]
    other = Bandit(policy, tenant="other")
    assert [other.pick(choice, f"id {i}").name for i in range(50)] != [pick.name for pick in picks[:50]]


def test_it_chooses_only_among_what_the_selector_scored():
    bandit = Bandit(frozen=False)
    play(bandit, {"a": 0.0, "b": 1.0}, 50, scored(a=0.6, b=0.4))
    assert set(bandit.pick(scored(a=0.9, c=0.1), "x").probabilities) == {"a", "c"}
    assert bandit.pick(Choice({}, {}, {}, True, ""), "y") is None
    assert bandit.pick(Choice({}, {"a": 0.1}, {"a": 1.0}, True, ""), "z") is None  # the guard abstained
    many = scored(**{f"n{i:03}": (i + 1) / 5050 for i in range(100)})
    few = Bandit(arms=3).pick(many, "x").probabilities
    assert set(few) == {"n097", "n098", "n099"}


def test_a_reward_counts_once_and_only_for_a_response_of_this_tenant():
    mine, other = Bandit(tenant="mine"), Bandit(tenant="other")
    mine.pick(scored(a=1.0), "x")
    with pytest.raises(ConfigError, match="no response 'x' waits"):
        other.feedback("x", 1.0)
    for reward in (-0.1, 1.1, float("nan"), True, "1", None):
        with pytest.raises(ConfigError, match="reward"):
            mine.feedback("x", reward)
    with pytest.raises(ConfigError, match="used once"):
        mine.pick(scored(a=1.0), "x")
    mine.feedback("x", 1)
    with pytest.raises(ConfigError, match="no response 'x' waits"):
        mine.feedback("x", 1)
    assert len(rounds(mine.log)) == 1


def test_only_the_latest_choices_wait():
    bandit = Bandit(waiting=2)
    for name in "abc":
        bandit.pick(scored(a=1.0), name)
    with pytest.raises(ConfigError, match="waits for a reward"):
        bandit.feedback("a", 1.0)
    bandit.feedback("b", 1.0)
    bandit.feedback("c", 1.0)


def test_a_log_without_a_file_keeps_its_latest_events():
    log = EventLog(kept=5)
    for number in range(12):
        log.append({"event": "pick", "id": str(number)})
    assert [event["id"] for event in log] == ["7", "8", "9", "10", "11"]
    again = list(log)
    again[0]["id"] = "another"  # who reads gets copies
    assert next(iter(log))["id"] == "7"
    log = EventLog()
    for _ in range(10_100):
        log.append({"event": "pick"})
    assert len(list(log)) == 10_000
    with pytest.raises(ConfigError, match="kept=0"):
        EventLog(kept=0)


def test_a_file_keeps_all_events(tmp_path):
    log = EventLog(tmp_path / "log.jsonl", kept=2)
    for number in range(5):
        log.append({"event": "version", "version": number})
    assert [event["version"] for event in log] == [0, 1, 2, 3, 4]


def size(thing):
    """Return how many values a thing holds, all the way down."""
    if isinstance(thing, dict):
        return sum(map(size, thing.values()))
    return sum(map(size, thing)) if isinstance(thing, (list, tuple)) else 1


def test_a_frozen_bandit_holds_no_more_after_many_rewards_and_learns_the_same():
    choice, held = scored(a=0.6, b=0.4), set()
    bandit, twin = Bandit(log=EventLog(kept=10), waiting=5), Bandit(frozen=False, waiting=5)
    sums = {}
    for number in range(400):
        pick = bandit.pick(choice, f"r{number}")
        bandit.feedback(f"r{number}", number / 1000)
        sums.setdefault(pick.name, []).append(number / 1000)
        if number >= 50:
            mine = [value for key, value in vars(bandit).items() if key.startswith("_")]
            held.add(size(mine) + len(list(bandit.log)))
    assert len(held) == 1 and bandit.beliefs == {} and set(sums) == {"a", "b"}
    assert bandit.update() == 1 and bandit.update() == 1
    # in the order in which they came in, so to the last bit as one by one
    assert bandit.beliefs == {"a": {name: Belief(len(found), sum(found)) for name, found in sums.items()}}
    play(twin, {"a": 0.5, "b": 0.5}, 20, choice)
    assert twin.version == 20 and sum(belief.number for belief in twin.beliefs["a"].values()) == 20
    play(bandit, {"a": 0.5, "b": 0.5}, 10, choice, prefix="s")
    bandit.update()
    assert sum(belief.number for belief in bandit.beliefs["a"].values()) == 410


@pytest.mark.parametrize("frozen", [True, False])
def test_a_restart_continues_where_it_stopped(frozen, tmp_path):
    path, choice = tmp_path / "log" / "acme.jsonl", scored(a=0.6, b=0.4)
    bandit = Bandit(tenant="acme", frozen=frozen, log=EventLog(path, sync=True))
    play(bandit, {"a": 0.2, "b": 0.9}, 30, choice)
    bandit.update()
    play(bandit, {"a": 0.2, "b": 0.9}, 5, choice, prefix="s")
    bandit.pick(choice, "open")
    with path.open("ab") as file:
        file.write(b'{"event": "pick", "ten')  # killed while it wrote
    again = Bandit(tenant="acme", frozen=frozen, log=EventLog(path))
    assert (again.version, again.beliefs) == (bandit.version, bandit.beliefs)
    again.feedback("open", 1.0)  # still waits
    bandit.feedback("open", 1.0)
    assert again.update() == bandit.update() and again.beliefs == bandit.beliefs
    assert again.pick(choice, "next") == bandit.pick(choice, "next")
    assert all(isinstance(event, dict) for event in EventLog(path))


def test_logs_that_are_none_are_refused(tmp_path):
    path = tmp_path / "log.jsonl"
    Bandit(tenant="a", log=EventLog(path)).pick(scored(a=1.0), "x")
    with pytest.raises(LoadError, match="log of tenant 'a', not of 'b'"):
        Bandit(tenant="b", log=EventLog(path))
    for text in (
        "nonsense\n",
        "[1]\n",
        '{"event": "reward", "id": "?"}\n',
        "{}\n",
        '{"event": "pick", "tenant": "a"}\n',
    ):
        path.write_text(text)
        with pytest.raises(LoadError, match="event"):
            Bandit(tenant="a", log=EventLog(path))
    path.write_text("half a line")
    assert Bandit(tenant="a", log=EventLog(path)).version == 0 and path.read_text() == ""
    path.write_text('{"event":"version","version":1}\n' + "x" * 200_000)  # an unfinished line of several blocks
    assert len(list(EventLog(path))) == 1 and path.stat().st_size == 32


def test_options_out_of_range_are_refused():
    for spec in ("thomson", {"name": "thompson", "explore": 2}, {"name": "softmax", "temperature": 0}):
        with pytest.raises(ConfigError):
            Bandit(spec)
    with pytest.raises(ConfigError, match="trust"):
        Bandit({"name": "thompson", "trust": -1})
    with pytest.raises(ConfigError, match="arms"):
        Bandit(arms=0)


# --- off-policy estimates ---------------------------------------------------------------------------------------------

MEANS = {"a": 0.2, "b": 0.5, "c": 0.9}


@functools.cache
def logged(number, seed=0):
    bandit = Bandit({"name": "softmax", "explore": 0.2}, seed=seed)
    play(bandit, MEANS, number, scored(a=0.5, b=0.3, c=0.2), seed=seed)
    return rounds(bandit.log)


def test_ips_is_unbiased_and_its_error_is_honest():
    """Over many logs the mean of the estimates is the true value, and their spread is the error that they state."""
    logs = [logged(60, seed) for seed in range(120)]
    targets = {name: always(name) for name in MEANS} | {"even": lambda one: dict.fromkeys("abc", 1 / 3)}
    truth = MEANS | {"even": sum(MEANS.values()) / 3}
    for name, target in targets.items():
        found = [ips(log, target) for log in logs]
        values = np.array([one.value for one in found])
        assert abs(values.mean() - truth[name]) < 4 * values.std() / np.sqrt(len(values))
        assert np.mean([one.error for one in found]) == pytest.approx(values.std(), rel=0.25)
        assert all(one.uncovered == 0 and one.rounds == 60 for one in found)


def test_snips_comes_close_with_less_spread():
    logs = [logged(60, seed) for seed in range(120)]
    plain = np.array([ips(log, always("c")).value for log in logs])
    own = np.array([snips(log, always("c")).value for log in logs])
    assert abs(own.mean() - 0.9) < 4 * own.std() / np.sqrt(len(own))
    assert own.std() < 0.7 * plain.std() and own.max() <= 1.0


def test_the_policy_that_ran_is_estimated_by_the_plain_mean():
    log = logged(200)
    for estimate in (ips(log, lambda one: one.probabilities), snips(log, lambda one: one.probabilities)):
        assert estimate.value == pytest.approx(np.mean([one.reward for one in log]))
        assert estimate.effective == pytest.approx(200)


def test_by_hand():
    halves = {"a": 0.5, "b": 0.5}
    log = [Round("a", "a", 1.0, halves, halves), Round("a", "b", 0.5, {"a": 0.8, "b": 0.2}, halves)]
    estimate = ips(log, always("b"))
    assert estimate.value == pytest.approx((0 + 0.5 / 0.2) / 2) and estimate.effective == pytest.approx(1.0)
    assert snips(log, always("b")).value == pytest.approx(0.5)
    assert ips(log, lambda one: {"c": 0.25, "a": 0.75}).uncovered == pytest.approx(0.25)


def test_a_learned_policy_is_worth_more_and_the_log_says_so():
    bandit, choice = Bandit({"name": "thompson", "explore": 0.3}), scored(a=0.5, b=0.3, c=0.2)
    play(bandit, MEANS, 600, choice)
    log = rounds(bandit.log, version=0)
    before = ips(log, bandit.target())
    bandit.update()
    after = snips(log, bandit.target())
    share = bandit.pick(choice, "next").probabilities
    truth = sum(MEANS[name] * share[name] for name in MEANS)
    assert after.value > before.value + 0.1 and abs(after.value - truth) < 0.1
    assert rounds(bandit.log, version=1) == []


def test_what_cannot_be_estimated_is_refused():
    with pytest.raises(ConfigError, match="no rewarded choice"):
        ips([], always("a"))
    log = [Round("a", "a", 1.0, {"a": 1.0, "b": 0.0}, {"a": 1.0})]
    with pytest.raises(ConfigError, match="tells nothing"):
        snips(log, always("b"))
    with pytest.raises(ConfigError, match="add up to 1"):
        ips(log, lambda one: {"a": 0.4})
