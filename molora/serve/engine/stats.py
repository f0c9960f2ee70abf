"""Stats: what an engine has done and is doing, read at any time from any thread."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..backends.base import Backend
from ..request import Finish, Mixture, Program, ServeError, Weighted
from .fair import Scheduler
from .jobs import Job

BASE = "(base)"
OTHER = "(other)"
MOST = 2000  # adapters that are counted by name


@dataclass(frozen=True)
class Stats:
    """A snapshot of an engine.

    Attributes:
        healthy: whether its thread runs.
        draining: whether it takes no more requests.
        waiting: requests, prompts to be encoded among them.
        running: requests in the batch.
        started, ended: requests so far, those for embeddings and classes among them; `ended` by how, also of those
            that ended while they waited. An embedding that was made has ended by `stop`.
        tokens_in, tokens_cached, tokens_out: of prompts, of these from the prefix cache, and drawn.
        steps: forwards of the model.
        batch: rows of the last forward by adapter.
        kv_used, kv_capacity: tokens of keys and values that are reserved, and that there is room for.
        by_tenant: tokens read and drawn.
        by_adapter: tokens drawn; of a weighted mix, for each of its adapters.
        model_seconds, engine_seconds: CPU time of the engine's thread inside of the model, and altogether.
        backends: names of the backends.
    """

    healthy: bool
    draining: bool
    waiting: int
    running: int
    started: int
    ended: Mapping[str, int]
    tokens_in: int
    tokens_cached: int
    tokens_out: int
    steps: int
    batch: Mapping[str, int]
    kv_used: int
    kv_capacity: int
    by_tenant: Mapping[str, int]
    by_adapter: Mapping[str, int]
    model_seconds: float
    engine_seconds: float
    backends: tuple[str, ...]

    @property
    def overhead(self) -> float:
        """The part of the thread's CPU time that was not spent in the model, in [0, 1]."""
        return 1 - self.model_seconds / self.engine_seconds if self.engine_seconds > 0 else 0.0


@dataclass
class Counts:
    """What the engine's thread adds up; see Stats."""

    started: int = 0
    tokens_in: int = 0
    tokens_cached: int = 0
    tokens_out: int = 0
    steps: int = 0
    cpu: float = 0.0
    encoding: float = 0.0
    kv_used: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    by_adapter: Counter[str] = field(default_factory=Counter)
    batch: dict[str, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def end(self, finish: Finish) -> None:
        """Note that a request has ended, before anybody is told; on any thread."""
        with self._lock:
            self.ended[finish] += 1

    def step(self, jobs: Sequence[Job]) -> None:
        """Note a forward."""
        self.steps += 1
        self.batch = dict(Counter(name for job in jobs for name in named(job.program)))

    def drew(self, job: Job) -> None:
        """Note a token."""
        self.tokens_out += 1
        for name in named(job.program):
            known = name in self.by_adapter or len(self.by_adapter) < MOST
            self.by_adapter[name if known else OTHER] += 1


def ended_by(error: BaseException) -> Finish:
    """Return how an encoding that failed has ended, in the words of answers."""
    known: dict[str | None, Finish] = {"timeout": "timeout", "draining": "cancelled"}
    return known.get(error.code, "error") if isinstance(error, ServeError) else "error"


def snapshot(
    healthy: bool,
    draining: bool,
    running: int,
    counts: Counts,
    scheduler: Scheduler[Any],
    backends: Sequence[Backend],
) -> Stats:
    """Return how things stand, on any thread."""
    return Stats(
        healthy=healthy,
        draining=draining,
        waiting=len(scheduler),
        running=running,
        started=counts.started,
        ended=dict(counts.ended),
        tokens_in=counts.tokens_in,
        tokens_cached=counts.tokens_cached,
        tokens_out=counts.tokens_out,
        steps=counts.steps,
        batch=counts.batch,
        kv_used=counts.kv_used,
        kv_capacity=sum(backend.capacity for backend in backends),
        by_tenant={name: share.input + share.output for name, share in scheduler.shares().items()},
        by_adapter=dict(counts.by_adapter),
        model_seconds=sum(backend.busy() for backend in backends) + counts.encoding,
        engine_seconds=counts.cpu,
        backends=tuple(backend.name for backend in backends),
    )


def named(program: Program) -> tuple[str, ...]:
    """Return what a program's tokens are counted under."""
    if isinstance(program, Weighted) and program.weights:
        return program.names
    return (program.name,) if isinstance(program, Mixture) else (BASE,)
