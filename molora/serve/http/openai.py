"""OpenAI's endpoints: chat completions, completions, models; streamed or whole (see embeddings.py for the fourth).

Beside OpenAI's fields an answer carries `molora`: which experts acted, and, where a selector chose, why.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from ..choosing import AUTO
from ..service import Service
from ..stream import Stream
from ..tenants.tenant import Tenant, not_found
from ..texts import chat as chat_tokens
from ..texts import encode, read
from .caller import Caller, Served
from .described import ANSWER, CHAT, ERRORS, MODEL, MODELS
from .forms import Chat, Completion, Form
from .pieces import gone, merged, until_gone, whole
from .schemas import ChatBody, CompletionBody, Program
from .tracing import Tracer

router = APIRouter(prefix="/v1", tags=["openai"])
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # dumps would make one for each token
LONG = 20_000  # characters of a prompt that are worth a thread for their tokens
QUIET = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


@router.get("/models", responses={200: MODELS, **ERRORS})
def models(service: Served, tenant: Caller) -> dict[str, Any]:
    """List the base model and what the caller may use."""
    return {"object": "list", "data": _models(service, tenant)}


@router.get("/models/{name:path}", responses={200: MODEL, **ERRORS})
def model(name: str, service: Served, tenant: Caller) -> dict[str, Any]:
    """Describe one model; unknown and forbidden ones are told alike."""
    found = next((one for one in _models(service, tenant) if one["id"] == name), None)
    if found is None:
        raise not_found(name)
    return found


def _models(service: Service, tenant: Tenant) -> list[dict[str, Any]]:
    def told(name: str, parent: str | None) -> dict[str, Any]:
        root = service.name if parent is None else name
        common = {"object": "model", "created": service.started, "owned_by": "molora"}
        return {"id": name, **common, "root": root, "parent": parent}

    names = tenant.visible(sorted(service.store.names - {service.name}))
    own = [told(service.name, None)] if tenant.base else []
    if service.engine.selectors and AUTO not in names:
        own.append(told(AUTO, service.name))
    return own + [told(name, service.name) for name in names]


# --- generating -----------------------------------------------------------------------------------------------------


@router.post("/chat/completions", response_model=None, responses={200: CHAT, **ERRORS})
async def chat(body: ChatBody, request: Request, service: Served, tenant: Caller) -> Response:
    """Answer a chat."""
    sampling = body.sampling()
    messages = [{"role": one.role, "content": one.text()} for one in body.messages]
    length = sum(len(one["content"]) for one in messages)
    prompt = await _beside(length, chat_tokens, service.tokenizer, messages, body.add_generation_prompt)

    def text() -> str:
        return "\n".join(one["content"] for one in messages if one["role"] == "user")

    queue = _Queue(service, tenant, body, sampling)
    await queue.fill([prompt], [text], request.app.state.waiters)
    return await _answer(request, body, Chat(service, body, queue.streams, queue.tracers))


@router.post("/completions", response_model=None, responses={200: ANSWER, **ERRORS})
async def complete(body: CompletionBody, request: Request, service: Served, tenant: Caller) -> Response:
    """Continue one or several prompts."""
    sampling, given = body.sampling(), body.prompts()
    length = sum(len(one) for one in given if isinstance(one, str))
    tokenizer = service.tokenizer
    prompts = await _beside(length, lambda: [encode(tokenizer, p) if isinstance(p, str) else p for p in given])

    def text_of(prompt: Any) -> Callable[[], str]:
        return lambda: read(tokenizer, prompt, service.engine.vocabulary)

    queue = _Queue(service, tenant, body, sampling)
    await queue.fill(prompts, [text_of(prompt) for prompt in given], request.app.state.waiters)
    return await _answer(request, body, Completion(service, body, queue.streams, queue.tracers))


async def _beside(length: int, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function, in a thread of its own when it has much to read."""
    return await run_in_threadpool(function, *args) if length > LONG else function(*args)


class _Queue:
    """Queues every choice of every prompt, or none.

    Attributes:
        streams: of the choices.
        tracers: of the choices, where the request asks for the routing of a mixture.
    """

    def __init__(self, service: Service, tenant: Tenant, body: ChatBody | CompletionBody, sampling: Any) -> None:
        self.service, self.tenant, self.body, self.sampling = service, tenant, body, sampling
        self.extra = body.molora or Program()
        self.streams: list[Stream] = []
        self.tracers: list[Tracer] = []

    async def fill(self, prompts: Sequence[list[int]], texts: Sequence[Callable[[], str]], waiters: Any) -> None:
        """Queue everything; off the event loop where a database or a selector must be waited for."""
        pairs = list(zip(prompts, texts, strict=True))
        try:
            if self.body.model == AUTO:
                await to_thread.run_sync(self._fill, pairs, limiter=waiters)
            elif self.service.tenants is not None:
                await run_in_threadpool(self._fill, pairs)
            else:
                self._fill(pairs)
        except BaseException:
            for stream in self.streams:
                stream.cancel()
            raise

    def _fill(self, pairs: Sequence[tuple[list[int], Callable[[], str]]]) -> None:
        body, extra = self.body, self.extra
        for prompt, text in pairs:
            program = self.service.program(self.tenant, body.model, text, extra.adapters, extra.selector)
            for choice in range(body.n):
                sampling = self.sampling
                if sampling.seed is not None:  # choices must differ
                    sampling = replace(sampling, seed=sampling.seed + (choice if sampling.seed < 2**63 else -choice))
                tracer = Tracer(self.service.tokenizer, prompt) if extra.trace else None
                stream = self.service.submit(self.tenant, program, prompt, sampling, body.timeout, tracer)
                self.streams.append(stream)
                if tracer is not None:
                    self.tracers.append(tracer)
                program = stream.request.program  # what a selector chose holds for all choices


async def _answer(request: Request, body: Any, form: Form) -> Response:
    if body.stream:
        return _Events(_events(form), form.streams)
    try:
        pieces = await until_gone(request, whole(form.streams))
    finally:  # also when the client left before anybody began to read; those that have ended are not touched
        for stream in form.streams:
            stream.cancel()
    return gone() if pieces is None else JSONResponse(form.whole(pieces))


class _Events(StreamingResponse):
    """Server-sent events; the answers end with it, even if it is stopped before its first event."""

    def __init__(self, events: AsyncIterator[str], streams: Sequence[Stream]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=QUIET)
        self.streams = streams

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for stream in self.streams:
                stream.cancel()


async def _events(form: Form) -> AsyncIterator[str]:
    """Yield server-sent events."""
    for event in form.opening():
        yield _event(event)
    async with aclosing(merged(form.streams)) as pieces:
        async for piece in pieces:
            for event in form.piece(piece):
                yield _event(event)
    for event in form.closing():
        yield _event(event)
    yield "data: [DONE]\n\n"


def _event(told: dict[str, Any]) -> str:
    return f"data: {_encode(told)}\n\n"
