"""Backend hf-cb: requests join and leave at every step, over paged keys that requests of one adapter share.

All tokens of a step lie in one packed row (1, T): one for each answer in progress, then pieces of prompts as far as
`batch_tokens` reaches, so a long prompt does not hold up the others. Blocks for the longest answer that a job may come
to are reserved when it starts, so a running job can never run out of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from ...errors import ConfigError
from ..engine.jobs import Job
from ..engine.programs import Composer
from ..request import Mixture, Program, ServeError
from .attention import Piece
from .base import Event, draw
from .packed import PackedModel, why_not

__all__ = ["Continuous", "why_not"]


@dataclass(eq=False)
class _Run:
    """A running job: its tokens so far, and how many of them have keys in the cache."""

    job: Job
    tokens: list[int]
    past: int

    @property
    def left(self) -> int:
        return len(self.tokens) - self.past

    def piece(self, count: int) -> Piece:
        return Piece(self.job.id, self.past, self.tokens[self.past : self.past + count])


class Continuous:
    """Continuous batching over a paged cache.

    Args:
        model: to serve, wrapped by molora or not.
        kv_bytes: memory of keys and values; all of it is taken now and nothing later.
        places: jobs that run at once, at most.
        batch_tokens: tokens of one forward, at most.
        page: tokens of a block, the unit in which prefixes are shared.
        packed: tells why a mixture cannot run in a packed batch, by name; None: it can.

    Attributes:
        capacity: tokens whose keys and values the blocks hold.
        longest: tokens that one job alone can come to; more than `capacity` where all layers have sliding windows.

    Raises:
        ConfigError: the model cannot be served so (see `why_not`), or the numbers are out of range.
    """

    name, packs = "hf-cb", True

    def __init__(
        self,
        model: nn.Module,
        kv_bytes: int,
        places: int = 16,
        batch_tokens: int = 256,
        page: int = 16,
        packed: Callable[[str], str | None] = lambda name: None,
    ) -> None:
        if not 1 <= places <= batch_tokens or page < 4:
            raise ConfigError(
                f"places must be from 1 to batch_tokens and page at least 4, got places {places}, batch_tokens "
                f"{batch_tokens} and page {page}"
            )
        reason = why_not(model)
        if reason is not None:
            raise ConfigError(f"hf-cb cannot run this model: {reason}; use backend hf-simple")
        self._reader = PackedModel(model, kv_bytes, places, page)
        self.pages = self._reader.pages
        self.capacity, self.longest = self.pages.capacity, self.pages.longest
        self.places, self.batch_tokens = places, batch_tokens
        self._packed, self._composer = packed, Composer(model)
        self._runs: dict[str, _Run] = {}
        self._busy = 0.0

    def why_not(self, program: Program) -> str | None:
        """Return why it cannot run a program; None when it can."""
        if not isinstance(program, Mixture):
            return None
        reason = self._packed(program.name)
        return reason and f"mixture '{program.name}' cannot share a packed row: {reason}"

    def room(self) -> int:
        """Return how many tokens of keys and values are free: neither held nor reserved."""
        return self.pages.room

    def fits(self, job: Job) -> bool:
        """Tell whether a job may start now: a place is free, and blocks for all its tokens (`Job.need`)."""
        return len(self._runs) < self.places and self.pages.fits(job.need)

    def start(self, job: Job) -> None:
        """Reserve blocks for a job, find what of its prompt is in the cache, and take it into the next step."""
        if job.id in self._runs:
            raise ServeError(f"request '{job.id}' is running already", 409, "duplicate_id")
        if not self.fits(job):
            raise ServeError(
                f"request '{job.id}' needs {job.need} tokens of keys and values, but {self.pages.room} of "
                f"{self.capacity} are free, and {self.places - len(self._runs)} of {self.places} places; give a "
                f"shorter prompt, less max_tokens, or wait",
                503 if job.need <= self.longest else 400,
                "no_room" if job.need <= self.longest else "context_length_exceeded",
            )
        self.pages.open(job.id, job.salt, job.need)
        self._runs[job.id] = run = _Run(job, [*job.prompt_ids, *job.drawn], 0)
        self._find(run)

    def step(self) -> list[Event]:
        """Run one forward for all running jobs, and return what was drawn."""
        single, pieces = self._choose()
        every = [*((run, 1) for run in single), *pieces]
        if not every:
            return []
        end, last, drawing = 0, [], []
        for run, count in every:
            self.pages.grow(run.job.id, run.past, count)
            end += count
            if count == run.left:  # all of its tokens are read then, so the next one follows
                last.append(end - 1)
                drawing.append(run)
        with self._composer.acting([run.job for run, _ in every], [count for _, count in every]):
            before = time.thread_time()
            logits = self._reader([run.piece(1) for run in single], [run.piece(count) for run, count in pieces], last)
            self._busy += time.thread_time() - before
        for run, count in every:
            run.past += count
            self.pages.written(run.job.id, run.tokens, run.past)
        events = draw([run.job for run in drawing], logits)
        for run, event in zip(drawing, events, strict=True):
            if event.token is not None:
                run.tokens.append(event.token.id)
        return events

    def cancel(self, job: Job) -> None:
        """Free the blocks of a job; full ones can be found by later jobs until their memory is needed."""
        if self._runs.pop(job.id, None) is not None:
            self.pages.close(job.id)

    def running(self) -> list[Job]:
        """Return the jobs that have started and were not cancelled."""
        return [run.job for run in self._runs.values()]

    def busy(self) -> float:
        """Return the seconds of this thread's CPU that forwards of the model have taken so far."""
        return self._busy

    def used(self) -> int:
        """Return how many tokens of keys and values are reserved."""
        return self.pages.reserved

    def close(self) -> None:
        """Forget all jobs and give the model its attention back."""
        for job in self.running():
            self.cancel(job)
        self._reader.close()

    def _find(self, run: _Run) -> None:
        """Take over what others have computed of a prompt, perhaps since the last step."""
        found = self.pages.find(run.job.id, run.tokens, run.past)
        run.past += found
        run.job.cached += found

    def _choose(self) -> tuple[list[_Run], list[tuple[_Run, int]]]:
        """Return the runs with one token to read, and pieces of the prompts of others, first come, first served.

        A prompt whose next block is being computed for another one waits for it.
        """
        runs = [run for run in self._runs.values() if run.job.finish is None and run.left]
        for run in runs:
            if run.left > 1:
                self._find(run)
        single = [run for run in runs if run.left == 1]
        budget, pieces, coming = self.batch_tokens - len(single), [], set()
        for run in runs:
            count = min(run.left, budget)
            if run.left == 1 or not count:
                continue
            name = self.pages.next_name(run.job.id, run.tokens)
            if name is not None:
                if name in coming:
                    continue
                coming.add(name)
            pieces.append((run, count))
            budget -= count
        return single, pieces
