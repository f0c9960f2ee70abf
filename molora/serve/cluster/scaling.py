"""Autoscaling on queued tokens: how many tokens of work the replicas have, over how many one may have."""

from __future__ import annotations

import math
from typing import Any

QUEUED = "queued_tokens"
EXPECTED = 128.0  # tokens of an answer, before any has ended


class QueuedTokens:
    """A policy of Ray Serve that wants one replica for every `target` queued tokens.

    Ray keeps it within the bounds and waits for the delays. It runs in Ray's controller, which gets this module as it
    is and need not have molora: nothing in it may import the rest.

    Args:
        target: queued tokens that one replica may have.
    """

    def __init__(self, target: float) -> None:
        self.target = target

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Return how many replicas are due, and no state."""
        by_replica = (context.aggregated_metrics or {}).get(QUEUED) or {}
        if not by_replica:  # nothing was told yet
            return context.target_num_replicas, {}
        return max(1, math.ceil(sum(by_replica.values()) / self.target)), {}


class Work:
    """The tokens that one replica has been asked for and has not worked on yet.

    A request counts with its prompt until its first token, and with the answer that is still expected: as many tokens
    as answers had on average so far, however many it has already (lengths of answers have long tails), but no more than
    it allows. It is used by one thread.
    """

    def __init__(self) -> None:
        self._open: dict[str, tuple[int, float]] = {}  # prompt to read and tokens that are still allowed, by request
        self._mean, self._ended = EXPECTED, 0

    def asked(self, id: str, prompt: int, most: int | None) -> None:
        """Note a request."""
        self._open[id] = prompt, math.inf if most is None else most

    def drew(self, id: str, tokens: int) -> None:
        """Note tokens of its answer."""
        if tokens and id in self._open:
            self._open[id] = 0, max(0.0, self._open[id][1] - tokens)

    def ended(self, id: str, tokens: int) -> None:
        """Note its end, with all tokens of its answer."""
        if self._open.pop(id, None) is not None:
            self._ended += 1
            self._mean += (tokens - self._mean) / min(self._ended + 4, 100)

    @property
    def tokens(self) -> float:
        """How many there are."""
        return sum(prompt + min(self._mean, left) for prompt, left in self._open.values())
