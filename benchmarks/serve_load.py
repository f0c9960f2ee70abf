"""Load on an engine, in bounded numbers: all at once, in a closed loop (so many at any time), or by Poisson arrivals.

One asyncio thread sends and reads everything, as the HTTP layer does, and notes when each token came.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from molora.serve.request import Program, Request, Sampling
from molora.serve.stream import Stream

from .timing import GROUP, Result

LIMIT = 300.0  # seconds that any load may take


@dataclass
class Answer:
    """One answer, as its reader saw it.

    Attributes:
        label: of whom: what stands before a colon in the request's id, else its tenant.
        sent: time.monotonic() when it was asked.
        times: when each of its tokens came.
        finish: why it ended.
        tokens: of the answer.
    """

    label: str
    sent: float
    times: list[float] = field(default_factory=list)
    finish: str = ""
    tokens: list[int] = field(default_factory=list)

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens."""
        return [b - a for a, b in itertools.pairwise(self.times)]


@dataclass
class Load:
    """What came of a load.

    Attributes:
        answers: all of them.
        seconds: from the first request to the last token.
        tokens: of all answers.
        engine, model: CPU seconds of the engine's thread, and of these inside of the model.
    """

    answers: list[Answer]
    seconds: float
    tokens: int
    engine: float = 0.0
    model: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens of answers per second of the clock."""
        return self.tokens / self.seconds

    def firsts(self, label: str | None = None) -> list[float]:
        """Seconds to the first token of every answer."""
        return [one.first for one in self.answers if one.times and label in (None, one.label)]

    def gaps(self, label: str | None = None) -> list[float]:
        """Seconds between tokens of every answer."""
        return [gap for one in self.answers if label in (None, one.label) for gap in one.gaps]


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Return a percentile by linear interpolation; None of nothing."""
    if not values:
        return None
    ranked = sorted(values)
    at = (len(ranked) - 1) * percent / 100
    low = int(at)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (ranked[high] - ranked[low]) * (at - low)


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Return median, 95th and 99th percentile and maximum in milliseconds."""
    found = {"p50": percentile(values, 50), "p95": percentile(values, 95), "p99": percentile(values, 99)}
    found["max"] = max(values, default=None)
    return {name: None if value is None else 1e3 * value for name, value in found.items()}


class Prompts:
    """Prompts and answers of mixed lengths, never the same prompt twice, so that no prefix is found in the cache.

    Args:
        vocabulary: of the model.
        seed: of what is drawn.
    """

    def __init__(self, vocabulary: int, seed: int = 0) -> None:
        self.vocabulary = vocabulary
        self._draws = torch.Generator().manual_seed(seed)

    def prompt(self, length: int) -> list[int]:
        """Return a prompt of some length."""
        return torch.randint(4, self.vocabulary, (length,), generator=self._draws).tolist()

    def between(self, low: int, high: int) -> int:
        """Return a length from low to high, short ones being likelier."""
        part = float(torch.rand((), generator=self._draws)) ** 2
        return low + int(part * (high - low + 1) * 0.999)

    def request(self, program: Program, prompt: int, answer: int, tenant: str = "default") -> Request:
        """Return a request with a greedy answer of exactly so many tokens."""
        return Request(self.prompt(prompt), program, greedy(answer), tenant)

    def arrivals(self, rate: float, count: int) -> list[float]:
        """Return the moments of `count` Poisson arrivals at `rate` per second, from 0."""
        gaps = torch.empty(count).exponential_(rate, generator=self._draws)
        return (gaps.cumsum(0) - gaps[0]).tolist()


def greedy(tokens: int) -> Sampling:
    """Return how an answer of exactly so many tokens is drawn."""
    return Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)


# --- loads ------------------------------------------------------------------------------------------------------------


async def read(engine: Any, request: Request) -> Answer:
    """Ask an engine and read the answer."""
    label, _, told_apart = request.id.partition(":")
    answer = Answer(label if told_apart else request.tenant, time.monotonic())
    async for chunk in engine.submit(request):
        now = time.monotonic()
        answer.times += [now] * len(chunk.tokens)
        answer.tokens += [token.id for token in chunk.tokens]
        if chunk.finish is not None:
            answer.finish = chunk.finish
    if answer.finish not in ("length", "stop", "cancelled"):
        raise RuntimeError(f"an answer ended with {answer.finish}: {chunk.error}")
    return answer


async def closed(ask: Callable[[Any], Any], requests: Iterator[Any], concurrency: int, seconds: float) -> list[Any]:
    """Keep `concurrency` requests going until there are no more, or begin no more after `seconds`."""
    end, answers = time.monotonic() + seconds, []

    async def worker() -> None:
        while time.monotonic() < end:
            request = next(requests, None)
            if request is None:
                return
            answers.append(await ask(request))

    await asyncio.wait_for(asyncio.gather(*(worker() for _ in range(concurrency))), LIMIT)
    return answers


async def opened(ask: Callable[[Any], Any], requests: Sequence[Any], arrivals: Sequence[float]) -> list[Any]:
    """Send each request at its moment, whatever became of those before."""
    start = time.monotonic()

    async def at(request: Any, moment: float) -> Any:
        await asyncio.sleep(max(0.0, start + moment - time.monotonic()))
        return await ask(request)

    pairs = zip(requests, arrivals, strict=True)
    return list(await asyncio.wait_for(asyncio.gather(*(at(*pair) for pair in pairs)), LIMIT))


def on_engine(engine: Any, load: Callable[[Callable[[Request], Any]], Any]) -> Load:
    """Run a load on an engine: a function that is given how to ask, and returns a coroutine of answers."""
    before, start = engine.call(engine.stats).result(LIMIT), time.monotonic()
    answers = asyncio.run(load(lambda request: read(engine, request)))
    seconds = time.monotonic() - start
    after = engine.call(engine.stats).result(LIMIT)
    return Load(
        answers,
        seconds,
        sum(len(one.tokens) for one in answers),
        after.engine_seconds - before.engine_seconds,
        after.model_seconds - before.model_seconds,
    )


@dataclass(frozen=True)
class Decoded:
    """Tokens that were drawn while all requests of a batch decoded, in what CPU time of the engine and of the clock."""

    tokens: int
    engine: float
    model: float
    seconds: float


def decode(engine: Any, requests: Sequence[Request]) -> Decoded:
    """Run a batch, and measure from when all of its prompts are read until the first answer ends.

    Both moments are taken on the engine's own thread, between two forwards.
    """
    shots: list[Any] = []
    streams: list[Stream] = []
    together = threading.Event()

    def shoot() -> None:
        shots.append((engine.stats(), time.monotonic()))

    def look() -> None:
        if all(stream.first_token is not None for stream in streams):
            shoot()
        else:
            engine.call(look)  # again, after the next forward

    def ended(stream: Stream, last: Any) -> None:
        engine.call(lambda: shoot() if len(shots) == 1 else None)

    engine.call(lambda: together.wait(LIMIT))
    try:
        streams += [engine.submit(request, when_done=ended) for request in requests]
        engine.call(look)
    finally:
        together.set()
    for stream in streams:
        assert stream.result()[1].finish == "length"
    engine.call(lambda: None).result(LIMIT)
    (before, began), (after, done) = shots
    return Decoded(
        after.tokens_out - before.tokens_out,
        after.engine_seconds - before.engine_seconds,
        after.model_seconds - before.model_seconds,
        done - began,
    )


# --- side by side -----------------------------------------------------------------------------------------------------


def turns(works: dict[str, Callable[[], float]], until: float, least: int, most: int = 9) -> dict[str, Result]:
    """Run works in turns until `time.monotonic()` reaches `until`; the first one is the reference (see timing.py).

    Args:
        works: by name; each returns seconds per token.
        until, least, most: as of `timing.race`.
    """
    names = list(works)
    first, others = names[0], names[1:]
    for work in works.values():  # loads what has to be loaded
        work()
    results = {name: Result() for name in names}
    rounds, took = 0, 0.0
    while rounds < least or (rounds < most and time.monotonic() + took < until):
        began = time.monotonic()
        order = others if rounds % 2 == 0 else others[::-1]
        before = works[first]()
        references = [before]
        for at in range(0, max(1, len(order)), GROUP):
            taken = {name: works[name]() for name in order[at : at + GROUP]}
            after = works[first]()
            references.append(after)
            for name, seconds in taken.items():
                results[name].seconds.append(seconds)
                results[name].ratios.append((before + after) / 2 / seconds)
            before = after
        results[first].seconds.append(statistics.median(references))
        results[first].ratios.append(1.0)
        rounds, took = rounds + 1, time.monotonic() - began
    return results
