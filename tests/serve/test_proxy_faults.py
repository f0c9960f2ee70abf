"""A router before servers that fail: every failure is an answer of the OpenAI shape, and nothing of a client leaks."""

import asyncio
import contextlib
import json
import logging
import socket

import httpx
import openai
import pytest
import yaml

from tests.serve.routed import ODD, SECRET, Upstream, chunk, gone, make_selector, reply, routing, running, stream, whole
from tests.serve.served import ENVIRONMENT, TENANTS, WAIT, WORDS, bearer, until

ASK = {"model": "ann-law", "messages": [{"role": "user", "content": "a film"}]}


@contextlib.contextmanager
def before(answer, environ=None, **options):
    """A router before an upstream that answers so; yields its URL and the upstream."""
    upstream = Upstream(answer)
    with running(upstream) as there, routing(there, environ, **options) as (url, _):
        yield url, upstream


def ask(url, **more):
    return httpx.post(f"{url}/v1/chat/completions", json={**ASK, **more}, timeout=WAIT)


def answering(told, status=200, headers=()):
    async def answer(upstream, receive, send):
        await reply(send, told, status, headers)

    return answer


def streaming(*pieces, end=True):
    async def answer(upstream, receive, send):
        await stream(send, pieces, end)
        if not end:
            raise ConnectionResetError  # uvicorn closes the connection

    return answer


def error_of(found):
    return found.status_code, found.json()["error"]["code"]


# --- failures ---------------------------------------------------------------------------------------------------------


def test_nobody_there():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and not listening
        with routing(f"http://127.0.0.1:{taken.getsockname()[1]}", retries=1) as (url, _):
            assert error_of(ask(url)) == (502, "upstream_unreachable")
            found = httpx.get(f"{url}/readyz")
            assert (found.status_code, found.json()["upstream"]) == (503, "upstream_unreachable")
            assert httpx.get(f"{url}/healthz").status_code == 200
            with pytest.raises(openai.InternalServerError, match="cannot be reached"):
                openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0).chat.completions.create(**ASK)
            metrics = httpx.get(f"{url}/metrics").text
            assert 'molora_route_failures_total{code="upstream_unreachable"} 2.0' in metrics


@pytest.mark.parametrize("asks", [{}, {"stream": True}])
def test_too_slow(asks):
    async def silent(upstream, receive, send):
        await gone(upstream, receive)

    with before(silent, timeout=0.3) as (url, upstream):
        assert error_of(ask(url, **asks)) == (504, "upstream_timeout")
        assert upstream.left.wait(WAIT)


def test_a_stream_that_stands_still_ends_with_an_error():
    async def stuck(upstream, receive, send):
        await stream(send, [chunk("a")], end=False)
        await gone(upstream, receive)

    with before(stuck, timeout=0.5) as (url, upstream):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        texts = []
        with pytest.raises(openai.APIError, match="took too long"):
            for one in client.chat.completions.create(**ASK, stream=True):
                texts.append(one.choices[0].delta.content)
        assert texts == ["a"]
        assert upstream.left.wait(WAIT)


@pytest.mark.parametrize("end", [True, False])
def test_a_stream_that_breaks_off_is_not_taken_for_whole(end):
    with before(streaming(chunk("a"), chunk("b", "stop"), end=end)) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        with pytest.raises(openai.APIError, match="broke off"):
            list(client.chat.completions.create(**ASK, stream=True))
        assert "[DONE]" not in ask(url, stream=True).text
        metrics = httpx.get(f"{url}/metrics").text
        assert 'molora_route_failures_total{code="upstream_closed"} 2.0' in metrics


def test_a_whole_answer_that_breaks_off():
    async def half(upstream, receive, send):
        headers = [(b"content-type", b"application/json"), (b"content-length", b"1000")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"id": "x"', "more_body": True})
        raise ConnectionResetError

    with before(half) as (url, upstream):
        assert error_of(ask(url)) == (502, "upstream_closed")
        assert len(upstream.asked) == 1  # something was sent, so it is not sent again


@pytest.mark.parametrize("told", [b"<html>", b"[1]", b'{"a": ', b""])
def test_what_is_no_answer(told):
    with before(answering(told)) as (url, _):
        assert error_of(ask(url)) == (502, "upstream_invalid")


def test_an_answer_without_end():
    async def endless(upstream, receive, send):
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        with contextlib.suppress(OSError):
            for _ in range(64):
                await send({"type": "http.response.body", "body": b" " * 65536, "more_body": True})
        await gone(upstream, receive)

    with before(endless, max_answer=1 << 20) as (url, upstream):
        assert error_of(ask(url)) == (502, "upstream_invalid")
        assert upstream.left.wait(WAIT)


@pytest.mark.parametrize("piece", [b"data: {nonsense\n\n", b"data: " + b"x" * 70_000])
def test_a_stream_of_no_events(piece):
    with before(streaming(chunk("a"), piece), max_answer=65_536) as (url, _):
        events = [line for line in ask(url, stream=True).text.split("\n\n") if line]
        assert len(events) == 2
        assert json.loads(events[1].removeprefix("data: "))["error"]["code"] == "upstream_invalid"


FORMS = [
    ({"error": {"message": "too long", "type": "x", "param": "messages", "code": 400}}, "too long", "messages"),
    ({"object": "error", "message": "too long", "type": "BadRequestError", "code": 400}, "too long", None),
    ({"error": "too long", "error_type": "validation"}, "too long", None),
    (b"plain words", "answered 400", None),
    ({"error": {"message": 5}}, "answered 400", None),
]


@pytest.mark.parametrize(("told", "message", "param"), FORMS)
def test_errors_of_all_servers_have_one_shape(told, message, param):
    with before(answering(told, 400)) as (url, _):
        found = ask(url)
        assert found.status_code == 400
        error = found.json()["error"]
        assert message in error.pop("message")
        assert error == {"type": "invalid_request_error", "param": param, "code": "invalid_request"}


def test_500_and_429_pass():
    with before(answering({"error": {"message": "out of memory", "code": 500}}, 500)) as (url, upstream):
        assert error_of(ask(url)) == (500, "upstream_error")
        assert len(upstream.asked) == 1
    with before(answering({"error": "slowly"}, 429, [(b"retry-after", b"7")])) as (url, _):
        found = ask(url)
        assert error_of(found) == (429, "rate_limit_exceeded")
        assert found.headers["retry-after"] == "7"


def test_404_does_not_tell_what_others_use(tmp_path):
    told = {"error": {"message": "The model does not exist. Valid: bob-secret", "code": 404}}
    folder = make_selector(tmp_path / "selector")
    with before(answering(told, 404), selector=str(folder)) as (url, _):
        found = ask(url)
        assert error_of(found) == (404, "model_not_found")
        assert "bob-secret" not in found.text
        found = ask(url, model="auto", messages=[{"role": "user", "content": WORDS["ann-law"][0]}])
        assert error_of(found) == (502, "upstream_lacks_model")
        assert "ann-law" in found.text


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_are_not_followed(status):
    async def moved(upstream, receive, send):
        await reply(send, {}, status, [(b"location", f"{elsewhere}/v1/chat/completions".encode())])

    other = Upstream(answering(whole()))
    with running(other) as elsewhere, before(moved) as (url, _):
        found = ask(url)
        assert error_of(found) == (502, "upstream_redirect")
        assert elsewhere not in found.text
        assert "location" not in found.headers
    assert other.asked == []


# --- what passes ------------------------------------------------------------------------------------------------------


def test_what_reaches_the_upstream_server(caplog):
    headers = {
        "Authorization": "Bearer of-the-client",
        "Cookie": "a=b",
        "X-Forwarded-Host": "evil",
        "X-Api-Key": "of-the-client",
        "X-Request-Id": "r1",
        "Connection": "close, X-Api-Key",
        "TE": "trailers",
    }
    echo = [(b"set-cookie", b"a=b"), (b"server", b"vllm"), (b"x-request-id", b"r1"), (b"keep-alive", b"timeout=9")]
    caplog.set_level(logging.DEBUG)
    with before(answering(whole(), headers=echo), {"MOLORA_UPSTREAM_KEY": SECRET}) as (url, upstream):
        found = httpx.post(f"{url}/v1/chat/completions", json={**ASK, "top_k": 5}, headers=headers)
        ((path, sent, body),) = upstream.asked
    assert path == "/v1/chat/completions"
    assert body == {**ASK, "top_k": 5}  # what it does not know passes, too
    assert sent["authorization"] == f"Bearer {SECRET}"
    assert sent["x-request-id"] == "r1"
    assert set(sent) == {"host", "accept", "accept-encoding", "connection", "user-agent", "authorization",
                         "content-type", "content-length", "x-request-id"}  # fmt: skip
    assert "of-the-client" not in json.dumps(sent)
    assert found.headers["x-request-id"] == "r1"
    assert not {"set-cookie", "keep-alive"} & set(found.headers)
    assert found.headers.get("server") != "vllm"
    assert SECRET not in caplog.text + found.text


@pytest.mark.parametrize("status", [401, 403])
def test_the_key_of_the_router_stays_its_own(status, caplog):
    caplog.set_level(logging.DEBUG)
    told = {"error": {"message": f"Incorrect API key provided: {SECRET}"}}
    with before(answering(told, status), {"MOLORA_UPSTREAM_KEY": SECRET}) as (url, _):
        found = ask(url)
        assert error_of(found) == (502, "upstream_refused")
        assert SECRET not in found.text + caplog.text
    with before(answering(told, 400), {"MOLORA_UPSTREAM_KEY": SECRET}) as (url, _):
        assert SECRET not in ask(url).text


def test_the_environment_names_no_proxy(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    with before(answering(whole())) as (url, upstream), httpx.Client(trust_env=False) as client:
        assert client.post(f"{url}/v1/chat/completions", json=ASK).status_code == 200
        assert len(upstream.asked) == 1


def test_a_body_is_written_anew():
    """Of a key that stands twice the last one counts, here and there, whatever reader the upstream server has."""
    with before(answering(whole())) as (url, upstream):
        text = '{"model": "bob-secret", "messages": [{"role": "user", "content": "\\ud800"}], "model": "ann-law"}'
        found = httpx.post(f"{url}/v1/chat/completions", content=text)
        assert found.status_code == 200
        assert upstream.asked[0][2]["model"] == "ann-law"


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"model": 5}', '{"model": ""}', "{}", '{"model": "x", "temperature": NaN}', "[" * 100_000,
     json.dumps({"model": "x" * 300}), '{"model": "x", "n": ' + "9" * 5000 + "}", '{"model": "x", "stream": "true"}'],
    ids=range(11),
)  # fmt: skip
def test_what_is_no_request(text):
    with before(answering(whole())) as (url, upstream):
        found = httpx.post(f"{url}/v1/chat/completions", content=text)
        assert found.status_code == 400
        assert found.json()["error"]["type"] == "invalid_request_error"
        assert upstream.asked == []


def test_a_large_body_is_refused():
    with before(answering(whole()), max_body=1000) as (url, upstream):
        assert error_of(ask(url, user="x" * 2000)) == (413, "body_too_large")
        assert upstream.asked == []


def test_a_stream_passes_as_it_comes():
    """Each piece is here before the next one is sent; they come in pieces that are no events."""
    step = asyncio.Semaphore(0)

    async def slowly(upstream, receive, send):
        upstream.step, upstream.loop = step, asyncio.get_running_loop()
        text = chunk("a") + b": still here\r\n\r\n" + chunk("b")
        await stream(send, [text[:7], text[7:]], end=False)
        await asyncio.wait_for(step.acquire(), WAIT)
        await send({"type": "http.response.body", "body": chunk(finish="stop") + b"data: [DONE]\n\n"})

    with before(slowly) as (url, upstream):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        chunks = iter(client.chat.completions.create(**ASK, stream=True))
        assert [next(chunks).choices[0].delta.content for _ in range(2)] == ["a", "b"]
        upstream.loop.call_soon_threadsafe(step.release)
        assert [one.choices[0].finish_reason for one in chunks] == ["stop"]


@pytest.mark.parametrize("asks", [{}, {"stream": True}])
def test_a_client_that_leaves_ends_the_upstream_request(asks):
    async def never(upstream, receive, send):
        if asks:
            await stream(send, [chunk("a")], end=False)
        await gone(upstream, receive)

    with before(never) as (url, upstream):
        host, port = url.removeprefix("http://").split(":")
        body = json.dumps({**ASK, **asks}).encode()
        with socket.create_connection((host, int(port)), timeout=WAIT) as client:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)
            until(lambda: upstream.asked)
            if asks:
                assert b"200 OK" in client.recv(4096)
        assert upstream.left.wait(WAIT)


@pytest.mark.parametrize(("asks", "pieces"), [({}, 0), ({"stream": True}, 0), ({"stream": True}, 2)])
def test_work_that_nobody_waits_for_counts(asks, pieces, tmp_path, monkeypatch):
    """Or a tenant could keep a server busy for nothing, by leaving, or by asking for more than the time allows."""

    async def never(upstream, receive, send):
        if pieces:
            await stream(send, [chunk("a")] * pieces, end=False)
        await gone(upstream, receive)

    for name, key in ENVIRONMENT.items():
        monkeypatch.setenv(name, key)
    (tmp_path / "tenants.yaml").write_text(yaml.safe_dump(TENANTS))
    options = {"tenants": str(tmp_path / "tenants.yaml"), "base": "base", "timeout": 0.5}
    upstream = Upstream(never)
    with running(upstream) as there, routing(there, **options) as (url, proxy):
        httpx.post(f"{url}/v1/chat/completions", json={**ASK, **asks}, headers=bearer("ann"), timeout=WAIT)
        until(lambda: proxy.tenants.usage("ann"))
        (row,) = proxy.tenants.usage("ann")
        assert (row.program, row.input_tokens, row.output_tokens) == ("ann-law", 2, pieces)  # "a film" is 6 bytes
        assert proxy.tenants.quotas.running() == {}


def test_names_are_translated(tmp_path):
    options = {
        "selector": str(make_selector(tmp_path / "selector")),
        "names": {"ann-law": "llama-law-v2"},
        "pattern": "base:{adapter}",
        "base": "base",
    }

    async def echo(upstream, receive, send):
        await reply(send, whole(model=upstream.asked[-1][2]["model"]))

    with before(echo, **options) as (url, upstream):
        upstream.models = ("base", "llama-law-v2", "base:shared", "odd")
        for name, theirs in (("ann-law", "llama-law-v2"), ("shared", "base:shared"), ("base", "base")):
            assert ask(url, model=name).json()["model"] == name
            assert upstream.asked[-1][2]["model"] == theirs
        told = ask(url, model="auto", messages=[{"role": "user", "content": WORDS["ann-law"][0]}]).json()
        assert (told["model"], told["molora"]["adapters"]) == ("ann-law", {"ann-law": 1.0})
        told = ask(url, model="auto", messages=[{"role": "user", "content": ODD}]).json()
        assert (told["model"], told["molora"]["base"]) == ("base", True)
        assert error_of(ask(url, model="llama-law-v2")) == (404, "model_not_found")
        listed = [one["id"] for one in httpx.get(f"{url}/v1/models").json()["data"]]
        assert listed == ["base", "ann-law", "shared", "auto"]


def test_a_busy_upstream_is_not_waited_for_forever():
    async def never(upstream, receive, send):
        await gone(upstream, receive)

    with (
        before(never, connections=1, connect_timeout=0.3, timeout=5.0) as (url, upstream),
        socket.create_connection(url.removeprefix("http://").split(":"), timeout=WAIT) as client,
    ):
        body = json.dumps(ASK).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        until(lambda: upstream.asked)
        found = ask(url)
        assert error_of(found) == (503, "upstream_busy")
        assert found.headers["retry-after"] == "1"
