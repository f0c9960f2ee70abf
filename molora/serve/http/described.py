"""What answers look like, for /openapi.json: OpenAI's objects with `molora` beside them, and errors.

These models describe; answers are made where they are given, and the tests compare both.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorDetail(_Answer):
    """What went wrong: `code` is a short reason for programs, `param` the field that is to blame."""

    message: str
    type: str
    param: str | None
    code: str


class Error(_Answer):
    """An error as the OpenAI API writes it."""

    error: ErrorDetail


class ModelObject(_Answer):
    """A model that may be named: the base, an adapter, a mixture, or `auto`."""

    id: str
    object: str
    created: int
    owned_by: str
    root: str
    parent: str | None


class ModelList(_Answer):
    """All of them."""

    object: str
    data: list[ModelObject]


class AdapterObject(_Answer):
    """Where an adapter or mixture is."""

    object: str
    parent: str
    name: str
    kind: str
    digest: str | None
    rank: int
    bytes: int
    state: str
    in_use: int
    waiting: int
    pinned: bool
    last_load_ms: float | None
    error: str | None
    packed: bool


class AdapterList(_Answer):
    """All that the caller may use."""

    object: str
    data: list[AdapterObject]


class UsageObject(_Answer):
    """Tokens of an answer, over all of its choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


class MessageObject(_Answer):
    """What the model said."""

    role: str
    content: str
    refusal: None


class _Choice(_Answer):
    index: int
    logprobs: dict[str, Any] | None
    finish_reason: str
    molora: dict[str, Any] | None = None


class ChatChoice(_Choice):
    """One answer to a chat."""

    message: MessageObject


class TextChoice(_Choice):
    """One continuation of a prompt."""

    text: str


class _Whole(_Answer):
    id: str
    object: str
    created: int
    model: str
    usage: UsageObject
    molora: dict[str, Any]


class ChatCompletion(_Whole):
    """An answer of /v1/chat/completions; `molora` tells which experts acted, and why."""

    choices: list[ChatChoice]


class TextCompletion(_Whole):
    """An answer of /v1/completions; `molora` tells which experts acted, and why."""

    choices: list[TextChoice]


class EmbeddingObject(_Answer):
    """One vector: numbers, or little-endian float32 in base64."""

    object: str
    index: int
    embedding: list[float] | str


class EmbeddingList(_Answer):
    """An answer of /v1/embeddings."""

    object: str
    data: list[EmbeddingObject]
    model: str
    usage: dict[str, int]
    molora: dict[str, Any]


class FeedbackObject(_Answer):
    """A reward that was taken; `version` is that of the tenant's bandit."""

    object: str
    response_id: str
    reward: float
    version: int
    frozen: bool


class BanditObject(_Answer):
    """A bandit after it has learned."""

    object: str
    tenant: str
    version: int


class RoutingObject(_Answer):
    """How the requests of a tenant were routed since the server started; see docs/serving.md."""

    object: str
    tenant: str
    since: int
    requests: int
    ended: dict[str, int]
    tokens: dict[str, int]
    load: list[dict[str, Any]]
    entropy: float
    most_entropy: float
    dead: list[str]
    auto: dict[str, Any]
    drift: dict[str, Any] | None
    feedback: dict[str, Any] | None
    settled: dict[str, int] | None


class Health(_Answer):
    """Whether the engine runs."""

    healthy: bool


class Readiness(_Answer):
    """Whether requests should be sent here."""

    ready: bool
    draining: bool
    waiting_for: int


def _told(model: type[BaseModel], text: str = "Successful Response", streams: bool = False) -> dict[str, Any]:
    told: dict[str, Any] = {"model": model, "description": text}
    return {**told, "content": {"text/event-stream": {"schema": {"type": "string"}}}} if streams else told


_ERRORS = {
    400: "The request is not valid, or cannot be served.",
    401: "No valid key.",
    403: "The key may not do this.",
    404: "Unknown, or not the caller's to use.",
    405: "Not a method of this path.",
    409: "It is not in a state for this now.",
    413: "The body is too large.",
    424: "An adapter could not be loaded.",
    429: "A limit, or a full queue; see Retry-After.",
    500: "The server failed.",
    503: "Going down, or not able to answer now.",
    504: "Not done in time.",
}
ERRORS: dict[int | str, dict[str, Any]] = {status: _told(Error, text) for status, text in _ERRORS.items()}
CHAT, ANSWER = _told(ChatCompletion, streams=True), _told(TextCompletion, streams=True)
EMBEDDINGS, MODELS, MODEL = _told(EmbeddingList), _told(ModelList), _told(ModelObject)
ADAPTERS, ADAPTER = _told(AdapterList), _told(AdapterObject)
FEEDBACK, BANDIT, ROUTING = _told(FeedbackObject), _told(BanditObject), _told(RoutingObject)
HEALTH: dict[int | str, dict[str, Any]] = {200: _told(Health), 503: _told(Health, "The engine has failed.")}
READY: dict[int | str, dict[str, Any]] = {200: _told(Readiness), 503: _told(Readiness, "Not now.")}
