"""Texts into tokens, as the tokenizer and the chat template of a model make them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .engine.admission import check_known
from .request import ServeError


def check_text(text: str) -> None:
    """Raise ServeError for what JSON can write but no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ServeError("a text holds half of a pair of surrogates, which is no character") from None


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text; raise ServeError when it is none."""
    check_text(text)
    return tokenizer(text).input_ids


def read(tokenizer: Any, prompt: str | Sequence[int], vocabulary: int) -> str:
    """Return the text of a prompt that is given as text or as tokens, for a selector to read.

    Raises:
        ServeError: it has tokens that do not exist, which not every tokenizer can take.
    """
    if isinstance(prompt, str):
        return prompt
    check_known(prompt, vocabulary)
    return tokenizer.decode(prompt)


def chat(tokenizer: Any, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> list[int]:
    """Return the tokens of a chat by the model's template; without one, of the messages line by line."""
    if tokenizer.chat_template is None:
        lines = [f"{message['role']}: {message['content']}" for message in messages]
        return encode(tokenizer, "\n".join([*lines, *(["assistant:"] if add_generation_prompt else [])]))
    for message in messages:
        check_text(message["content"])
    try:
        out = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=True
        )
    except Exception as error:  # templates raise whatever they like
        raise ServeError(f"the chat template of the model refuses these messages: {error}", param="messages") from error
    return list(out["input_ids"])
