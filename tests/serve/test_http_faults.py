"""What clients and the world do wrong, over a real socket: every request ends once, and what was counted adds up."""

import json
import socket
import threading

import httpx
import pytest

from tests.serve.served import KEYS, SIZES, bearer, listening, options_of, started, until, with_tenants

LONG = {"model": "ann-law", "prompt": "a film", "max_tokens": 400, "ignore_eos": True, "temperature": 0}
SIZES = {**SIZES, "max_length": 500, "kv_memory": "8MiB"}


@pytest.fixture(scope="module")
def service(world, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        options = with_tenants(world, tmp_path_factory.mktemp("faults"), patch, feedback=True, **SIZES)
        options.max_waiting = 4
        with started(options) as found:
            yield found


@pytest.fixture(scope="module")
def url(service):
    with listening(service, max_body=100_000) as found:
        yield found


@pytest.fixture
def client(url):
    with httpx.Client(base_url=url, headers=bearer("ann"), timeout=30) as found:
        yield found


@pytest.fixture
def hold(service):
    """Hold the engine's thread, so that what is asked waits; `hold()` lets it go."""
    held, go = threading.Event(), threading.Event()
    service.engine.call(lambda: (held.set(), go.wait(30)))
    assert held.wait(30)
    yield go.set
    go.set()


def counts(service):
    stats = service.engine.stats()
    rows = service.tenants.usage("ann")
    return dict(stats.ended), sum(row.requests for row in rows), sum(row.output_tokens for row in rows)


def settled(service):
    stats = service.engine.stats()
    return not (stats.running or stats.waiting or service.tenants.quotas.running())


def ended_since(service, before):
    now = counts(service)
    return {end: n - before[0].get(end, 0) for end, n in now[0].items() if n != before[0].get(end, 0)}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_client_that_leaves_in_the_middle_ends_its_answer(client, service, path):
    before = counts(service)
    body = {**LONG, "stream": True}
    if "chat" in path:
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    with client.stream("POST", path, json=body) as answer:
        lines = answer.iter_lines()
        seen = [line for line in (next(lines) for _ in range(12)) if line.startswith("data: {")]
        assert len(seen) >= 3
    until(lambda: settled(service), "the answer went on")
    assert ended_since(service, before) == {"cancelled": 1}
    after = counts(service)
    assert after[1] == before[1] + 1 and 0 < after[2] - before[2] < 400  # what was drawn is paid for


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_the_first_token(url, service, hold, stream):
    before = counts(service)
    body = json.dumps({**LONG, "stream": stream}).encode()
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as raw:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" \
               f"Authorization: Bearer {KEYS['ann']}\r\nContent-Length: {len(body)}\r\n\r\n"  # fmt: skip
        raw.sendall(head.encode() + body)
        until(lambda: service.tenants.quotas.running())
        until(lambda: service.engine.stats().waiting)
    # the engine is told of it while it is still held, so nothing is begun for nobody
    until(lambda: service.engine._loop._cancelled, "nobody noticed that the client left")
    hold()
    until(lambda: settled(service))
    assert ended_since(service, before) == {"cancelled": 1}
    assert counts(service)[1:] == before[1:]


def test_other_answers_go_on_while_clients_leave(client, url, service):
    expected = client.post("/v1/completions", json={**LONG, "max_tokens": 60}).json()["choices"][0]["text"]
    found = []

    def stay():
        with httpx.Client(base_url=url, headers=bearer("ann"), timeout=30) as own:
            found.append(own.post("/v1/completions", json={**LONG, "max_tokens": 60}).json()["choices"][0]["text"])

    threads = [threading.Thread(target=stay) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        with client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer:
            next(answer.iter_lines())
    for thread in threads:
        thread.join(30)
    assert found == [expected, expected]
    until(lambda: settled(service))


def test_several_choices_all_end_when_the_client_leaves(client, service):
    before = counts(service)
    with client.stream("POST", "/v1/completions", json={**LONG, "n": 3, "stream": True}) as answer:
        next(answer.iter_lines())
    until(lambda: settled(service))
    assert ended_since(service, before) == {"cancelled": 3}


def test_bodies_that_are_too_large(client, url):
    large = b'{"model": "base", "prompt": "' + b"a" * 100_000 + b'"}'
    told = client.post("/v1/completions", content=large)
    streamed = client.post("/v1/completions", content=iter([large[:60_000], large[60_000:]]))  # no length is stated
    for answer in (told, streamed):
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"
        assert answer.json()["error"]["type"] == "invalid_request_error"
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as raw:  # refused by its length alone
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n")
        assert raw.recv(12) == b"HTTP/1.1 413"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b'{"model": "base", "prompt": ',
        b"\xff\xfe{}",
        b"[" * 20_000,
        b'{"model": "base", "prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"model": "base", "prompt": "a", "temperature": NaN}',
        b'{"model": "base", "prompt": "a", "temperature": 1e999}',
        b'{"model": "base", "prompt": "\\ud800"}',
        b'{"model": "\\ud800", "prompt": "a"}',
        b'{"model": "base", "prompt": "a", "\\ud800": 1}',
        b'{"model": "base", "prompt": "a", "molora": {"adapters": {"\\udfff": 1}}}',
        b'{"model": "base", "prompt": "a", "tools": []}',
        b'{"model": "base", "prompt": [1, "a"]}',
        b'{"model": "base", "prompt": [-1]}',
        b'{"model": "base", "prompt": [123456789]}',
        b'{"model": "base", "prompt": []}',
        b'{"model": "base", "prompt": "a", "n": 0}',
        b'{"model": "base", "prompt": "a", "n": true}',
        b'{"model": "base", "prompt": "a", "logit_bias": {"x": 1}}',
        b'{"model": "base", "prompt": "a", "logit_bias": {"1000000": 1}}',
        b'{"model": "base", "prompt": "a", "logit_bias": {"1_0": 1}}',
        b'{"model": "base", "prompt": "a", "logit_bias": {" 5": 1}}',
        b'{"model": "base", "prompt": "a", "logit_bias": {"05": 1}}',
        b'{"model": "base", "prompt": "a", "logit_bias": {"\\u0663": 1}}',
        b'{"model": "base", "prompt": "a", "logit_bias": {"-1": 1}}',
        b'{"model": "base", "prompt": "a", "logit_bias": {"' + b"9" * 5000 + b'": 1}}',
        b'{"model": "base", "prompt": "a", "suffix": "b"}',
        b'{"model": "base", "prompt": "a", "echo": true}',
        b'{"model": "base", "prompt": "a", "best_of": 4}',
        b'{"model": "base", "prompt": "a", "stream_options": {"include_usage": 1}}',
    ],
    ids=range(34),
)
def test_bodies_that_mean_nothing(client, service, content):
    answer = client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 404), answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    until(lambda: settled(service))


def test_chats_that_mean_nothing(client):
    for messages in ([], [{"role": "robot", "content": "a"}], [{"role": "user", "content": [{"type": "image_url"}]}],
                     [{"role": "user", "content": [{"type": "image_url", "text": "a", "image_url": {"url": "x"}}]}],
                     [{"role": "user", "content": "\ud800"}], [{"content": "a"}], "hello"):  # fmt: skip
        body = json.dumps({"model": "base", "messages": messages})
        answer = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400 and answer.json()["error"]["message"], messages
        assert "JSON" not in answer.text and "dictionary" not in answer.text  # it was read, and means nothing
    for extra in ({"top_logprobs": 3}, {"response_format": {"type": "json_object"}}, {"tools": [{}]},
                  {"max_completion_tokens": 0}):  # fmt: skip
        body = {"model": "base", "messages": [{"role": "user", "content": "a"}], **extra}
        assert client.post("/v1/chat/completions", json=body).status_code == 400, extra


def test_everything_that_is_out_of_range_is_named(client):
    wrong = {"temperature": 3, "top_p": 0, "top_k": -5, "min_p": 2, "repetition_penalty": 0, "presence_penalty": 9,
             "frequency_penalty": -9, "max_tokens": 0, "logprobs": 99, "min_tokens": -1}  # fmt: skip
    answer = client.post("/v1/completions", json={"model": "base", "prompt": "a", **wrong})
    assert answer.status_code == 400
    assert all(name in answer.json()["error"]["message"] for name in wrong)


def test_prompts_that_are_too_long(client):
    for body in ({"prompt": "a " * 600}, {"prompt": [5] * 600}, {"prompt": "a", "max_tokens": 5000}):
        answer = client.post("/v1/completions", json={"model": "base", **body})
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"
    answer = client.post("/v1/embeddings", json={"model": "base", "input": [5] * 600})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"


def test_a_full_queue_refuses_and_the_rest_is_answered(client, url, service, hold):
    before, found = counts(service), []

    def ask():
        with httpx.Client(base_url=url, headers=bearer("ann"), timeout=30) as own:
            found.append(own.post("/v1/completions", json={**LONG, "max_tokens": 3}))

    threads = [threading.Thread(target=ask) for _ in range(10)]
    for thread in threads:
        thread.start()
    until(lambda: len(found) == 6)  # four wait, the rest is refused at once
    assert service.engine.stats().waiting == 4
    several = client.post("/v1/completions", json={**LONG, "n": 4})
    embedding = client.post("/v1/embeddings", json={"model": "base", "input": "a"})
    hold()
    for thread in threads:
        thread.join(30)
    statuses = sorted(answer.status_code for answer in found)
    assert statuses == [200] * 4 + [429] * 6
    for answer in [*(one for one in found if one.status_code == 429), several, embedding]:
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "queue_full"
    until(lambda: settled(service))
    assert ended_since(service, before) == {"length": 4}
    assert counts(service)[1:] == (before[1] + 4, before[2] + 12)


def test_choices_that_do_not_all_fit_are_all_refused(client, service, hold):
    before = counts(service)
    answer = client.post("/v1/completions", json={**LONG, "n": 6})
    assert answer.status_code == 429
    hold()
    until(lambda: settled(service))
    assert ended_since(service, before) == {"cancelled": 4}
    assert counts(service)[1:] == before[1:]


def test_what_takes_too_long_is_told_so(client, service, hold):
    slow = {**LONG, "timeout": 0.05}
    with httpx.Client(base_url=client.base_url, headers=bearer("ann"), timeout=30) as own:
        found = []
        thread = threading.Thread(target=lambda: found.append(own.post("/v1/completions", json=slow)))
        thread.start()
        until(lambda: service.engine.stats().waiting == 1)
        threading.Event().wait(0.1)  # its time passes while the engine is held
        hold()
        thread.join(30)
    assert found[0].status_code == 504 and found[0].json()["error"]["code"] == "timeout"
    with client.stream("POST", "/v1/completions", json={**slow, "stream": True, "timeout": 0.1}) as answer:
        events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
    assert events[-1]["error"]["code"] == "timeout"
    until(lambda: settled(service))


def test_an_adapter_that_cannot_be_read_fails_its_own_requests_alone(world, tmp_path, monkeypatch):
    import shutil

    shutil.copytree(world / "hub", tmp_path / "hub")
    options = with_tenants(world, tmp_path, monkeypatch)
    options.hub = str(tmp_path / "hub")
    with started(options) as service, listening(service) as url:
        weights = next((tmp_path / "hub" / "ann-law").rglob("*.safetensors"))
        weights.write_bytes(weights.read_bytes()[:-8])
        with httpx.Client(base_url=url, headers=bearer("ann"), timeout=30) as client:
            bad = client.post("/v1/completions", json={"model": "ann-law", "prompt": "a", "max_tokens": 2})
            good = client.post("/v1/completions", json={"model": "ann-news", "prompt": "a", "max_tokens": 2})
            assert bad.status_code in (400, 424) and "ann-law" in bad.json()["error"]["message"]
            assert str(tmp_path) not in bad.text
            assert good.status_code == 200
            states = {one["name"]: one["state"] for one in client.get("/v1/adapters").json()["data"]}
            assert states["ann-law"] == "errored" and states["ann-news"] == "ready"


def test_an_engine_that_has_failed_is_told_and_nothing_hangs(world):
    with started(options_of(world)) as service, listening(service) as url:
        assert httpx.get(f"{url}/healthz").status_code == 200

        def fail():
            raise SystemExit("the thread ends")

        service.engine.call(fail)
        until(lambda: httpx.get(f"{url}/healthz").status_code == 503)
        assert httpx.get(f"{url}/readyz").status_code == 503
        for path, body in (("completions", {"prompt": "a"}), ("embeddings", {"input": "a"})):
            answer = httpx.post(f"{url}/v1/{path}", json={"model": "base", **body}, timeout=30)
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "engine_failed"


def test_what_nobody_foresaw_is_named_in_the_log_and_says_nothing_else(world, caplog):
    from fastapi.testclient import TestClient

    from molora.serve.http import create_app

    with started(options_of(world)) as service:
        client = TestClient(create_app(service, close=False), raise_server_exceptions=False)
        service.program = lambda *args: (_ for _ in ()).throw(RuntimeError("a secret of the server"))
        answer = client.post("/v1/completions", json={"model": "base", "prompt": "a"})
        assert answer.status_code == 500 and "secret" not in answer.text
        name = answer.json()["error"]["message"].rpartition(" ")[2]
        assert name in caplog.text and "a secret of the server" in caplog.text


def test_a_drain_ends_streams_whole_and_says_that_it_goes_down(world):
    with started(options_of(world, **SIZES)) as service, listening(service) as url:
        with httpx.Client(base_url=url, timeout=30) as client:
            body = {**LONG, "max_tokens": 200, "stream": True}
            with client.stream("POST", "/v1/completions", json=body) as answer:
                lines = answer.iter_lines()
                next(lines)
                closing = threading.Thread(target=service.engine.drain, args=(30,))
                closing.start()
                until(lambda: service.engine.stats().draining)
                ready = httpx.get(f"{url}/readyz")
                refused = httpx.post(f"{url}/v1/completions", json=LONG)
                events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
                closing.join(30)
        assert ready.status_code == 503 and ready.json()["draining"]
        assert refused.status_code == 503 and refused.headers["retry-after"] == "5"
        assert events[-1]["choices"][0]["finish_reason"] == "length"


def test_a_drain_that_takes_too_long_says_so_to_the_rest(world):
    with started(options_of(world, **SIZES)) as service, listening(service) as url:
        with (
            httpx.Client(base_url=url, timeout=30) as client,
            client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer,
        ):
            lines = answer.iter_lines()
            next(lines)
            assert service.engine.drain(0.01) is False
            events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert events[-1]["error"]["code"] == "draining"


def test_a_tenant_that_fills_the_queue_shuts_nobody_out(client, url, service, hold):
    found = []

    def ask():
        with httpx.Client(base_url=url, headers=bearer("ann"), timeout=30) as own:
            found.append(own.post("/v1/completions", json={**LONG, "max_tokens": 3}).status_code)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    until(lambda: len(found) == 4)
    other = []
    own = threading.Thread(
        target=lambda: other.append(
            httpx.post(
                f"{url}/v1/completions",
                json={**LONG, "model": "shared", "max_tokens": 3},
                headers=bearer("bob"),
                timeout=30,
            ).status_code
        )
    )
    own.start()
    until(lambda: service.engine.stats().waiting == 5)
    hold()
    for thread in (*threads, own):
        thread.join(30)
    assert sorted(found) == [200] * 4 + [429] * 4 and other == [200]
