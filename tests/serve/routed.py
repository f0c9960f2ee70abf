"""Routers for the tests: a selector for the small world of served.py, a router on a thread, and faulty upstreams."""

import asyncio
import contextlib
import json
import socket
import threading

import uvicorn

from molora.prompts.embed import build_embedder
from molora.prompts.saving import save_selector
from molora.prompts.selector import PromptSelector
from molora.serve.proxy.app import create_route_app
from molora.serve.proxy.command import start_route
from molora.serve.proxy.options import RouteOptions
from tests.serve.served import ENVIRONMENT, WAIT, WORDS, until

ODD = "w10 w11 w12 w13 w14"  # unlike every example
SECRET = "upstream-key-0123456789abcdef"


def make_selector(folder, **options):
    """Save a selector of words for the adapters of the world; returns its folder."""
    options = {"guard": {"name": "nearest", "rate": 0.07}, **options}
    return save_selector(PromptSelector(build_embedder("words"), "centroid", **options).fit(WORDS), folder)


@contextlib.contextmanager
def running(app):
    """An ASGI application on a free port of this machine, on a thread; yields its URL."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=5))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            until(lambda: server.started, "the server did not start")
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(WAIT)
            assert not thread.is_alive()


@contextlib.contextmanager
def routing(upstream, environ=None, **options):
    """A router in front of a server; yields its URL and the Proxy."""
    told = RouteOptions(upstream=upstream, **options)
    proxy, _ = start_route(told, {**ENVIRONMENT, **(environ or {})})
    app = create_route_app(
        proxy, timeout=told.timeout, max_body=told.max_body, docs=told.docs, open_metrics=told.open_metrics
    )
    with running(app) as url:
        yield url, proxy


class Upstream:
    """An OpenAI-like server that does what a test says, and remembers what it was asked.

    Attributes:
        asked: (path, headers, body) of every request.
        left: set when a client has closed its connection before the answer was complete.
    """

    def __init__(self, answer, models=("base", "ann-law", "ann-news", "bob-secret", "shared")):
        self.answer, self.models = answer, models
        self.asked, self.left = [], threading.Event()

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            while True:
                message = await receive()
                await send({"type": f"{message['type']}.complete"})
                if message["type"] == "lifespan.shutdown":
                    return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        if scope["path"] == "/v1/models":
            data = [{"id": name, "object": "model", "parent": None if name == "base" else "base"}
                    for name in self.models]  # fmt: skip
            await reply(send, {"object": "list", "data": data})
            return
        self.asked.append((scope["path"], headers, json.loads(body)))
        await self.answer(self, receive, send)


async def reply(send, told, status=200, headers=()):
    """Send a whole answer: JSON, or bytes as they are."""
    body = told if isinstance(told, bytes) else json.dumps(told).encode()
    kind = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": [*kind, *headers]})
    await send({"type": "http.response.body", "body": body})


async def stream(send, pieces, end=True):
    """Send server-sent events in these pieces of bytes."""
    headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for piece in pieces:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    if end:
        await send({"type": "http.response.body", "body": b""})


async def gone(upstream, receive):
    """Wait until the client has left."""
    while (await asyncio.wait_for(receive(), WAIT))["type"] != "http.disconnect":
        pass
    upstream.left.set()


def chunk(text=None, finish=None, **more):
    """One event of a streamed chat."""
    delta = {} if text is None else {"content": text}
    told = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "base"}
    told["choices"] = [{"index": 0, "delta": delta, "finish_reason": finish}]
    return b"data: " + json.dumps({**told, **more}).encode() + b"\n\n"


def whole(text="hello", **more):
    """A whole chat."""
    message = {"role": "assistant", "content": text}
    told = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "base"}
    told["choices"] = [{"index": 0, "message": message, "finish_reason": "stop"}]
    return {**told, "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}, **more}
