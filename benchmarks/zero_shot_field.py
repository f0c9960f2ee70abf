"""What the contenders of the zero-shot benchmark work with: adapters, tasks, and what may be known of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from library_tasks import Row, Task
from pointing import Batch, Pointer
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """How much of everything; see `benchmarks/zero_shot.py` for the options that change it."""

    rows: int = 120  # held-out rows per task
    texts: int = 32  # per adapter, for the routers that read texts
    router_steps: int = 30  # of every router that is trained
    examples: int = 16  # labelled rows for those that see some of what is asked
    budget: int = 20  # evaluations of LoraHub's search
    batch: int = 16
    together: int = 2  # tasks that are held out at once from routers that are trained, so that fewer must be trained


@dataclass
class Field:
    """What the contenders work with.

    Attributes:
        pointer: makes batches.
        tasks: all of them, by name.
        folders: of the adapters, by name.
        sizes: how much of everything.
        quality: (N, E) the probability of the right answer, of each adapter on the texts of all tasks.
        owners: the task of each of these N texts.
        mixture: folder of the shipped mixture, if any.
    """

    pointer: Pointer
    tasks: Mapping[str, Task]
    folders: Mapping[str, Path]
    sizes: Sizes
    mixture: Path | None = None
    quality: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    owners: list[str] = field(default_factory=list)

    def texts(self, name: str) -> list[Row]:
        """Return the training rows of a task that routers may read."""
        return self.tasks[name].train[: self.sizes.texts]

    def read(self, name: str) -> list[dict[str, Tensor]]:
        """Return inputs of the model for those rows."""
        return [batch.inputs for batch in self.pointer.batches(self.texts(name), 32)]

    def joined(self, names: list[str], seed: int = 0) -> Any:
        """Yield batches of rows of several tasks, without end."""
        rows = [row for name in names for row in self.tasks[name].train[:256]]
        return self.pointer.endless(rows, min(self.sizes.batch, len(rows)), seed)

    def shots(self, asked: list[str]) -> list[Batch]:
        """Return a few labelled training rows: of one task, or as many over several."""
        each = max(2, self.sizes.examples // len(asked))
        return self.pointer.batches([row for name in asked for row in self.tasks[name].train[:each]])
