"""No sequence of calls shows a tenant another one's adapter, or uses it: a state machine over HTTP.

Beside the server goes a second world in which the other tenant's adapters do not exist at all. Everything that a tenant
is told must be the same in both, byte by byte, but for times and ids: then it cannot tell forbidden from unknown.
"""

import json
import re

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from molora.serve.http import create_app
from molora.serve.request import Mixture, Weighted
from tests.serve.served import KEYS, bearer, started, with_tenants

SELECTORS = {"topic": {"method": "centroid", "embedder": "words", "guard": "nearest"}}
MINE, FREE = ("ann-law", "ann-news"), ("shared", "mix")
FOREIGN = ("bob-secret", "bob-plans", "bob-secret@1", "bob-nothing", "nothing", "Bob-secret", "bob-*", "*",
           "ann-nothing", "../hub", "bob-secret/..", "base@1", "ghost")  # fmt: skip
NAMES = st.sampled_from([*MINE, *FREE, "base", "auto", *FOREIGN])
TEXTS = st.sampled_from(["the doctor is not the patient", "is it the star or the planet", "the bank is not the price",
                         "w1 w2 w3"])  # fmt: skip
SECRET = re.compile(r"bob-(secret|plans)")


def steady(answer, names):
    """What a tenant is told, without what differs from call to call and without the names that it said itself."""
    text = answer.text
    for name in sorted(names, key=len, reverse=True):
        text = text.replace(json.dumps(name)[1:-1], "NAME")
    text = re.sub(r"(chatcmpl|cmpl)-[0-9a-f]{32}", "ID", text)
    moving = "created|since|last_load_ms|state|in_use|waiting|prompt_tokens_details|cached"
    text = re.sub(rf'"({moving})":("[a-z]*"|\{{[^}}]*\}}|[0-9.]+|null)', r'"\1":0', text)
    return answer.status_code, text


class World:
    """A server whose engine notes which adapters it was asked for, by tenant."""

    def __init__(self, service):
        self.service, self.used = service, []
        inner = service.engine.submit

        def submit(request, **options):
            program = request.program
            names = program.names if isinstance(program, Weighted) else ()
            names = (program.name,) if isinstance(program, Mixture) else names
            self.used += [(request.tenant, name) for name in names]
            return inner(request, **options)

        service.engine.submit = submit
        self.client = TestClient(create_app(service, close=False))

    def reset(self):
        """Serve what is served at the start, with bob's adapters as they are."""
        for name in self.wanted:
            if name not in self.service.store.names:
                self.service.store.register(name)
        for name in self.service.store.names - set(self.wanted):
            self.service.store.unregister(name)
        for entry in self.service.store.entries():
            if entry.pinned:
                self.service.store.pin(entry.name, False)
        self.used.clear()


@pytest.fixture(scope="module")
def worlds(world, tmp_path_factory):
    import shutil

    with pytest.MonkeyPatch.context() as patch:
        both, alone = tmp_path_factory.mktemp("both"), tmp_path_factory.mktemp("alone")
        shutil.copytree(world / "hub", alone / "hub")
        for name in ("bob-secret", "bob-plans"):
            shutil.rmtree(alone / "hub" / name)
        first = with_tenants(world, both, patch, selectors=SELECTORS, feedback=True)
        second = with_tenants(world, alone, patch, selectors=SELECTORS, feedback=True)
        second.hub = str(alone / "hub")
        with started(first) as one, started(second) as two:
            made = World(one), World(two)
            for found in made:
                found.wanted = sorted(found.service.store.names)
            assert set(made[0].wanted) - set(made[1].wanted) == {"bob-secret", "bob-plans"}
            yield made


def machine(worlds):
    class Machine(RuleBasedStateMachine):
        """Ann calls whatever she likes; bob uses his adapters beside her."""

        def __init__(self):
            super().__init__()
            self.ids = []

        @initialize()
        def begin(self):
            for one in worlds:
                one.reset()

        def call(self, method, path, *names, **options):
            answers = [one.client.request(method, path, headers=bearer("ann"), **options) for one in worlds]
            told = [steady(answer, names) for answer in answers]
            assert told[0] == told[1], (method, path, options)
            said = {name for name in names if SECRET.search(name)}
            if not said:
                assert not SECRET.search(answers[0].text), answers[0].text
            assert answers[0].status_code < 500
            for tenant, name in worlds[0].used:
                assert tenant == "bob" or name in (*MINE, *FREE), name
            return answers

        @rule()
        def lists(self):
            self.call("GET", "/v1/models")
            self.call("GET", "/v1/adapters")

        @rule(name=NAMES)
        def looks(self, name):
            self.call("GET", f"/v1/models/{name}", name)
            self.call("GET", f"/v1/adapters/{name}", name)

        @rule(name=NAMES, text=TEXTS, chats=st.booleans(), stream=st.booleans(), trace=st.booleans())
        def asks(self, name, text, chats, stream, trace):
            body = {"model": name, "max_tokens": 2, "temperature": 0, "stream": stream}
            if trace:
                body["molora"] = {"trace": True}
            if name == "auto":
                body["max_tokens"] = 1  # the bandit draws by ids, which differ
                found = worlds[0].client.post("/v1/completions", json={**body, "prompt": text}, headers=bearer("ann"))
                assert found.status_code == 200 and not SECRET.search(found.text)
                return
            ask = {"messages": [{"role": "user", "content": text}]} if chats else {"prompt": text}
            path = "/v1/chat/completions" if chats else "/v1/completions"
            answers = self.call("POST", path, name, json={**body, **ask})
            if answers[0].status_code == 200 and not stream:
                self.ids.append([answer.json()["id"] for answer in answers])

        @rule(first=NAMES, second=NAMES, weight=st.sampled_from([0.0, 0.5, 1.0, 200.0]))
        def mixes(self, first, second, weight):
            molora = {"adapters": {first: weight, second: 0.5}}
            body = {"model": "base", "prompt": "a film", "max_tokens": 2, "temperature": 0, "molora": molora}
            self.call("POST", "/v1/completions", first, second, json=body)
            self.call("POST", "/v1/embeddings", first, second,
                      json={"model": "base", "input": "a film", "molora": molora})  # fmt: skip

        @rule(name=NAMES.filter(lambda name: name != "auto"), text=TEXTS)
        def embeds(self, name, text):
            self.call("POST", "/v1/embeddings", name, json={"model": name, "input": text})

        @rule(name=NAMES, other=st.none() | NAMES, pin=st.booleans())
        def loads(self, name, other, pin):
            body = {"name": name, "pin": pin} | ({} if other is None else {"as": other})
            if other == "shared" or (other is None and name == "shared"):
                return  # both tenants may put something else there
            if other in FREE or other in MINE:
                return
            self.call("POST", "/v1/adapters", name, *([] if other is None else [other]), json=body)

        @rule(name=NAMES, path=NAMES)
        def loads_as_vllm(self, name, path):
            if name in (*MINE, *FREE):
                return
            body = {"lora_name": name, "lora_path": path}
            self.call("POST", "/v1/load_lora_adapter", name, path, json=body)

        @rule(name=st.sampled_from([*MINE, *FOREIGN]), vllm=st.booleans())
        def unloads(self, name, vllm):
            if vllm:
                self.call("POST", "/v1/unload_lora_adapter", name, json={"lora_name": name})
            else:
                self.call("DELETE", f"/v1/adapters/{name}", name)

        @rule(name=NAMES, pinned=st.booleans())
        def pins(self, name, pinned):
            self.call("PATCH", f"/v1/adapters/{name}", name, json={"pinned": pinned})

        @rule(name=st.sampled_from(["ann", "bob", "ghost", "plain", "../bob", "default"]))
        def reads_reports(self, name):
            answers = [one.client.get(f"/v1/tenants/{name}/routing", headers=bearer("ann")) for one in worlds]
            assert not SECRET.search(answers[0].text)
            assert answers[0].status_code == (200 if name == "ann" else 404)
            if name != "ann":
                assert steady(answers[0], [name]) == steady(answers[1], [name])

        @rule(reward=st.sampled_from([0.0, 1.0, 2.0]), known=st.booleans())
        def rewards(self, reward, known):
            own = self.ids[-1] if known and self.ids else ("cmpl-none", "cmpl-none")
            for one, id in zip(worlds, own, strict=True):
                answer = one.client.post("/v1/feedback", headers=bearer("ann"),
                                         json={"response_id": id, "reward": reward})  # fmt: skip
                assert answer.status_code in (200, 400, 404) and not SECRET.search(answer.text)

        @rule()
        def asks_for_what_is_the_operators(self):
            for path in ("/metrics", "/v1/tenants/bob/routing", "/v1/tenants/ghost/learn"):
                self.call("GET", path, "bob", "ghost")
            self.call("POST", "/v1/tenants/bob/learn")

        @rule(name=st.sampled_from(["bob-secret", "bob-plans", "shared"]))
        def bob_uses_his(self, name):
            body = {"model": name, "prompt": "is it the star or the planet", "max_tokens": 1}
            assert worlds[0].client.post("/v1/completions", json=body, headers=bearer("bob")).status_code == 200

    return Machine


def test_no_sequence_of_calls_leads_to_anothers_adapter(worlds):
    quiet = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    run_state_machine_as_test(
        machine(worlds),
        settings=settings(max_examples=25, stateful_step_count=16, deadline=None, suppress_health_check=quiet,
                          database=None, derandomize=True),
    )  # fmt: skip


def test_forbidden_and_unknown_have_the_same_bytes(worlds):
    client, ann = worlds[0].client, bearer("ann")

    def every(name):
        ask = {"max_tokens": 1}
        yield client.get(f"/v1/models/{name}", headers=ann)
        yield client.get(f"/v1/adapters/{name}", headers=ann)
        yield client.post("/v1/completions", json={"model": name, "prompt": "a", **ask}, headers=ann)
        messages = [{"role": "user", "content": "a"}]
        yield client.post("/v1/chat/completions", json={"model": name, "messages": messages, **ask}, headers=ann)
        yield client.post("/v1/embeddings", json={"model": name, "input": "a"}, headers=ann)
        mix = {"model": "base", "prompt": "a", "molora": {"adapters": {name: 1.0}}}
        yield client.post("/v1/completions", json=mix, headers=ann)
        yield client.post("/v1/adapters", json={"name": name}, headers=ann)
        yield client.post("/v1/adapters", json={"name": name, "as": "ann-x"}, headers=ann)
        yield client.post("/v1/adapters", json={"name": "ann-law", "as": name}, headers=ann)
        yield client.patch(f"/v1/adapters/{name}", json={"pinned": True}, headers=ann)
        yield client.delete(f"/v1/adapters/{name}", headers=ann)
        yield client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": "ann-law"}, headers=ann)
        yield client.post("/v1/unload_lora_adapter", json={"lora_name": name}, headers=ann)

    forbidden, unknown = list(every("bob-secret")), list(every("bob-sacred"))
    for one, other in zip(forbidden, unknown, strict=True):
        assert one.status_code == other.status_code == 404, one.text
        assert one.content.replace(b"bob-secret", b"X") == other.content.replace(b"bob-sacred", b"X")
        assert dict(one.headers) == dict(other.headers)
    assert client.get("/v1/models/bob-secret", headers=bearer("bob")).status_code == 200


def test_bad_keys_are_told_alike(worlds):
    client = worlds[0].client
    told = set()
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic eA=="}, bearer("admin"),
                    {"Authorization": "Bearer " + KEYS["ann"][:-1]}):  # fmt: skip
        answer = client.get("/v1/models", headers=headers)
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        told.add(answer.content)
    assert len(told) == 1


def test_metrics_are_the_admins(worlds):
    client = worlds[0].client
    assert client.get("/metrics").status_code == client.get("/metrics", headers=bearer("ann")).status_code == 401
    assert 'molora_tenant_tokens{tenant="bob"}' in client.get("/metrics", headers=bearer("admin")).text
    open_to_all = TestClient(create_app(worlds[0].service, close=False, open_metrics=True))
    assert open_to_all.get("/metrics").status_code == 200
