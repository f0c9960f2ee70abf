"""Log-probabilities of tokens as OpenAI's two endpoints write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..request import Token


def chat_logprobs(tokenizer: Any, tokens: Sequence[Token]) -> dict[str, Any]:
    """Return the `logprobs` of a choice of /v1/chat/completions."""

    def told(token: int, logprob: float | None) -> dict[str, Any]:
        text = tokenizer.decode([token])
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    content = [
        {**told(token.id, token.logprob), "top_logprobs": [told(*pair) for pair in token.top]} for token in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokenizer: Any, tokens: Sequence[Token], offset: int) -> dict[str, Any]:
    """Return the `logprobs` of a choice of /v1/completions; `offset` is where its text begins in the answer."""
    texts = [tokenizer.decode([token.id]) for token in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [{tokenizer.decode([one]): logprob for one, logprob in token.top} for token in tokens],
        "text_offset": offsets,
    }
