"""Job: a request that an engine has accepted, with all that serving it needs and the state of its answer."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..request import Base, Chunk, Finish, Mixture, Program, Request, ServeError, Token, Usage, Weighted
from ..stream import Stream
from .detokenise import Detokeniser
from .sampling import Sampler

logger = logging.getLogger("molora.serve")


class Lease(Protocol):
    """What a store lends to a job: adapters that stay where they are until it is given back."""

    @property
    def rows(self) -> Mapping[str, tuple[str, int | None]]:
        """By the name of the adapter: the PEFT adapter that holds it, and its slot there; None for a mixture."""
        ...

    @property
    def digests(self) -> Mapping[str, str]:
        """By the name of the adapter: the digest of all that decides what it does."""
        ...

    @property
    def packed(self) -> bool:
        """Whether all of them can run where the tokens of requests are packed in one row."""
        ...

    def release(self) -> None:
        """Give it back."""
        ...


@dataclass(eq=False)
class Job:
    """A request that waits or runs.

    Attributes:
        request: what was asked.
        stream: where its chunks go.
        sampler: draws its tokens.
        text: turns them into text.
        limit: how many tokens may be drawn at most.
        program: which experts act; never `Auto`, which is settled before a request is queued.
        deadline: time.monotonic() after which it ends with `timeout`; None: never.
        lease: of its adapters, from before `Backend.start` until it has ended; None for the base model.
        salt: digest of everything but tokens that its keys and values depend on; see `salt_of`.
        drawn: the tokens so far.
        cached: how many tokens of the prompt a backend took from its prefix cache.
        finish: why it ended; None while it waits or runs.
        watcher: is told what routers decide for its tokens (see programs.Decision), on the engine's thread.
        done: is told its stream and the last chunk, on the engine's thread or on that of who ended it.
        backend: that runs it.
        failure: why it cannot start; found while it waited.
    """

    request: Request
    stream: Stream
    sampler: Sampler
    text: Detokeniser
    limit: int
    program: Program = field(default_factory=Base)
    deadline: float | None = None
    lease: Lease | None = None
    salt: bytes = b""
    drawn: list[int] = field(default_factory=list)
    cached: int = 0
    finish: Finish | None = None
    watcher: Callable[[Any], None] | None = None
    done: Callable[[Stream, Chunk], None] | None = None
    backend: Any = None
    failure: ServeError | None = None

    @property
    def id(self) -> str:
        """The id of its request."""
        return self.request.id

    @property
    def prompt_ids(self) -> list[int]:
        """The tokens of its prompt."""
        return self.request.prompt_ids

    @property
    def need(self) -> int:
        """How many tokens its keys and values can come to."""
        return len(self.request.prompt_ids) + self.limit

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(len(self.request.prompt_ids), len(self.drawn), self.cached)

    def feed(self, token: Token) -> Chunk:
        """Take a drawn token over; return what the reader gets, the last chunk if this was the last token."""
        asked = self.request.sampling
        self.drawn.append(token.id)
        if token.id in self.sampler.ends and len(self.drawn) > asked.min_tokens:
            text, self.finish = self.text.flush(), "stop"
        else:
            text = self.text.feed(token.id, may_stop=len(self.drawn) >= asked.min_tokens)
            if self.text.stopped:
                self.finish = "stop"
            elif len(self.drawn) >= self.limit:
                text, self.finish = text + self.text.flush(), "length"
        return self._chunk(text, (token,))

    def end(self, finish: Finish, error: ServeError | None = None) -> Chunk:
        """End it before its last token; return the last chunk, with the text that was held back."""
        self.finish = finish
        try:
            held = self.text.flush()
        except Exception:  # a tokenizer that cannot decode this answer: what was held back is lost, and nothing else
            logger.exception("the end of request %s could not be decoded", self.id)
            held = ""
        return self._chunk(held, (), error)

    def tell(self, chunk: Chunk) -> None:
        """Give the reader a chunk."""
        self.stream.put(chunk)
        if chunk.finish is not None and self.done is not None:
            try:
                self.done(self.stream, chunk)
            except Exception:  # an account that cannot be written must not stop the others
                logger.exception("what was to be done after request %s failed", self.id)

    def _chunk(self, text: str, tokens: tuple[Token, ...], error: ServeError | None = None) -> Chunk:
        if self.finish is None:
            return Chunk(text, tokens)
        return Chunk(text, tokens, self.finish, self.usage, self.request.chosen, error)


def salt_of(program: Program, digests: Mapping[str, str]) -> bytes:
    """Return a digest of what a program adds to the base model: contents and weights, never names.

    Requests of equal salt and equal tokens have equal keys and values. Zero for the base model.

    Args:
        program: which experts act.
        digests: of its adapters and mixtures, by name.
    """
    if isinstance(program, Weighted):
        told = ["weighted", sorted([digests[name], float(weight).hex()] for name, weight in program.weights if weight)]
        if not told[1]:
            return b""
    elif isinstance(program, Mixture):
        told = ["mixture", digests[program.name]]
    else:
        return b""
    return hashlib.blake2b(json.dumps(told).encode(), digest_size=16).digest()


def private(salt: bytes, tenant: str) -> bytes:
    """Return a salt that only requests of one tenant have.

    What the prefix cache has spared is told in an answer's usage and felt in its time, so tenants that share a cache
    could find out, piece by piece, what others have asked.
    """
    return hashlib.blake2b(tenant.encode(), key=salt, digest_size=16).digest()
