"""/v1/adapters and vLLM's bodies for it; metrics with bounded labels; health and readiness."""

import time

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from molora.serve.http import create_app
from molora.serve.http.metrics import MOST
from molora.serve.request import Request, Sampling, Weighted
from molora.serve.store.loading import HeldSource
from tests.serve.adapters import Fake, held
from tests.serve.served import bearer, options_of, started, text_of, until, with_tenants


@pytest.fixture
def client(world):
    with started(options_of(world, adapters=["ann-law", "mix"])) as service:
        yield TestClient(create_app(service, close=False))


@pytest.fixture
def owned(world, tmp_path, monkeypatch):
    with started(with_tenants(world, tmp_path, monkeypatch, adapters=["ann-law", "shared"])) as service:
        yield TestClient(create_app(service, close=False))


def ask(client, model):
    body = {"model": model, "prompt": "a film", "max_tokens": 6, "temperature": 0}
    return client.post("/v1/completions", json=body)


def words(answer):
    return answer.json()["choices"][0]["text"].split()


def metrics(client, **options):
    families = text_string_to_metric_families(client.get("/metrics", **options).text)
    return {family.name: family for family in families}


def test_load_pin_unload(client, world):
    assert ask(client, "bob-plans").status_code == 404
    told = client.post("/v1/adapters", json={"name": "bob-plans", "pin": True})
    assert told.status_code == 200 and told.json()["pinned"] and told.json()["parent"] == "base"
    until(lambda: client.get("/v1/adapters/bob-plans").json()["state"] == "ready")
    found = client.get("/v1/adapters/bob-plans").json()
    assert found["rank"] == 4 and found["kind"] == "lora" and found["last_load_ms"] > 0 and found["digest"]
    assert words(ask(client, "bob-plans")) == text_of("a film", 6, world / "lora-bob-plans").split()
    assert client.patch("/v1/adapters/bob-plans", json={"pinned": False}).json()["pinned"] is False
    assert client.delete("/v1/adapters/bob-plans").status_code == 204
    assert client.delete("/v1/adapters/bob-plans").status_code == 404
    assert ask(client, "bob-plans").status_code == 404
    assert {one["name"]: one["kind"] for one in client.get("/v1/adapters").json()["data"]} == {
        "ann-law": "lora", "mix": "mixture",
    }  # fmt: skip


def test_an_adapter_may_be_served_under_another_name(client, world):
    assert client.post("/v1/adapters", json={"name": "shared@1", "as": "films"}).status_code == 200
    assert words(ask(client, "films")) == text_of("a film", 6, world / "lora-shared").split()
    for body in ({"name": "../hub"}, {"name": "/etc/passwd"}, {"name": "shared", "as": "../x"}, {"name": "none"}):
        answer = client.post("/v1/adapters", json=body)
        assert answer.status_code == 404, answer.text  # names of the library, never paths


def test_too_many_cannot_be_pinned(client):
    for name in ("ann-law", "ann-news", "bob-plans"):
        assert client.post("/v1/adapters", json={"name": name, "pin": True}).status_code == 200
    answer = client.post("/v1/adapters", json={"name": "shared", "pin": True})
    assert 400 <= answer.status_code < 500 and "pinned" in answer.json()["error"]["message"]


def test_the_bodies_of_vllm(client, world):
    body = {"lora_name": "films", "lora_path": "shared", "lora_int_id": 7, "base_model_name": "base"}
    answer = client.post("/v1/load_lora_adapter", json=body)
    assert answer.status_code == 200 and answer.text == "Success: LoRA adapter 'films' added successfully."
    assert words(ask(client, "films")) == text_of("a film", 6, world / "lora-shared").split()
    again = client.post("/v1/load_lora_adapter", json=body)
    assert again.status_code == 400 and "loaded already" in again.json()["error"]["message"]
    inplace = {**body, "lora_path": "bob-plans", "load_inplace": True}
    assert client.post("/v1/load_lora_adapter", json=inplace).status_code == 200
    assert words(ask(client, "films")) == text_of("a film", 6, world / "lora-bob-plans").split()
    answer = client.post("/v1/unload_lora_adapter", json={"lora_name": "films", "lora_int_id": 7})
    assert answer.status_code == 200 and answer.text == "Success: LoRA adapter 'films' removed successfully."
    gone = client.post("/v1/unload_lora_adapter", json={"lora_name": "films"})
    assert gone.status_code == 404 and gone.json()["error"]["code"] == "model_not_found"


def test_only_managers_load(owned):
    for who, status in (("plain", 403), ("noone", 403), ("ann", 200), ("bob", 200)):
        assert owned.post("/v1/adapters", json={"name": "shared"}, headers=bearer(who)).status_code == status
    refused = owned.delete("/v1/adapters/ann-law", headers=bearer("plain"))  # not even whether it exists
    assert refused.content == owned.delete("/v1/adapters/nothing", headers=bearer("plain")).content


# --- metrics and health ---------------------------------------------------------------------------------------------


def test_metrics_count_what_was_answered(client):
    before = metrics(client)
    for model in ("ann-law", "ann-law", "base"):
        ask(client, model)
    ask(client, "nothing")
    until(lambda: value(metrics(client), "molora_answers", "_total", finish="length") == 3)
    after = metrics(client)

    def grown(name, suffix="_total", **labels):
        return value(after, name, suffix, **labels) - value(before, name, suffix, **labels)

    assert grown("molora_answer_tokens") == 18 and grown("molora_prompt_tokens") == 9
    assert value(after, "molora_adapter_tokens", "", adapter="ann-law") == 12
    assert grown("molora_http_requests", route="/v1/completions", status="404") == 1
    assert grown("molora_http_requests", route="/v1/completions", status="200") == 3
    assert grown("molora_first_token_seconds", "_count") == grown("molora_answer_seconds", "_count") == 3
    assert value(after, "molora_healthy", "") == 1 and value(after, "molora_running", "") == 0
    assert value(after, "molora_adapters", "", state="ready") == 1


def value(families, name, suffix, **labels):
    samples = families[name].samples if name in families else []
    return next((one.value for one in samples if one.name == name + suffix and one.labels == labels), 0.0)


def test_unknown_paths_add_no_series(client):
    for number in range(30):
        client.get(f"/nothing/{number}")
        client.get(f"/v1/models/none-{number}")
    routes = {sample.labels["route"] for sample in metrics(client)["molora_http_requests"].samples}
    assert routes <= {"(none)", "/v1/models/{name:path}", "/metrics"}


def test_a_thousand_adapters_and_tenants_cost_no_more_than_twenty(world):
    with started(options_of(world, adapters=[])) as service:
        source = HeldSource(*held(), service.store.slots)
        for number in range(1000):
            service.store.register(f"adapter-{number}", Fake(source))
        client = TestClient(create_app(service, close=False))
        sampling = Sampling(temperature=0, max_tokens=1, ignore_eos=True)
        asked = range(0, 1000, 25)
        requests = [Request([5], Weighted(((f"adapter-{n}", 1.0),)), sampling, f"tenant-{n}") for n in asked]
        for stream in [service.engine.submit(request) for request in requests]:
            stream.result()
        began = time.thread_time()
        families = metrics(client)
        assert time.thread_time() - began < 1.0  # measured: about 0.03 s
        for name, family in families.items():
            if name in ("molora_adapter_tokens", "molora_tenant_tokens"):
                assert len(family.samples) == MOST + 1
                other = next(one.value for one in family.samples if "other" in one.labels.values())
                assert other == (len(asked) - MOST) * (2 if "tenant" in name else 1)
            else:
                assert len(family.samples) < 60, name
        assert sum(sample.value for sample in families["molora_adapters"].samples) == 1000
        began = time.thread_time()
        assert len(client.get("/v1/adapters").json()["data"]) == 1000
        assert len(client.get("/v1/models").json()["data"]) == 1001
        assert time.thread_time() - began < 2.0


def test_readiness_waits_for_pinned_adapters_and_ends_with_the_drain(world):
    with started(options_of(world, adapters=[])) as service:
        client = TestClient(create_app(service, close=False))
        slow = Fake(HeldSource(*held(), service.store.slots), slow=True)
        assert client.get("/readyz").json() == {"ready": True, "draining": False, "waiting_for": 0}
        service.store.register("slow", slow, pinned=True)
        assert slow.began.wait(20)
        answer = client.get("/readyz")
        assert answer.status_code == 503 and answer.json() == {"ready": False, "draining": False, "waiting_for": 1}
        assert client.get("/healthz").status_code == 200
        slow.gate.set()
        until(lambda: client.get("/readyz").status_code == 200)
        service.engine.drain(1.0)
        assert client.get("/readyz").json()["draining"] and client.get("/healthz").status_code == 200


def test_the_app_closes_what_it_serves(world):
    from molora.serve.start import start

    service, report = start(options_of(world))
    assert any("6 registered" in line for line in report)
    with TestClient(create_app(service, drain=5.0)) as client:
        assert client.get("/healthz").json() == {"healthy": True}
    assert not service.engine.stats().healthy


def test_paths_that_are_not_there(client):
    wrong = (("get", "/nothing", 404), ("delete", "/v1/models", 405), ("get", "/v1/completions", 405))
    for method, path, status in wrong:
        answer = getattr(client, method)(path)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert "GET" in client.delete("/v1/models").headers["allow"]
