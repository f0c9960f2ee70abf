"""Simple: the backend hf-simple, which runs any generating model of transformers in static batches.

Jobs that start together are one batch: their prompts are read in one forward, and every step adds one token to each.
Rows that have ended leave at once. While one batch runs, the next one may begin beside it.
"""

from __future__ import annotations

import time

import torch
from torch import nn

from ..engine.jobs import Job
from ..engine.programs import Composer
from ..request import Program
from .base import Event, draw
from .decoding import Decoder, State

BATCHES = 2  # so many run side by side, so that nobody waits for the longest answer of a batch


class Simple:
    """Runs jobs in static batches.

    Args:
        model: of transformers, with the adapters inside; PEFT's wrapper will do.
        kv_bytes: of all caches together.
        max_batch: rows of one forward.
        pad_id: any token; it fills rows up.
        composer: says which experts act; None: one of its own.
        batches: how many batches may run side by side.
    """

    name, packs = "hf-simple", False

    def __init__(
        self,
        model: nn.Module,
        *,
        kv_bytes: int,
        max_batch: int = 16,
        pad_id: int = 0,
        composer: Composer | None = None,
        batches: int = BATCHES,
    ) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.decoder = Decoder(base, pad_id)
        self.composer = Composer(model) if composer is None else composer
        self.kv_bytes, self.max_batch, self.max_batches = kv_bytes, max_batch, batches
        with self.composer.acting(()):
            self.takes_padding = self.decoder.takes_padding()
            self.per_token, self.per_row = self.decoder.bytes_per_token()
        self.capacity = self.longest = max(0, kv_bytes - self.per_row) // max(1, self.per_token)
        self._batches: list[_Batch] = []  # of which the last one may not have begun
        self._busy = 0.0

    def why_not(self, program: Program) -> str | None:
        """Return None: it runs them all."""
        return None

    def fits(self, job: Job) -> bool:
        """Tell whether a job may start now."""
        if len(self.running()) >= self.max_batch:
            return False
        coming = self._coming()
        if coming is None:
            if len(self._batches) >= self.max_batches:
                return False
            jobs = [job]
        else:
            jobs = [*coming.jobs, job]
            if not self.takes_padding and len(job.prompt_ids) != len(coming.jobs[0].prompt_ids):
                return False
        others = sum(self._bytes(batch.jobs) for batch in self._batches if batch is not coming)
        return others + self._bytes(jobs) <= self.kv_bytes

    def start(self, job: Job) -> None:
        """Let a job join the batch that begins with the next step."""
        coming = self._coming()
        if coming is None:
            self._batches.append(coming := _Batch())
        coming.jobs.append(job)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Add one token to every row; a batch that has not begun reads its prompts."""
        events = []
        for batch in list(self._batches):
            jobs = list(batch.jobs)
            with self.composer.acting(jobs):
                began = time.thread_time()
                logits = batch.forward(self.decoder)
                self._busy += time.thread_time() - began
            drawn = draw(jobs, logits)
            batch.last = [event.token.id if event.token else self.decoder.pad_id for event in drawn]
            events += drawn
        return events

    def cancel(self, job: Job) -> None:
        """Take a job out; its row leaves the cache before the next forward."""
        for batch in self._batches:
            batch.leave(job)
        self._batches = [batch for batch in self._batches if batch.jobs]

    def running(self) -> list[Job]:
        """Return the jobs that have started."""
        return [job for batch in self._batches for job in batch.jobs]

    def room(self) -> int:
        """Return how many tokens of keys and values are free."""
        return max(0, self.capacity - self.used())

    def used(self) -> int:
        """Return how many tokens of keys and values are reserved."""
        return sum(self._bytes(batch.jobs) for batch in self._batches) // max(1, self.per_token)

    def busy(self) -> float:
        """Return the seconds of CPU that forwards have taken."""
        return self._busy

    def close(self) -> None:
        """Free everything."""
        self._batches = []

    def _coming(self) -> _Batch | None:
        """Return the batch that has not begun, if any."""
        return self._batches[-1] if self._batches and self._batches[-1].state is None else None

    def _bytes(self, jobs: list[Job]) -> int:
        """Return the most that a batch can take: rows are padded to the longest prompt, and leave when they end."""
        longest = max((len(job.prompt_ids) for job in jobs), default=0)
        limits = sorted((job.limit for job in jobs), reverse=True)
        tokens = max((rows * (longest + limit) for rows, limit in enumerate(limits, 1)), default=0)
        return tokens * self.per_token + len(jobs) * self.per_row


class _Batch:
    """Jobs that started together.

    Attributes:
        jobs: by row; those that have left are not among them.
        state: of the decoder; None before the first forward.
        last: the token that each row drew last.
    """

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.state: State | None = None
        self.last: list[int] = []
        self._rows: list[int] | None = None  # of the cache, that `jobs` are now; None: all in order

    def forward(self, decoder: Decoder) -> torch.Tensor:
        """Return the logits (B, V) of the next token of each row."""
        if self.state is None:
            logits, self.state = decoder.begin([job.prompt_ids for job in self.jobs])
            return logits
        if self._rows is not None:
            decoder.pick(self.state, self._rows)
            self._rows = None
        logits, self.state = decoder.step(self.state, self.last)
        return logits

    def leave(self, job: Job) -> None:
        """Take a job out."""
        if job not in self.jobs:
            return
        row = self.jobs.index(job)
        del self.jobs[row]
        if self.state is not None:
            rows = list(range(len(self.jobs) + 1)) if self._rows is None else self._rows
            self._rows = rows[:row] + rows[row + 1 :]
            del self.last[row]
