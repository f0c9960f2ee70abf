"""Backend: what turns running jobs into tokens, one forward at a time.

An engine owns the queue and calls a backend from one thread only. The order for every job: `start`, then a `step`
after another until the engine has seen its end, then `cancel`, which frees what it holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..engine.jobs import Job
from ..engine.sampling import draw as draw_tokens
from ..request import Program, ServeError, Token

__all__ = ["Backend", "Event", "Job", "draw"]


@dataclass(frozen=True)
class Event:
    """What a step did for one job.

    Attributes:
        job: for which.
        token: that was drawn.
        error: why this job alone cannot go on.
    """

    job: Job
    token: Token | None = None
    error: ServeError | None = None


class Backend(Protocol):
    """Runs jobs on one model.

    Attributes:
        name: as in options and reports, such as `hf-simple`.
        capacity: tokens of keys and values that its memory holds at most.
        longest: tokens that one job alone can come to.
        packs: whether the tokens of requests share a row, where no router may look at other tokens.
    """

    name: str
    capacity: int
    longest: int
    packs: bool

    def why_not(self, program: Program) -> str | None:
        """Return why it cannot run a program at all; None when it can."""
        ...

    def room(self) -> int:
        """Return how many tokens of keys and values are free, for reports."""
        ...

    def fits(self, job: Job) -> bool:
        """Tell whether a job may start now: there is room for all its tokens (`Job.need`)."""
        ...

    def start(self, job: Job) -> None:
        """Take a job, whose lease is held, into the next step."""
        ...

    def step(self) -> list[Event]:
        """Run one forward for all running jobs, and return what was drawn.

        Jobs of which only a part of the prompt was read have no event. The rows' experts act inside only, and tokens
        are drawn by `draw`. When it raises, the engine fails and cancels every running job and goes on.
        """
        ...

    def cancel(self, job: Job) -> None:
        """Free all that a job holds; it has ended, or its reader has left. Unknown jobs are ignored."""
        ...

    def running(self) -> list[Job]:
        """Return the jobs that have started and were not cancelled."""
        ...

    def busy(self) -> float:
        """Return the seconds of this thread's CPU that forwards of the model have taken so far."""
        ...

    def used(self) -> int:
        """Return how many tokens of keys and values are taken or reserved, for reports."""
        ...

    def close(self) -> None:
        """Free everything; nothing runs any more."""
        ...


def draw(jobs: Sequence[Job], logits: Tensor) -> list[Event]:
    """Draw the next token of every job from its row of logits (N, V)."""
    drawn = draw_tokens([job.sampler for job in jobs], logits)
    return [
        Event(job, error=token) if isinstance(token, ServeError) else Event(job, token)
        for job, token in zip(jobs, drawn, strict=True)
    ]
