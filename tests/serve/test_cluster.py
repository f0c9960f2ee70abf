"""Two replicas on this machine: affinity, the same answers as one engine, lost processes, desired state, quotas, drain.

The tests share one cluster, and each leaves it as it found it; the last one stops it.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import signal
import time

import httpx
import psutil
import pytest
import yaml

import molora
from molora.hub.manifest import Manifest
from molora.serve.request import Auto, Mixture, Request, Sampling, Weighted
from molora.serve.tenants.tenant import EVERYBODY
from tests import tiny
from tests.serve import served
from tests.serve.adapters import peft_lora
from tests.serve.loras import make_mixture

pytest.importorskip("ray.serve", reason="needs molora[cluster]")
from ray.exceptions import RayError

from molora.serve.cluster.affinity import ordered

pytestmark = pytest.mark.slow
WAIT = 90.0  # seconds; processes start slowly on a machine that has other work
NAMES = [f"a{n}" for n in range(6)]
MORE = [f"s{n}" for n in range(16)]  # other names of the same: so many sets are never all on one replica
ALL = {"mix", *NAMES, *MORE}
PROMPT = "the film is good"
LONG = 3000  # tokens: more than any test waits for
STARTED: set[psutil.Process] = set()
KEYS = {name: f"{name}-key-0123456789abcdefghijklmnopqrstuv" for name in ("ann", "few", "two", "admin")}
TENANTS = {
    "tenants": {
        "ann": {"models": ["*"], "manage": True, "keys": ["KEY_ANN"]},
        "few": {"models": ["*"], "keys": ["KEY_FEW"], "limits": {"requests_per_minute": 3}},
        "two": {"models": ["*"], "keys": ["KEY_TWO"], "limits": {"concurrent": 2}},
    },
    "admin_keys": ["KEY_ADMIN"],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model with room for long answers, six adapters, a mixture, tenants and a manifest."""
    folder = tmp_path_factory.mktemp("cluster")
    tiny.save_tiny(tiny.tiny_llama(max_position_embeddings=4096), tiny.tiny_tokenizer(), folder / "tiny")
    hub = molora.Hub(folder / "hub")
    for seed, name in enumerate([*NAMES, "later"]):
        hub.add(peft_lora(folder / name, seed=seed), name, prompts=[f"w{seed} w{seed + 1}", f"w{seed + 10} the"])
    _, mixture = make_mixture(tiny.tiny_llama(), folder / "mixture", ["q_proj", "down_proj"])
    hub.add(mixture, "mix")
    write_manifest(folder)
    (folder / "tenants.yaml").write_text(yaml.safe_dump(TENANTS))
    return folder


def write_manifest(folder, *more):
    adapters = {name: {"adapter": name, "pin": name == "a0"} for name in (*NAMES, "mix", *more)}
    again = {name: NAMES[n % len(NAMES)] for n, name in enumerate(MORE)}
    Manifest.of(adapters | again).save(folder / "wanted.yaml")


def options(world, **changes):
    told = {
        "model": str(world / "tiny"),
        "hub": str(world / "hub"),
        "manifest": str(world / "wanted.yaml"),
        "selectors": {"topic": {"method": "centroid", "embedder": "base", "guard": None}},
        "slots": {4: 4},
        "kv_memory": "16MiB",
        "max_batch": 8,
    }
    return served.ServeOptions(**told | changes)


@pytest.fixture(scope="module")
def cluster(world):
    from molora.serve.cluster.launch import launch

    with pytest.MonkeyPatch.context() as patch:
        for name, key in KEYS.items():
            patch.setenv(f"KEY_{name.upper()}", key)
        started = options(
            world,
            tenants=str(world / "tenants.yaml"),
            port=0,
            drain=20.0,
            replicas=2,
            cluster={"interval": 0.2, "health": 0.5, "patience": 240.0, "spill": 64},
        )
        with launch(started) as found:
            note_processes()
            assert set(listening()) == {"127.0.0.1"}
            yield found
        _, alive = psutil.wait_procs(STARTED, 20.0)
        assert len(STARTED) > 8
        assert not alive


@pytest.fixture(scope="module")
def alone(world):
    """The same in this process, without Ray."""
    with served.started(options(world)) as service:
        yield service


def note_processes():
    """Add the processes that this one has started, Ray's and all of theirs, to those that must end."""
    STARTED.update(psutil.Process().children(recursive=True))


def listening():
    """Addresses on which they listen, but for replicas: see docs/sizing.md."""
    for process in STARTED:
        with contextlib.suppress(psutil.Error):
            if "ServeReplica" not in " ".join(process.cmdline()):
                yield from (
                    one.laddr.ip.removeprefix("::ffff:") for one in process.net_connections() if one.status == "LISTEN"
                )


def client(cluster, name="ann"):
    headers = {"Authorization": f"Bearer {KEYS[name]}"}
    return httpx.Client(base_url=cluster.url, headers=headers, timeout=WAIT)


def ask(cluster, model, tenant="ann", prompt=PROMPT, **more):
    body = {"model": model, "prompt": prompt, "max_tokens": 12, "temperature": 0, **more}
    with client(cluster, tenant) as http:
        return http.post("/v1/completions", json=body)


def tokens(service, text):
    return service.tokenizer(text).input_ids


def until(condition, what):
    end = time.monotonic() + WAIT
    while True:
        with contextlib.suppress(httpx.HTTPError, TimeoutError, RayError):
            found = condition()
            if found:
                return found
        assert time.monotonic() < end, what
        time.sleep(0.05)


def states(cluster, count=2):
    """What the replicas tell, once there are so many."""

    def found():
        every = cluster.states()
        return every if len(every) == count else None

    return until(found, f"there are not {count} replicas")


def users_of(cluster, name):
    """The replicas that drew tokens with an adapter since they started."""
    return {state["replica"] for state in states(cluster) if state["stats"].by_adapter.get(name)}


def home_of(cluster, name):
    """The replica that a set of adapters belongs to."""
    return ordered(name, [state["replica"] for state in states(cluster)], str, lambda one: 0, 1)[0]


def idle(cluster):
    return all(state["stats"].running + state["stats"].waiting == 0 for state in states(cluster))


def pair(cluster):
    """Two adapters that are on different replicas."""
    first = NAMES[0]
    return first, next(name for name in NAMES + MORE if home_of(cluster, name) != home_of(cluster, first))


# --- one server in every respect --------------------------------------------------------------------------------------


def test_answers_are_those_of_one_engine_and_sets_keep_their_replica(cluster, alone, world):
    asked = [(name, None) for name in ("tiny", "mix", *NAMES)] + [("tiny", {"a1": 0.5, "a2": -0.7})]
    asked = [(model, adapters, prompt) for model, adapters in asked for prompt in (PROMPT, "w3 w4 team the")]

    def expected(model, adapters, prompt):
        program = alone.program(EVERYBODY, model, str, adapters) if model != "mix" else Mixture("mix")
        sampling = Sampling(max_tokens=12, temperature=0)
        return alone.engine.submit(Request(tokens(alone, prompt), program, sampling)).result()[0]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        jobs = []
        for model, adapters, prompt in asked * 2:
            more = {"molora": {"adapters": adapters}} if adapters else {}
            jobs.append(pool.submit(ask, cluster, model, prompt=prompt, **more))
        answers = [job.result() for job in jobs]
    texts = {}
    for (model, adapters, prompt), answer in zip(asked * 2, answers, strict=True):
        assert answer.status_code == 200, answer.text
        found = answer.json()["choices"][0]["text"]
        assert found == expected(model, adapters, prompt), (model, adapters, prompt)
        texts[model, str(adapters), prompt] = found
    assert len(set(texts.values())) > len(texts) / 2  # the adapters do something
    assert texts["a3", "None", PROMPT] == served.text_of(PROMPT, 12, world / "a3")  # as PEFT has it
    for name in pair(cluster):
        assert ask(cluster, name).status_code == 200
    # a1 and a2 are used as a pair too, which is a set of its own with a home of its own
    sets = {"mix", *NAMES, *pair(cluster), "a1+a2"}
    for name in sets - {"a1+a2"}:
        assert users_of(cluster, name) == {home_of(cluster, one) for one in sets if name in one.split("+")}, name


def test_streams_come_piece_by_piece_and_end_with_their_reader(cluster):
    body = {"model": "a1", "prompt": PROMPT, "max_tokens": LONG, "stream": True, "molora": None}
    body |= {"ignore_eos": True, "temperature": 0}
    with client(cluster) as http, http.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        lines = (line for line in answer.iter_lines() if line.startswith("data: "))
        pieces = [json.loads(next(lines)[6:]) for _ in range(5)]
        assert sum(state["stats"].running for state in states(cluster)) == 1
        assert all(piece["choices"][0]["finish_reason"] is None for piece in pieces)
    until(lambda: idle(cluster), "the request outlived its reader")
    assert sum(state["stats"].ended.get("cancelled", 0) for state in states(cluster)) >= 1


def test_refusals_are_those_of_one_server(cluster):
    assert ask(cluster, "nothing").json()["error"]["code"] == "model_not_found"
    assert ask(cluster, "a0", max_tokens=9999).json()["error"]["code"] == "context_length_exceeded"
    assert ask(cluster, "a0", max_tokens=9999, stream=True).status_code == 400  # not within a stream
    assert httpx.get(f"{cluster.url}/v1/models", timeout=WAIT).status_code == 401
    with client(cluster) as http:
        assert http.get("/readyz").json()["ready"]
        assert {one["id"] for one in http.get("/v1/models").json()["data"]} == {"tiny", "auto", *ALL}


def test_any_process_can_stand_before_the_replicas(cluster, world, alone):
    """The forwarding side alone: selectors, embeddings and decisions come over the handle too."""
    from molora.serve.cluster.ingress import service_of

    service = service_of(options(world, replicas=2, cluster={"interval": 0.2}), cluster.engines)
    try:
        program = Auto("w3 w4", frozenset(NAMES))
        here, there = (one.submit(EVERYBODY, program, tokens(alone, "w3 w4"), Sampling(max_tokens=4, temperature=0))
                       for one in (alone, service))  # fmt: skip
        assert here.result()[0] == there.result()[0]
        assert there.request.program == here.request.program and there.request.chosen["weights"]
        prompts = [tokens(alone, PROMPT), tokens(alone, "w1")]
        for program in (Weighted((("a2", 1.0),)), Mixture("mix")):
            ours, theirs = (one.embed(EVERYBODY, program, prompts)[0] for one in (alone, service))
            assert (ours - theirs).abs().max() < 1e-6
        seen = []
        stream = service.submit(
            EVERYBODY, Mixture("mix"), prompts[0], Sampling(max_tokens=3, ignore_eos=True), watcher=seen.append
        )
        stream.result()
        counted = {one.layer: 0 for one in seen}
        for one in seen:
            counted[one.layer] += one.gates.shape[0]
        assert set(counted.values()) == {len(prompts[0]) + 2}  # every token that was read, in every routed layer

        async def first(stream):
            async for chunk in stream:
                return chunk

        stream = service.submit(EVERYBODY, Mixture("mix"), prompts[0], Sampling(max_tokens=LONG, ignore_eos=True))
        assert asyncio.run(first(stream)).finish is None  # leaving it cancels it
        until(lambda: stream.finished is not None, "it was not cancelled")
    finally:
        service.close(5.0)
    until(lambda: idle(cluster), "a request outlived the side that asked")


# --- quotas -----------------------------------------------------------------------------------------------------------


def test_limits_hold_for_all_replicas_together(cluster):
    first, second = pair(cluster)
    codes = [ask(cluster, model, "few").status_code for model in (first, second, first, second)]
    assert codes == [200, 200, 200, 429]
    body = {"prompt": PROMPT, "max_tokens": LONG, "ignore_eos": True, "stream": True}
    with contextlib.ExitStack() as stack:
        http = stack.enter_context(client(cluster, "two"))
        for model in (first, second):
            answer = stack.enter_context(http.stream("POST", "/v1/completions", json={**body, "model": model}))
            assert answer.status_code == 200
        refused = ask(cluster, first, "two")
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_concurrent")
    until(lambda: ask(cluster, first, "two").status_code == 200, "what was given up still counts")


# --- desired state ----------------------------------------------------------------------------------------------------


def names_everywhere(cluster):
    return [frozenset(entry.name for entry in state["entries"]) for state in states(cluster)]


def test_all_replicas_follow_the_manifest(cluster, world):
    usual = ALL
    write_manifest(world, "later")
    until(lambda: names_everywhere(cluster) == [usual | {"later"}] * 2, "a replica did not follow")
    until(lambda: ask(cluster, "later").status_code == 200, "it is not offered")
    write_manifest(world)
    until(lambda: names_everywhere(cluster) == [usual] * 2, "a replica did not follow back")
    until(lambda: ask(cluster, "later").status_code == 404, "it is still offered")
    (world / "wanted.yaml").write_text("adapters: [no, mapping]")
    time_of = states(cluster)[0]["stats"].steps
    assert ask(cluster, "a3").status_code == 200 and names_everywhere(cluster) == [usual] * 2
    assert states(cluster)[0]["stats"].steps >= time_of
    write_manifest(world)


def test_what_clients_load_is_in_the_manifest_and_everywhere(cluster, world):
    with client(cluster) as http:
        answer = http.post("/v1/adapters", json={"name": "later", "as": "mine", "pin": True})
        assert answer.status_code == 200, answer.text
        assert all("mine" in names for names in names_everywhere(cluster))  # at once, not with the next look
        assert {(one.name, one.adapter, one.pin) for one in Manifest.load(world / "wanted.yaml").wanted} >= {
            ("mine", "later", True), ("a0", "a0", True), ("a1", "a1", False)
        }  # fmt: skip
        assert ask(cluster, "mine").json()["choices"][0]["text"] == served.text_of(PROMPT, 12, world / "later")
        assert http.patch("/v1/adapters/mine", json={"pinned": False}).json()["pinned"] is False
        assert http.post("/v1/adapters", json={"name": "nowhere"}).status_code == 404
        assert "nowhere" not in (world / "wanted.yaml").read_text()
        assert http.delete("/v1/adapters/mine").status_code == 204
        assert ask(cluster, "mine").status_code == 404
    assert "mine" not in (world / "wanted.yaml").read_text()


# --- lost processes ---------------------------------------------------------------------------------------------------


def test_without_its_balance_the_cluster_goes_on_and_then_has_it_again(cluster):
    import ray

    actor = ray.get_actor("molora-balance", "molora")
    until(lambda: ray.get(actor.totals.remote(), timeout=5.0).get("ann", 0) > 0, "nothing was counted")
    ray.kill(actor, no_restart=False)
    assert all(ask(cluster, name).status_code == 200 for name in NAMES)

    def counted():
        ask(cluster, "a1")
        return ray.get(actor.totals.remote(), timeout=5.0).get("ann", 0) > 0

    until(counted, "the counters did not recover")


def test_a_lost_replica_fails_its_own_requests_only_and_comes_back(cluster, world):
    from molora.serve.tenants.store import Tenants

    first, second = pair(cluster)
    victim = next(state for state in states(cluster) if state["replica"] == home_of(cluster, first))
    body = {"prompt": PROMPT, "max_tokens": LONG, "ignore_eos": True, "temperature": 0}
    with Tenants(str(world / "tenants.db")) as tenants, concurrent.futures.ThreadPoolExecutor(3) as pool:
        used = sum(row.requests for row in tenants.usage("ann"))
        whole = pool.submit(ask, cluster, first, **body)
        streamed = pool.submit(ask, cluster, first, **body, stream=True)
        other = pool.submit(ask, cluster, second, **body | {"max_tokens": 600})
        until(lambda: sum(state["stats"].running for state in states(cluster)) == 3, "they do not all run")
        os.kill(victim["pid"], signal.SIGKILL)
        answer = whole.result(WAIT)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "replica_lost")
        assert answer.headers["Retry-After"]
        text = streamed.result(WAIT).text
        assert '"replica_lost"' in text and text.rstrip().endswith("[DONE]")
        kept = other.result(WAIT)
        assert kept.status_code == 200 and kept.json()["usage"]["completion_tokens"] == 600
        # nothing is held or charged for what was lost
        until(lambda: not tenants.quotas.running().get("ann"), "grants of lost requests are still held")
        assert sum(row.requests for row in tenants.usage("ann")) == used + 1
        assert ask(cluster, first).status_code == 200  # by whoever is there
    fresh = states(cluster)
    assert victim["replica"] not in {state["replica"] for state in fresh}
    for state in fresh:
        assert {entry.name for entry in state["entries"]} == ALL
        assert next(entry for entry in state["entries"] if entry.name == "a0").state == "ready"  # pinned


# --- going down -------------------------------------------------------------------------------------------------------


def test_replicas_that_are_replaced_end_their_answers_first_and_load_brings_more(cluster):
    """The server is deployed again with one to two replicas by load: both old ones go, with answers on them."""
    from ray import serve

    from molora.serve.cluster import launch

    old = {state["replica"] for state in states(cluster)}
    body = {"prompt": PROMPT, "max_tokens": 600, "ignore_eos": True, "temperature": 0}
    told = cluster.options
    scaled = {**told.cluster, "max_replicas": 2, "target_tokens": 100, "upscale_delay": 0.0, "downscale_delay": 1.0}
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(ask, cluster, model, **body) for model in pair(cluster)]
        until(lambda: sum(state["stats"].running for state in cluster.states()) == 2, "they do not run")
        changed = dataclasses.replace(told, replicas=1, cluster=scaled)
        serve.run(launch.application(changed, launch.everywhere(changed)), name="molora")
        for job in jobs:
            answer = job.result(WAIT)
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["completion_tokens"] == 600
    until(lambda: old.isdisjoint(state["replica"] for state in cluster.states()), "an old replica is still there")
    until(lambda: ask(cluster, "a1").status_code == 200, "the new one does not answer")
    states(cluster, 1)  # nothing is queued, so one is enough
    with contextlib.ExitStack() as stack:
        http = stack.enter_context(client(cluster))
        for name in NAMES:  # each is worth what is expected of an answer
            more = {**body, "model": name, "max_tokens": LONG, "stream": True}
            assert stack.enter_context(http.stream("POST", "/v1/completions", json=more)).status_code == 200
        assert sum(state["queued_tokens"] for state in states(cluster, 2)) > 100
    states(cluster, 1)
    assert ask(cluster, "a1").status_code == 200 and ask(cluster, "a4").status_code == 200


def test_the_whole_server_ends_its_answers_first(cluster):
    body = {"prompt": PROMPT, "max_tokens": 300, "ignore_eos": True, "temperature": 0}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        job = pool.submit(ask, cluster, "a2", **body)
        until(lambda: sum(state["stats"].running for state in cluster.states()) == 1, "it does not run")
        note_processes()
        cluster.close()
        answer = job.result(WAIT)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 300
