"""Service: rights, accounts, feedback and the routing report, below HTTP."""

import json
import math
import threading

import pytest

from molora.errors import ConfigError
from molora.prompts.choice import Choice
from molora.serve.feedback import Feedback, make_feedback
from molora.serve.ledger import Ledger, drift
from molora.serve.request import Base, Chunk, Mixture, Sampling, ServeError, Usage, Weighted
from molora.serve.tenants.tenant import EVERYBODY, Tenant
from tests.serve.served import ADAPTERS, KEYS, options_of, started, until, with_tenants

FOUR = Sampling(temperature=0, max_tokens=4, ignore_eos=True)
SELECTORS = {"topic": {"method": "centroid", "embedder": "words", "guard": "nearest"}}


@pytest.fixture(scope="module")
def plain(world):
    with started(options_of(world, selectors=SELECTORS, feedback=True)) as found:
        yield found


@pytest.fixture
def owned(world, tmp_path, monkeypatch):
    with started(with_tenants(world, tmp_path, monkeypatch, selectors=SELECTORS, feedback=True)) as found:
        yield found


def ids(service, text="the doctor is not the patient"):
    return service.tokenizer(text).input_ids


def ask(service, tenant, model, text="the doctor is not the patient", **options):
    program = service.program(tenant, model, lambda: text, **options)
    return service.submit(tenant, program, ids(service, text), FOUR)


def choice(shares, abstained=False):
    best = max(shares, key=shares.get)
    return Choice({} if abstained else {best: 1.0}, dict(shares), dict(shares), abstained, "so", version="v")


# --- names to programs ----------------------------------------------------------------------------------------------


def test_names_become_programs(plain):
    def made(model, **options):
        return plain.program(EVERYBODY, model, lambda: "", **options)

    assert made("base") == Base() and made("mix") == Mixture("mix")
    assert made("shared") == Weighted((("shared", 1.0),))
    weights = {"shared": 0.25, "ann-law": -1.0}
    assert made("base", adapters=weights) == Weighted((("shared", 0.25), ("ann-law", -1.0)))
    for options, part in (
        ({"model": "shared", "adapters": {"shared": 1.0}}, "need model 'base'"),
        ({"model": "base", "adapters": {"mix": 1.0}}, "routed mixture"),
        ({"model": "base", "adapters": {"shared": 101.0}}, "from -100 to 100"),
        ({"model": "base", "selector": "topic"}, "model is 'auto'"),
    ):
        with pytest.raises(ServeError, match=part):
            made(**options)


def test_without_a_right_to_the_base_no_way_leads_to_it(owned):
    noone = owned.tenant_of(KEYS["noone"])
    with pytest.raises(ServeError) as error:
        ask(owned, noone, "base")
    assert error.value.code == "model_not_found"
    with pytest.raises(ServeError) as zero:
        ask(owned, noone, "base", adapters={"shared": 0.0})
    assert zero.value.body() == error.value.body()
    with pytest.raises(ServeError) as abstained:  # the guard knows nothing of such a prompt
        ask(owned, noone, "auto", "w1 w2 w3 w4 w5")
    assert abstained.value.code == "no_adapter_chosen"
    assert ask(owned, noone, "shared").result()[1].finish == "length"


def test_an_alias_gives_no_right_to_its_target(world, tmp_path, monkeypatch):
    import shutil

    import molora

    shutil.copytree(world / "hub", tmp_path / "hub")
    molora.Hub(tmp_path / "hub").alias("ann-alias", "bob-secret")
    options = with_tenants(world, tmp_path, monkeypatch, adapters=["ann-law"])
    options.hub = str(tmp_path / "hub")
    with started(options) as service:
        ann, bob = service.tenant_of(KEYS["ann"]), service.tenant_of(KEYS["bob"])
        refused = []
        for name in ("ann-alias", "ann-nothing"):
            with pytest.raises(ServeError) as error:
                service.load(ann, name)
            refused.append(error.value.message.replace(name, "X"))
        assert refused[0] == refused[1]
        assert service.load(bob, "bob-secret").name == "bob-secret"
        with pytest.raises(ServeError, match="does not exist"):
            service.load(bob, "ann-alias", "bob-own")


def test_a_right_to_one_version_loads_that_version(world, tmp_path, monkeypatch):
    with started(with_tenants(world, tmp_path, monkeypatch, adapters=[])) as service:
        tenant = Tenant("v", models=frozenset({"shared@1"}), manage=True)
        assert service.load(tenant, "shared@1").name == "shared@1"
        for source, name in (("shared", None), ("shared@2", None), ("shared@1", "shared")):
            with pytest.raises(ServeError, match="does not exist"):
                service.load(tenant, source, name)


# --- accounts -------------------------------------------------------------------------------------------------------


def rows(service, name):
    return {row.program: (row.requests, row.input_tokens, row.output_tokens) for row in service.tenants.usage(name)}


def test_what_was_answered_is_written_down(owned):
    ann = owned.tenant_of(KEYS["ann"])
    ask(owned, ann, "ann-law").result()
    ask(owned, ann, "base", adapters={"ann-law": 0.5, "shared": 0.5}).result()
    owned.embed(ann, owned.program(ann, "base", lambda: ""), [ids(owned), ids(owned, "a film")])
    until(lambda: len(rows(owned, "ann")) == 3)
    assert rows(owned, "ann") == {"ann-law": (1, 7, 4), "ann-law+shared": (1, 7, 4), "base": (1, 10, 0)}
    until(lambda: not owned.tenants.quotas.running())


def test_what_was_never_begun_costs_nothing(owned):
    """A request that waits while the engine's thread is held, and is cancelled there."""
    ann, held, go = owned.tenant_of(KEYS["ann"]), threading.Event(), threading.Event()
    owned.engine.call(lambda: (held.set(), go.wait(20)))
    assert held.wait(20)
    stream = ask(owned, ann, "ann-law")
    stream.cancel()
    assert owned.tenants.quotas.running() == {"ann": 1}
    go.set()
    assert stream.result()[1].finish == "cancelled"
    until(lambda: not owned.tenants.quotas.running())
    assert rows(owned, "ann") == {}
    report = owned.routing(KEYS["ann"], "ann")
    assert report["ended"] == {"cancelled": 1} and report["tokens"].get("prompt", 0) == 0


def test_every_refusal_gives_its_grant_back(owned):
    ann = owned.tenant_of(KEYS["ann"])
    with pytest.raises(ServeError, match="knows tokens"):
        owned.submit(ann, Base(), [10**6], FOUR)
    with pytest.raises(ServeError, match="longest context"):
        owned.submit(ann, Base(), [5] * 500, FOUR)
    with pytest.raises(ServeError, match="does not exist"):
        owned.submit(ann, Weighted((("gone", 1.0),)), [5], FOUR)
    with pytest.raises(ServeError):
        owned.embed(ann, Base(), [[10**6]])
    until(lambda: not owned.tenants.quotas.running())
    assert rows(owned, "ann") == {}


def test_a_full_queue_refuses_a_tenant_before_anything_is_done_for_it(owned, monkeypatch):
    """The limit is that of the tenant: who fills the queue is refused unread, while another one is let in."""
    ann, bob = owned.tenant_of(KEYS["ann"]), owned.tenant_of(KEYS["bob"])
    asked, inner, go, held = [], owned.engine.selectors["topic"], threading.Event(), threading.Event()

    class Asked:
        def select(self, prompts, allowed):
            asked.append(sorted(allowed))
            return inner.select(prompts, allowed)

    monkeypatch.setitem(owned.engine.selectors, "topic", Asked())
    monkeypatch.setattr(owned.engine, "max_waiting", 4)
    held_up = owned.engine.call(lambda: (held.set(), go.wait(30)))
    assert held.wait(30)
    try:
        streams = [ask(owned, ann, "base") for _ in range(4)]
        grants = dict(owned.tenants.quotas.running())
        prompt = ids(owned)
        auto = owned.program(ann, "auto", lambda: "the doctor")
        for refused in (lambda: ask(owned, ann, "auto"), lambda: owned.embed(ann, auto, [prompt])):
            with pytest.raises(ServeError, match="4 requests are waiting") as told:
                refused()
            assert (told.value.status, told.value.code) == (429, "queue_full")
        assert asked == [] and owned.tenants.quotas.running() == grants == {"ann": 4}
        streams.append(ask(owned, bob, "auto", "the star is not the planet"))
        assert len(asked) == 1 and "bob-secret" in asked[0]
    finally:
        go.set()
    assert held_up.result(30) and [stream.result()[1].finish for stream in streams] == ["length"] * 5


def test_a_server_that_has_ended_refuses_and_owes_nothing(world, tmp_path, monkeypatch):
    options = with_tenants(world, tmp_path, monkeypatch)
    with started(options) as service:
        ann = service.tenant_of(KEYS["ann"])
        streams = [ask(service, ann, "ann-law") for _ in range(6)]
        service.close(10.0)
        ends = [stream.result()[1] for stream in streams]
        assert {end.finish for end in ends} == {"length"}  # what was there ends whole
        with pytest.raises(ServeError) as error:
            service.submit(ann, Base(), [5], FOUR)
        assert error.value.status == 503
    with started(options) as again:
        assert rows(again, "ann") == {"ann-law": (6, 42, 24)} and not again.tenants.quotas.running()


def test_a_failing_account_harms_nobody(owned, monkeypatch, caplog):
    ann = owned.tenant_of(KEYS["ann"])
    monkeypatch.setattr(owned.tenants.quotas, "finish", lambda *args: 1 / 0)
    assert ask(owned, ann, "ann-law").result()[1].finish == "length"
    until(lambda: "an account could not be written" in caplog.text)
    monkeypatch.undo()
    assert ask(owned, ann, "shared").result()[1].finish == "length"


# --- feedback -------------------------------------------------------------------------------------------------------


def test_a_bandit_learns_what_a_tenant_likes():
    """One arm is always liked, the other never; after an update the first is drawn almost always."""
    feedback, scored = Feedback(policy={"name": "thompson", "explore": 0.05}), choice({"x": 0.5, "y": 0.5})
    before = [feedback.choose("ann", scored, f"a{i}")[0].names[0] for i in range(200)]
    assert 60 < before.count("x") < 140
    for number, name in enumerate(before):
        feedback.take("ann", f"chatcmpl-a{number}", 1.0 if name == "y" else 0.0)
    after = [feedback.choose("ann", scored, f"b{i}")[0].names[0] for i in range(100)]
    assert 25 < after.count("x") < 75  # frozen: nothing was learned yet
    assert feedback.update("ann") == 1
    learned = [feedback.choose("ann", scored, f"c{i}") for i in range(100)]
    assert [made.names[0] for made, _ in learned].count("y") > 90
    assert all(told["bandit"]["version"] == 1 for _, told in learned)
    assert [feedback.choose("bob", scored, f"d{i}")[0].names[0] for i in range(100)].count("x") > 25  # bob's own


def test_what_is_kept_of_a_tenant_is_bounded(monkeypatch):
    monkeypatch.setattr("molora.serve.feedback.MOST", 3)
    monkeypatch.setattr("molora.serve.feedback.WAITING", 4)
    feedback = Feedback()
    for i in range(10):  # a tenant may mix its adapters in endless ways
        feedback.note("ann", f"a{i}", f"mix{i}", picked=False)
        feedback.take("ann", f"cmpl-a{i}", i / 10)
    report = feedback.report("ann")["programs"]
    assert [one["program"] for one in report] == ["(other)", "mix0", "mix1", "mix2"]
    assert sum(one["rewards"] for one in report) == 10
    assert report[0]["rewards"] == 7 and report[0]["mean"] == pytest.approx(sum(range(3, 10)) / 70)
    for i in range(10):
        feedback.note("ann", f"b{i}", "x", picked=False)
    with pytest.raises(ServeError):
        feedback.take("ann", "cmpl-b5", 1.0)
    feedback.take("ann", "cmpl-b6", 1.0)


def test_propensities_are_those_of_the_draws():
    feedback, scored = Feedback(policy={"name": "softmax"}), choice({"x": 0.7, "y": 0.3})
    made = [feedback.choose("ann", scored, f"a{i}") for i in range(600)]
    share = sum(one.names[0] == "y" for one, _ in made) / 600
    told = made[0][1]["bandit"]
    assert sum(told["probabilities"].values()) == pytest.approx(1)
    assert abs(share - told["probabilities"]["y"]) < 5 * math.sqrt(0.25 / 600)
    assert all(told["bandit"]["probability"] == told["bandit"]["probabilities"][one.names[0]] for one, told in made)


def test_who_abstains_is_not_overruled():
    feedback = Feedback()
    made, told = feedback.choose("ann", choice({"x": 1.0}, abstained=True), "a")
    assert made.abstained and told == {}


def test_only_own_answers_are_rewarded_and_once(tmp_path):
    feedback = Feedback(tmp_path / "log", frozen=False)
    feedback.choose("ann", choice({"x": 0.5, "y": 0.5}), "one")
    feedback.note("ann", "one", "x", picked=True)
    feedback.note("ann", "two", "news", picked=False)
    assert feedback.take("ann", "cmpl-one", 1.0)["version"] == 1  # not frozen: it learned at once
    assert feedback.take("ann", "cmpl-two", 0.5)["version"] == 1
    messages = set()
    for tenant, id in (("ann", "one"), ("ann", "two"), ("bob", "one"), ("bob", "new"), ("ann", "new")):
        with pytest.raises(ServeError) as error:
            feedback.take(tenant, f"cmpl-{id}", 1.0)
        assert error.value.status == 404
        messages.add(json.dumps(error.value.body()).replace(id, "X"))
    assert len(messages) == 1
    report = feedback.report("ann")
    assert report["programs"] == [
        {"program": "news", "rewards": 1, "mean": 0.5}, {"program": "x", "rewards": 1, "mean": 1.0}
    ]  # fmt: skip
    with pytest.raises(ServeError, match="from 0 to 1"):
        feedback.take("ann", "cmpl-new", 1.5)


def test_a_restart_goes_on_where_the_last_one_stopped(tmp_path):
    first = Feedback(tmp_path, frozen=True)
    for number in range(4):
        first.choose("ann", choice({"x": 0.5, "y": 0.5}), f"a{number}")
    first.take("ann", "cmpl-a0", 1.0)
    first.update("ann")
    again = Feedback(tmp_path, frozen=True)
    assert again.report("ann")["version"] == 1
    with pytest.raises(ServeError):
        again.take("ann", "cmpl-a0", 1.0)
    assert again.take("ann", "cmpl-a1", 1.0)["version"] == 1 and again.update("ann") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ann.jsonl"]
    events = [json.loads(line) for line in (tmp_path / "ann.jsonl").read_text().splitlines()]
    assert all(event["tenant"] == "ann" and event["probabilities"] for event in events if event["event"] == "pick")


def test_the_option_feedback():
    assert make_feedback(None) is None and make_feedback(False) is None
    assert make_feedback(True).folder is None
    with pytest.raises(ConfigError):
        make_feedback({"policy": "nothing"})


def test_auto_asks_the_bandit_and_takes_rewards(owned):
    ann, bob = owned.tenant_of(KEYS["ann"]), owned.tenant_of(KEYS["bob"])
    streams = [ask(owned, ann, "auto") for _ in range(12)]
    for stream in streams:
        _, last = stream.result()
        assert set(last.chosen["scores"]) == {"ann-law", "ann-news", "shared"}  # what ann may use, and no more
        told = last.chosen["bandit"]
        assert set(told["probabilities"]) <= set(last.chosen["scores"])
        (name,) = stream.request.program.names
        assert told["probability"] == told["probabilities"][name]
    id = streams[0].request.id
    with pytest.raises(ServeError) as error:
        owned.take_feedback(bob, f"cmpl-{id}", 1.0)
    assert error.value.status == 404
    assert owned.take_feedback(ann, f"cmpl-{id}", 1.0)["reward"] == 1.0
    assert owned.learn("ann")["version"] == 1 and owned.learn("bob")["version"] == 0
    named = ask(owned, ann, "ann-law")
    named.result()
    assert owned.take_feedback(ann, f"cmpl-{named.request.id}", 0.25)["version"] == 1
    programs = {one["program"]: one["mean"] for one in owned.routing(KEYS["ann"], "ann")["feedback"]["programs"]}
    assert 0.25 in programs.values() or programs["ann-law"] == pytest.approx(0.625)


# --- the report -----------------------------------------------------------------------------------------------------


def test_the_report_adds_up(owned):
    ann = owned.tenant_of(KEYS["ann"])
    for model in ("ann-law", "ann-law", "shared", "base", "mix"):
        ask(owned, ann, model).result()
    ask(owned, ann, "base", adapters={"ann-law": 0.5, "shared": 0.5}).result()
    _, last = ask(owned, ann, "auto", "w1 w2 w3 w4 w5").result()
    assert last.chosen["abstained"]
    report = owned.routing(KEYS["ann"], "ann")
    assert report["requests"] == 7 and report["ended"] == {"length": 7}
    load = {one["name"]: (one["requests"], one["tokens"]) for one in report["load"]}
    assert load == {"ann-law": (3, 12), "shared": (2, 8), "(base)": (2, 8), "mix": (1, 4)}
    shares = [12 / 32, 8 / 32, 8 / 32, 4 / 32]
    assert sorted((one["share"] for one in report["load"]), reverse=True) == pytest.approx(shares)
    assert report["entropy"] == pytest.approx(-sum(p * math.log(p) for p in shares))
    assert report["most_entropy"] == pytest.approx(math.log(5))  # four that ann may use, and the base
    assert report["dead"] == ["ann-news"]
    assert report["auto"] == {"requests": 1, "abstained": 1, "abstain_rate": 1.0}
    assert report["drift"]["prompts"] == 1 and report["drift"]["distance"] > 0.5
    assert report["tokens"]["completion"] == 28
    until(lambda: owned.routing(KEYS["ann"], "ann")["settled"]["requests"] == 7)
    assert owned.routing(KEYS["admin"], "ann")["settled"]["output_tokens"] == 28


def test_only_the_tenant_and_admins_see_a_report(owned):
    told = set()
    for name in ("bob", "ghost"):
        with pytest.raises(ServeError) as error:
            owned.routing(KEYS["ann"], name)
        assert error.value.status == 404
        told.add(error.value.message.replace(name, "X"))
    assert len(told) == 1
    for key in (None, "wrong"):
        with pytest.raises(ServeError) as error:
            owned.routing(key, "ann")
        assert error.value.status == 401
    assert owned.routing(KEYS["admin"], "bob")["requests"] == 0
    with pytest.raises(ServeError) as error:
        owned.routing(KEYS["admin"], "ghost")
    assert error.value.status == 404


def test_without_tenants_there_is_one_report(plain):
    ask(plain, EVERYBODY, "shared").result()
    report = plain.routing(None, "default")
    assert report["requests"] >= 1 and report["settled"] is None
    assert set(report["dead"]) <= set(ADAPTERS) | {"mix"}
    with pytest.raises(ServeError):
        plain.routing(None, "ann")


def test_rights_that_were_taken_away_hide_names():
    ledger = Ledger()
    ledger.note("ann", Weighted((("old", 1.0),)), Usage(3, 5), "stop")
    ledger.note("ann", Weighted((("new", 1.0),)), Usage(3, 5), "stop")
    report = ledger.report("ann", ["new"])
    assert {one["name"]: one["share"] for one in report["load"]} == {"(other)": 0.5, "new": 0.5}
    assert report["dead"] == []


def test_drift_is_the_one_sided_distance_to_what_a_guard_expects():
    """Against scipy's one-sided Kolmogorov-Smirnov statistic and its critical value."""
    stats = pytest.importorskip("scipy.stats")
    import random

    draw = random.Random(0)
    even = [draw.random() for _ in range(400)]
    odd = [value**3 for value in even]  # unlike the examples: small p-values
    for values in (even, odd):
        expected = stats.ks_1samp(values, stats.uniform.cdf, alternative="greater").statistic
        assert drift(values)["distance"] == pytest.approx(expected)
    assert drift(even)["distance"] < drift(even)["by_chance"] < drift(odd)["distance"]
    critical = stats.ksone.isf(0.05, 400)
    assert drift(even)["by_chance"] == pytest.approx(critical, rel=0.05)
    assert drift([]) is None


def test_watchers_hear_of_every_end(plain):
    heard = []
    plain.watchers.append(lambda stream, last: heard.append((stream.request.id, last)))
    stream = plain.submit(Tenant("x", models=frozenset("*")), Base(), ids(plain), FOUR)
    stream.result()
    until(lambda: heard)
    assert heard[0][0] == stream.request.id and isinstance(heard[0][1], Chunk)
    plain.watchers.pop()
