"""Log-probabilities of tokens as OpenAI's two endpoints write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..request import Chunk, Token


def chat_logprobs(tokenizer: Any, tokens: Sequence[Token]) -> dict[str, Any]:
    """Return the `logprobs` of a choice of /v1/chat/completions."""

    def told(token: int, logprob: float | None) -> dict[str, Any]:
        text = tokenizer.decode([token])
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    content = [
        {**told(token.id, token.logprob), "top_logprobs": [told(*pair) for pair in token.top]} for token in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokenizer: Any, chunk: Chunk, offset: int) -> dict[str, Any]:
    """Return the `logprobs` of a choice of /v1/completions; `offset` is where its text begins in the answer."""
    tokens = chunk.tokens
    texts = [tokenizer.decode([token.id]) for token in tokens]
    offsets, at = [], 0
    for text in texts:
        found = chunk.text.find(text, at)  # a tokenizer may put spaces between, or leave a token out
        at = found if found >= 0 else at
        offsets.append(offset + at)
        at += len(text) if found >= 0 else 0
    return {
        "tokens": texts,
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [{tokenizer.decode([one]): logprob for one, logprob in token.top} for token in tokens],
        "text_offset": offsets,
    }
