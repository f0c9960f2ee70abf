"""Detokeniser: tokens into text as they come, cut at stop strings, never inside a character."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

BROKEN = "\ufffd"  # what decoders write for bytes that are no character, or not yet


class Detokeniser:
    """The text of one answer. All pieces together are what the tokenizer makes of all tokens at once.

    Tokens are decoded together with some before them, since many tokenizers treat the first token of a text apart (a
    leading space is dropped). What ends inside a character waits for the rest of it, and what may be the beginning of
    a stop string waits until it is clear.

    Args:
        tokenizer: of transformers.
        stops: strings that end the text; they are not part of it.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._decode = decoder_of(tokenizer)
        self._stops = tuple(stops)
        self._ids: list[int] = []  # the tokens that are decoded again
        self._read = 0  # how many of them came before this window
        self._known = ""  # their text that was taken already
        self._held = ""  # may be the beginning of a stop string
        self.stopped = False

    def feed(self, token: int, may_stop: bool = True) -> str:
        """Take a token; return the text that is certain now.

        Args:
            token: that was drawn.
            may_stop: whether a stop string ends the text yet.
        """
        if self.stopped:
            return ""
        self._ids.append(token)
        text = self._decode(self._ids)
        certain = text.rstrip(BROKEN)
        if len(certain) <= len(self._known):
            return ""
        fresh = certain[len(self._known) :]
        self._known = certain
        if certain == text:  # a good place to begin the next window
            self._ids = self._ids[self._read :]
            self._read, self._known = len(self._ids), self._decode(self._ids)
        return self._cut(fresh, may_stop)

    def flush(self) -> str:
        """Return what was held back; nothing comes after it."""
        if self.stopped:
            return ""
        fresh = self._decode(self._ids)[len(self._known) :]
        text = self._cut(fresh, True) + ("" if self.stopped else self._held)
        self._ids, self._read, self._known, self._held = [], 0, "", ""
        return text

    def _cut(self, fresh: str, may_stop: bool) -> str:
        """Return what of the held and the fresh text is certain, and hold the rest."""
        text = self._held + fresh
        if not (self._stops and may_stop):
            self._held = ""
            return text
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def decoder_of(tokenizer: Any) -> Callable[[list[int]], str]:
    """Return the function that turns tokens into text, without special tokens; the quickest that does the same."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is not None and not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return lambda ids: core.decode(ids, skip_special_tokens=True)
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
