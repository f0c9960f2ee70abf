"""How answers are written down: whole or as events, of chats and of completions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..service import Service
from ..stream import Stream
from .pieces import Piece
from .tokens import chat_logprobs, completion_logprobs
from .tracing import Tracer


class Form:
    """What chats and completions share.

    Args:
        service: that answers.
        body: what was asked.
        streams: the answers, choice by choice of prompt by prompt.
        tracers: of the answers whose routing is to be told, by their index.
    """

    kind, chunk_kind, prefix = "", "", ""

    def __init__(self, service: Service, body: Any, streams: Sequence[Stream], tracers: Sequence[Tracer] = ()) -> None:
        self.service, self.body, self.streams, self.tracers = service, body, streams, tracers
        self.id = f"{self.prefix}-{streams[0].request.id}"
        self.created = int(time.time())
        self.usages: dict[int, Any] = {}
        options = body.stream_options
        self.tells_usage = options is not None and options.include_usage

    def head(self, kind: str) -> dict[str, Any]:
        """Return the fields that every body and event has."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.body.model}

    def opening(self) -> list[dict[str, Any]]:
        """Return the events before the first piece."""
        return []

    def closing(self) -> list[dict[str, Any]]:
        """Return the events after the last piece."""
        if not self.tells_usage:
            return []
        return [{**self.head(self.chunk_kind), "choices": [], "usage": self.usage()}]

    def piece(self, piece: Piece) -> list[dict[str, Any]]:
        """Return the events of one piece."""
        self.note(piece)
        if piece.chunk.error is not None:
            # what was drawn before is the client's, and then what went wrong
            text = replace(piece, chunk=replace(piece.chunk, finish=None, error=None))
            return [*(self.piece(text) if piece.chunk.text else []), piece.chunk.error.body()]
        chunk, told = piece.chunk, self.told(piece)
        if not (chunk.text or chunk.finish or told or (chunk.tokens and self.wants_tokens)):
            return []
        event = {**self.head(self.chunk_kind), "choices": [self.choice(piece, part=True)]}
        if self.tells_usage:
            event["usage"] = None
        if told:
            event["molora"] = told
        return [event]

    def told(self, piece: Piece) -> dict[str, Any]:
        """Return what a piece tells beside OpenAI's fields: the routing so far, and at the end what acted and why."""
        told = piece.chosen() if piece.chunk.finish is not None else {}
        if self.tracers:
            told |= self.tracers[piece.index].take(piece.chunk.tokens)
        if told and len(self.streams) > 1:
            told["response_id"] = f"{self.prefix}-{piece.stream.request.id}"  # to reward each for itself
        return told

    @property
    def wants_tokens(self) -> bool:
        """Whether tokens are told with their log-probabilities."""
        return self.streams[0].request.sampling.logprobs is not None

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Return the body of a whole answer; raise ServeError when a choice failed."""
        for piece in pieces:
            if piece.chunk.error is not None:
                raise piece.chunk.error
            self.note(piece)
        told = [self.told(piece) for piece in pieces]
        choices = [self.choice(piece, part=False) for piece in pieces]
        if len(pieces) > 1:
            choices = [{**choice, "molora": own} for choice, own in zip(choices, told, strict=True)]
        return {**self.head(self.kind), "choices": choices, "usage": self.usage(), "molora": told[0]}

    def note(self, piece: Piece) -> None:
        """Keep what is told at the end."""
        if piece.chunk.usage is not None:
            self.usages[piece.index] = piece.chunk.usage

    def usage(self) -> dict[str, Any]:
        """Return the tokens of all choices."""
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

    def choice(self, piece: Piece, part: bool) -> dict[str, Any]:
        """Return a choice of a whole answer, or of an event."""
        raise NotImplementedError


class Chat(Form):
    """Bodies and events of /v1/chat/completions."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def opening(self) -> list[dict[str, Any]]:
        """Return the events that say who speaks."""
        first = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return [{**self.head(self.chunk_kind), "choices": [{"index": i, **first}]} for i in range(len(self.streams))]

    def choice(self, piece: Piece, part: bool) -> dict[str, Any]:
        """Return a choice."""
        chunk = piece.chunk
        logprobs = chat_logprobs(self.service.tokenizer, chunk.tokens) if self.wants_tokens else None
        if part:
            content = {"delta": {"content": chunk.text} if chunk.text else {}}
        else:
            content = {"message": {"role": "assistant", "content": chunk.text, "refusal": None}}
        return {"index": piece.index, **content, "logprobs": logprobs, "finish_reason": chunk.finish}


class Completion(Form):
    """Bodies and events of /v1/completions."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def choice(self, piece: Piece, part: bool) -> dict[str, Any]:
        """Return a choice."""
        chunk = piece.chunk
        logprobs = completion_logprobs(self.service.tokenizer, chunk, piece.offset) if self.wants_tokens else None
        return {"index": piece.index, "text": chunk.text, "logprobs": logprobs, "finish_reason": chunk.finish}
