"""`molora serve` as a process: signals, kills, restarts, and what its log says."""

import json
import shutil
import signal
import threading

import httpx
import pytest

from molora.serve.tenants.store import Tenants
from tests.serve.served import ENVIRONMENT, KEYS, Process, bearer, until

pytestmark = pytest.mark.slow  # five starts of a process that imports torch
PROMPT = "the doctor is not the patient"
LONG = {"model": "ann-law", "prompt": PROMPT, "max_tokens": 300, "ignore_eos": True, "temperature": 0}


@pytest.fixture
def folder(world, tmp_path):
    shutil.copy(world / "tenants.yaml", tmp_path / "tenants.yaml")
    return tmp_path


def options(world, **changes):
    return {
        "model": str(world / "base"), "hub": str(world / "hub"), "tenants": "./tenants.yaml", "slots": {4: 4},
        "kv_memory": "8MiB", "max_length": 500, "feedback": "./feedback", "pinned": ["shared"], **changes,
    }  # fmt: skip


def usage(folder):
    with Tenants(str(folder / "tenants.db")) as tenants:
        return {row.program: (row.requests, row.output_tokens) for row in tenants.usage("ann")}


def begun(url, **changes):
    """Begin a stream; returns a function that reads the rest of it: events, and whether it ended in order."""
    client = httpx.Client(base_url=url, headers=bearer("ann"), timeout=30)
    context = client.stream("POST", "/v1/completions", json={**LONG, "stream": True, **changes})
    lines = context.__enter__().iter_lines()
    first = next(lines)

    def rest():
        events, whole = [first], False
        try:
            for line in lines:
                events.append(line)
            whole = "data: [DONE]" in events
        except httpx.HTTPError:
            pass
        finally:
            context.__exit__(None, None, None)
            client.close()
        return [json.loads(one[6:]) for one in events if one.startswith("data: {")], whole

    return rest


def test_sigint_ends_it_and_a_drain_has_an_end(world, folder):
    with Process(folder, options(world, drain=0.5, max_length=4000, kv_memory="64MiB")) as server:
        rest = begun(server.url, max_tokens=3900)
        assert server.end(signal.SIGINT) == 0, server.text()
        events, _ = rest()
    assert not any(choice["finish_reason"] for one in events for choice in one.get("choices", ()))
    ((requests, tokens),) = usage(folder).values()
    assert requests == 1 and 0 < tokens < 3900  # what was drawn is paid for


def test_a_kill_loses_nothing_that_was_settled(world, folder):
    with Process(folder, options(world)) as server:
        url = server.url
        done = httpx.post(f"{url}/v1/completions", json={**LONG, "max_tokens": 7}, headers=bearer("ann"), timeout=30)
        id = done.json()["id"]
        told = httpx.post(
            f"{url}/v1/completions", json={**LONG, "model": "base", "max_tokens": 3}, headers=bearer("ann")
        )
        assert told.status_code == 200
        until(lambda: usage(folder) == {"ann-law": (1, 7), "base": (1, 3)})
        begun(url)  # one that is still running
        server.end(signal.SIGKILL)
    assert usage(folder) == {"ann-law": (1, 7), "base": (1, 3)}
    with Process(folder, options(world)) as server:
        report = httpx.get(f"{server.url}/v1/tenants/ann/routing", headers=bearer("admin")).json()
        assert report["settled"] == {"requests": 2, "input_tokens": 14, "output_tokens": 10}
        assert report["requests"] == 0  # what is counted in memory begins anew
        again = httpx.post(f"{server.url}/v1/completions", json={**LONG, "max_tokens": 7}, headers=bearer("ann"))
        assert again.json()["choices"] == done.json()["choices"]
        gone = httpx.post(f"{server.url}/v1/feedback", json={"response_id": id, "reward": 1}, headers=bearer("ann"))
        assert gone.status_code == 404
        assert server.end(signal.SIGTERM) == 0
    assert usage(folder) == {"ann-law": (2, 14), "base": (1, 3)}


def test_sigterm_lets_streams_end_whole_and_the_log_holds_no_secrets(world, folder):
    """Even at its most talkative, and when something goes wrong."""
    with Process(folder, options(world), "--log-level", "debug") as server:
        with httpx.Client(base_url=server.url, timeout=30) as client:
            ask = {**LONG, "max_tokens": 5}
            for who in ("ann", "bob", "noone"):
                client.post("/v1/completions", json=ask, headers=bearer(who))
            messages = [{"role": "user", "content": PROMPT}]
            said = client.post("/v1/chat/completions", json={"model": "base", "messages": messages, "max_tokens": 5,
                               "temperature": 0}, headers=bearer("ann")).json()  # fmt: skip
            client.post("/v1/completions", content=b'{"model": "' + PROMPT.encode(), headers=bearer("ann"))
            client.post("/v1/completions", json={**ask, "temperature": 9}, headers=bearer("ann"))
            client.post("/v1/completions", json={**ask, "prompt": PROMPT + " w9" * 600}, headers=bearer("ann"))
            client.get("/v1/models", headers={"Authorization": "Bearer a-wrong-key-that-is-not-told"})
            client.post("/v1/adapters", json={"name": "ann-nothing"}, headers=bearer("ann"))
            client.post("/v1/embeddings", json={"model": "ann-law", "input": PROMPT}, headers=bearer("ann"))
            assert client.get("/readyz").status_code == 200
        rest, found = begun(server.url), []
        reader = threading.Thread(target=lambda: found.append(rest()))
        reader.start()
        assert server.end(signal.SIGTERM) == 0, server.text()
        reader.join(30)
        text = server.text()
    events, whole = found[0]
    assert whole and events[-1]["choices"][0]["finish_reason"] == "length"
    assert usage(folder)["ann-law"] == (3, 305)  # a completion, an embedding and the stream
    assert "the server has ended" in text and "Traceback" not in text
    assert "/v1/completions" in text  # the access log is there
    for secret in (*KEYS.values(), "a-wrong-key", PROMPT, "doctor", said["choices"][0]["message"]["content"]):
        assert secret not in text, secret
    for name in (folder / "tenants.db", *folder.glob("tenants.db-*"), *(folder / "feedback").glob("*")):
        data = name.read_bytes()
        assert PROMPT.encode() not in data and not any(key.encode() in data for key in ENVIRONMENT.values())
