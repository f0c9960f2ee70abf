"""What a server is asked and what it answers: Request with its gate program, Chunk, and ServeError."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import MoloraError

Finish = Literal["stop", "length", "cancelled", "timeout", "error"]


class ServeError(MoloraError):
    """A request that cannot be served; becomes an answer of the OpenAI shape.

    Args:
        message: what is wrong, with the value and the next step.
        status: of HTTP.
        code: a short reason for programs, such as `model_not_found`.
        param: which field of the request is to blame.
        retry_after: seconds after which the same request may go through.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        code: str = "invalid_request",
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.code, self.param = message, status, code, param
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """Return the error as the OpenAI API writes it."""
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


# --- gate programs: which experts act -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Base:
    """No expert: the base model alone."""


@dataclass(frozen=True)
class Weighted:
    """Plain adapters with fixed weights, exact at any ranks; one adapter is `Weighted((("law", 1.0),))`.

    Attributes:
        weights: (name, weight) pairs, each name once.
    """

    weights: tuple[tuple[str, float], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters, in order."""
        return tuple(name for name, _ in self.weights)


@dataclass(frozen=True)
class Mixture:
    """A routed mixture: its own router decides for every token.

    Attributes:
        name: of the mixture in the store.
    """

    name: str


@dataclass(frozen=True)
class Auto:
    """Let a selector read the prompt and choose.

    Attributes:
        text: what it reads.
        allowed: the adapters and mixtures that the caller may use; it sees no others.
        selector: which of the server's selectors; None: its default.
    """

    text: str
    allowed: frozenset[str]
    selector: str | None = None


Program = Base | Weighted | Mixture | Auto


def needs(program: Program) -> tuple[str, ...]:
    """Return the names of what must be loaded before a program can run."""
    if isinstance(program, Weighted):
        return program.names
    return (program.name,) if isinstance(program, Mixture) else ()


# --- requests -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; names and meanings are those of transformers and of the OpenAI API.

    Attributes:
        max_tokens: of the answer; None: as many as fit.
        temperature: 0 is greedy.
        top_p, top_k, min_p: what is kept of the distribution; 1, 0 and 0 keep all.
        repetition_penalty: above 1 makes tokens of the prompt and of the answer less likely.
        presence_penalty, frequency_penalty: subtracted once, or once per occurrence, for tokens of the answer.
        seed: of this request's own generator; None: drawn.
        stop: strings that end the answer; they are not part of it.
        stop_token_ids: tokens that end the answer, beside those of the model.
        logprobs: how many most likely tokens to tell at each position, 0: that of the chosen token alone; None: none.
        min_tokens: before which nothing ends the answer.
        ignore_eos: whether the end-of-text tokens of the model end nothing.
        logit_bias: (token id, bias) pairs.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()

    def check(self) -> None:
        """Raise ServeError that names every field out of its range."""
        problems: list[tuple[str, str]] = []

        def within(name: str, low: float, high: float, above: bool = False) -> None:
            value = getattr(self, name)
            inside = value is None or (low < value <= high if above else low <= value <= high)
            if not inside:  # also for NaN
                least = f"above {low:g}" if above else f"{low:g}"
                problems.append((name, f"{name} must be from {least} to {high:g}, got {value!r}"))

        within("max_tokens", 1, 1e9)
        within("temperature", 0, 2)
        within("top_p", 0, 1, above=True)
        within("top_k", 0, 1e9)
        within("min_p", 0, 1)
        within("repetition_penalty", 0, 10, above=True)
        within("presence_penalty", -2, 2)
        within("frequency_penalty", -2, 2)
        within("logprobs", 0, 20)
        within("min_tokens", 0, self.max_tokens or 1e9)
        within("seed", -(2**63), 2**64 - 1)
        if len(self.stop) > 16 or any(not text for text in self.stop):
            problems.append(("stop", f"stop must be at most 16 strings, none empty, got {list(self.stop)!r}"))
        if any(not -100 <= bias <= 100 for _, bias in self.logit_bias):
            problems.append(("logit_bias", "every value of logit_bias must be from -100 to 100"))
        if problems:
            text = "; ".join(text for _, text in problems)
            raise ServeError(text, param=problems[0][0] if len(problems) == 1 else None)


@dataclass
class Request:
    """One answer to generate.

    Attributes:
        prompt_ids: the tokens of the prompt.
        program: which experts act.
        sampling: how tokens are drawn.
        tenant: whose it is, for fair shares and counting.
        weight: of the tenant's share.
        timeout: seconds from `submit` to the last token; None: the engine's.
        id: unique among the requests of an engine.
        chosen: what the caller is told about how the program came about (auto selection); goes into the last chunk.
    """

    prompt_ids: list[int]
    program: Program = field(default_factory=Base)
    sampling: Sampling = field(default_factory=Sampling)
    tenant: str = "default"
    weight: float = 1.0
    timeout: float | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    chosen: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Token:
    """One drawn token: its id, its log-probability, and the most likely ones (id, log-probability), best first."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens of a request: of the prompt, of the answer, and how many of the prompt's were reused from the cache."""

    prompt: int
    completion: int
    cached: int = 0


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer; the last one has a `finish`.

    Attributes:
        text: what came since the last chunk; empty while characters or stop strings are incomplete.
        tokens: the tokens that were drawn since.
        finish: why it ended.
        usage: with the last chunk.
        chosen: with the last chunk, what was chosen and why, where a selector chose.
        error: with finish `error` or `timeout`, what went wrong.
    """

    text: str = ""
    tokens: tuple[Token, ...] = ()
    finish: Finish | None = None
    usage: Usage | None = None
    chosen: Mapping[str, Any] | None = None
    error: ServeError | None = None
