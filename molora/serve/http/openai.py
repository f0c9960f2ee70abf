"""OpenAI's endpoints: chat completions, completions, embeddings, models; streamed or whole.

Beside OpenAI's fields an answer carries `molora`: which experts acted, and, where a selector chose, why.
"""

from __future__ import annotations

import base64
import json
import struct
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from ..request import Auto, Sampling, ServeError, Stream
from ..service import Service
from ..tenants.tenant import Tenant, not_found
from .caller import Caller, Served
from .pieces import Piece, gone, merged, until_gone, whole
from .schemas import ChatBody, CompletionBody, EmbeddingBody, Program
from .tokens import chat_logprobs, completion_logprobs

router = APIRouter(prefix="/v1", tags=["openai"])
LONG = 20_000  # characters of a prompt that are worth a thread for their tokens
QUIET = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


@router.get("/models")
def models(service: Served, tenant: Caller) -> dict[str, Any]:
    """List the base model and what the caller may use."""
    return {"object": "list", "data": _models(service, tenant)}


@router.get("/models/{name:path}")
def model(name: str, service: Served, tenant: Caller) -> dict[str, Any]:
    """Describe one model; unknown and forbidden ones are told alike."""
    found = next((one for one in _models(service, tenant) if one["id"] == name), None)
    if found is None:
        raise not_found(name)
    return found


def _models(service: Service, tenant: Tenant) -> list[dict[str, Any]]:
    def told(name: str, parent: str | None) -> dict[str, Any]:
        root = service.name if parent is None else name
        return {
            "id": name,
            "object": "model",
            "created": service.started,
            "owned_by": "molora",
            "root": root,
            "parent": parent,
        }

    own = [told(service.name, None)] if tenant.base else []
    return own + [told(entry.name, service.name) for entry in service.entries(tenant)]


# --- generating -----------------------------------------------------------------------------------------------------


@router.post("/chat/completions", response_model=None)
async def chat(body: ChatBody, request: Request, service: Served, tenant: Caller) -> Response:
    """Answer a chat."""
    sampling = body.sampling()
    messages = [{"role": one.role, "content": one.text()} for one in body.messages]
    length = sum(len(one["content"]) for one in messages)
    prompt = await _beside(length, service.chat, messages, body.add_generation_prompt)

    def text() -> str:
        return "\n".join(one["content"] for one in messages if one["role"] == "user")

    streams = await _submit(service, tenant, body, [prompt], [text], sampling)
    form = _Chat(service, body, streams)
    return await _answer(request, body, form, streams)


@router.post("/completions", response_model=None)
async def complete(body: CompletionBody, request: Request, service: Served, tenant: Caller) -> Response:
    """Continue one or several prompts."""
    sampling, given = body.sampling(), body.prompts()
    length = sum(len(one) for one in given if isinstance(one, str))
    prompts = await _beside(length, lambda: [service.encode(p) if isinstance(p, str) else p for p in given])

    def text_of(prompt: Any) -> Callable[[], str]:
        return lambda: prompt if isinstance(prompt, str) else service.tokenizer.decode(prompt)

    streams = await _submit(service, tenant, body, prompts, [text_of(prompt) for prompt in given], sampling)
    return await _answer(request, body, _Completion(service, body, streams), streams)


async def _beside(length: int, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function, in a thread of its own when it has much to read."""
    return await run_in_threadpool(function, *args) if length > LONG else function(*args)


async def _submit(
    service: Service,
    tenant: Tenant,
    body: ChatBody | CompletionBody,
    prompts: list[list[int]],
    texts: list[Callable[[], str]],
    sampling: Sampling,
) -> list[Stream]:
    """Queue every choice of every prompt, or none."""
    extra = body.molora or Program()
    streams: list[Stream] = []
    try:
        for prompt, text in zip(prompts, texts, strict=True):
            program = service.program(tenant, body.model, text, extra.adapters, extra.selector)
            for choice in range(body.n):
                own = sampling if sampling.seed is None else _reseeded(sampling, choice)
                arguments = (tenant, program, prompt, own, body.timeout)
                # a selector reads the prompt first, which takes a forward of an encoder
                waits = isinstance(program, Auto)
                stream = await run_in_threadpool(service.submit, *arguments) if waits else service.submit(*arguments)
                streams.append(stream)
                program = stream.request.program  # what a selector chose holds for all choices
    except BaseException:
        for stream in streams:
            stream.cancel()
        raise
    return streams


def _reseeded(sampling: Sampling, choice: int) -> Sampling:
    """Return the sampling of one of several choices, which must differ."""
    return replace(sampling, seed=(sampling.seed or 0) + choice)


async def _answer(request: Request, body: Any, form: _Form, streams: list[Stream]) -> Response:
    if body.stream:
        return StreamingResponse(_events(form, streams), media_type="text/event-stream", headers=QUIET)
    pieces = await until_gone(request, whole(streams))
    return gone() if pieces is None else JSONResponse(form.whole(pieces))


async def _events(form: _Form, streams: list[Stream]) -> AsyncIterator[str]:
    """Yield server-sent events."""
    try:
        for event in form.opening():
            yield _event(event)
        async for piece in merged(streams):
            if piece.chunk.error is not None:
                yield _event(piece.chunk.error.body())
            for event in form.piece(piece):
                yield _event(event)
        for event in form.closing():
            yield _event(event)
        yield "data: [DONE]\n\n"
    finally:
        for stream in streams:  # those that nobody has begun to read, too
            stream.cancel()


def _event(told: dict[str, Any]) -> str:
    return f"data: {json.dumps(told, ensure_ascii=False, separators=(',', ':'))}\n\n"


class _Form:
    """How answers are written down; what chats and completions share."""

    kind, chunk_kind, prefix = "", "", ""

    def __init__(self, service: Service, body: Any, streams: list[Stream]) -> None:
        self.service, self.body, self.streams = service, body, streams
        self.id = f"{self.prefix}-{streams[0].request.id}"
        self.created = int(time.time())
        self.usages: dict[int, Any] = {}
        options = body.stream_options
        self.tells_usage = options is not None and options.include_usage

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.body.model}

    def opening(self) -> list[dict[str, Any]]:
        return []

    def closing(self) -> list[dict[str, Any]]:
        if not self.tells_usage:
            return []
        return [{**self.head(self.chunk_kind), "choices": [], "usage": self.usage()}]

    def piece(self, piece: Piece) -> list[dict[str, Any]]:
        chunk = piece.chunk
        self.note(piece)
        if not (chunk.text or chunk.finish or (chunk.tokens and self.wants_tokens)):
            return []
        told = {**self.head(self.chunk_kind), "choices": [self.choice(piece, part=True)]}
        if self.tells_usage:
            told["usage"] = None
        if chunk.finish is not None:
            told["molora"] = self.chosen(piece)
        return [told]

    @property
    def wants_tokens(self) -> bool:
        return self.streams[0].request.sampling.logprobs is not None

    def whole(self, pieces: list[Piece]) -> dict[str, Any]:
        for piece in pieces:
            if piece.chunk.error is not None:
                raise piece.chunk.error
            self.note(piece)
        told = {**self.head(self.kind), "choices": [self.choice(piece, part=False) for piece in pieces]}
        return {**told, "usage": self.usage(), "molora": self.chosen(pieces[0])}

    def note(self, piece: Piece) -> None:
        if piece.chunk.usage is not None:
            self.usages[piece.index] = piece.chunk.usage

    def usage(self) -> dict[str, Any]:
        # the choices of one prompt read it once, as OpenAI counts
        prompt = sum(usage.prompt for index, usage in self.usages.items() if index % self.body.n == 0)
        answer = sum(usage.completion for usage in self.usages.values())
        cached = sum(usage.cached for index, usage in self.usages.items() if index % self.body.n == 0)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def chosen(self, piece: Piece) -> dict[str, Any]:
        return piece.chosen()

    def choice(self, piece: Piece, part: bool) -> dict[str, Any]:
        raise NotImplementedError


class _Chat(_Form):
    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def opening(self) -> list[dict[str, Any]]:
        first = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return [{**self.head(self.chunk_kind), "choices": [{"index": i, **first}]} for i in range(len(self.streams))]

    def choice(self, piece: Piece, part: bool) -> dict[str, Any]:
        chunk = piece.chunk
        logprobs = chat_logprobs(self.service.tokenizer, chunk.tokens) if self.wants_tokens else None
        if part:
            content = {"delta": {"content": chunk.text} if chunk.text else {}}
        else:
            content = {"message": {"role": "assistant", "content": chunk.text, "refusal": None}}
        return {"index": piece.index, **content, "logprobs": logprobs, "finish_reason": chunk.finish}


class _Completion(_Form):
    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def choice(self, piece: Piece, part: bool) -> dict[str, Any]:
        chunk = piece.chunk
        logprobs = (
            completion_logprobs(self.service.tokenizer, chunk.tokens, piece.offset) if self.wants_tokens else None
        )
        return {"index": piece.index, "text": chunk.text, "logprobs": logprobs, "finish_reason": chunk.finish}


# --- embeddings -----------------------------------------------------------------------------------------------------


@router.post("/embeddings", response_model=None)
async def embeddings(body: EmbeddingBody, service: Served, tenant: Caller) -> Response:
    """Embed texts, by the base model or with an adapter."""
    given, extra = body.inputs(), body.molora or Program()

    def text() -> str:
        return "\n".join(one if isinstance(one, str) else service.tokenizer.decode(one) for one in given)

    program = service.program(tenant, body.model, text, extra.adapters, extra.selector)
    tokens = [service.encode(one) if isinstance(one, str) else one for one in given]
    vectors, chosen = await run_in_threadpool(service.embed, tenant, program, tokens)
    if body.dimensions is not None:
        if body.dimensions > vectors.shape[1]:
            raise ServeError(
                f"dimensions must be at most {vectors.shape[1]}, got {body.dimensions}", param="dimensions"
            )
        vectors = vectors[:, : body.dimensions]
        vectors = vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-12)
    data = []
    for index, vector in enumerate(vectors.tolist()):
        packed: Any = vector
        if body.encoding_format == "base64":
            packed = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
        data.append({"object": "embedding", "index": index, "embedding": packed})
    count = sum(len(one) for one in tokens)
    usage = {"prompt_tokens": count, "total_tokens": count}
    return JSONResponse({"object": "list", "data": data, "model": body.model, "usage": usage, "molora": chosen})
