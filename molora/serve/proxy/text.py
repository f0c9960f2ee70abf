"""What a router reads of requests: the text that a selector sees, and how many tokens they may use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ..request import ServeError

Kind = Literal["chat", "completions", "embeddings"]
BYTES_PER_TOKEN = 3  # fewer than texts have, so that estimates are rather too high
MAX_CHOICES = 128


def text_of(body: Mapping[str, Any], kind: Kind) -> str:
    """Return what a selector reads: what users say in a chat, or the prompt; raise ServeError when there is no text."""
    if kind == "chat":
        return "\n".join(_spoken(one) for one in _messages(body) if one.get("role") == "user")
    given = body.get("prompt" if kind == "completions" else "input")
    if isinstance(given, str):
        return given
    field = "prompt" if kind == "completions" else "input"
    if not isinstance(given, list) or not given or not all(isinstance(one, str) for one in given):
        raise ServeError(f"'auto' reads text: {field} must be text, not token ids", param=field)
    if kind == "completions" and len(given) > 1:
        raise ServeError("'auto' chooses for one prompt; send one request for each", param=field)
    return "\n".join(given)


def prompt_tokens(body: Mapping[str, Any], kind: Kind) -> int:
    """Return about how many tokens a prompt has, rather too many than too few."""
    if kind == "chat":
        return _tokens(sum(len(str(one.get("content") or "").encode(errors="replace")) for one in _messages(body)))
    given = body.get("prompt" if kind == "completions" else "input")
    parts = given if isinstance(given, list) else [given]
    tokens, size = 0, 0
    for one in parts:
        if isinstance(one, str):
            size += len(one.encode(errors="replace"))
        else:
            tokens += len(one) if isinstance(one, list) else 1
    return tokens + _tokens(size)


def answer_bound(body: Mapping[str, Any], default: int) -> int:
    """Return how many tokens all answers of a request may have, as far as it says; wrong values are not judged."""
    most = _number(body.get("max_completion_tokens")) or _number(body.get("max_tokens")) or default
    choices = max(_number(body.get("n")) or 1, _number(body.get("best_of")) or 1)
    given = body.get("prompt")
    prompts = len(given) if isinstance(given, list) and given and not isinstance(given[0], int) else 1
    return most * min(choices, MAX_CHOICES) * prompts


def _messages(body: Mapping[str, Any]) -> list[Any]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        raise ServeError("messages must be a list of messages, each with role and content", param="messages")
    return messages


def _spoken(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):  # pictures and sounds are not read
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        return "".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""


def _tokens(size: int) -> int:
    return -(-size // BYTES_PER_TOKEN)


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 10**9 else None
