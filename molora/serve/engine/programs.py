"""Composer: from the gate programs of the jobs in a batch to what each row gets of each adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...layers import RoutedLayer
from ...routing.rows import Rows
from ...routing.trace import Trace
from ..request import Mixture, Weighted
from .jobs import Job

KEPT = 8  # compositions: those of batches that run side by side, and of the prompts that are read meanwhile


@dataclass(frozen=True)
class Decision:
    """What the router of one layer decided for tokens of one request.

    Attributes:
        layer: path of the layer; of those that share a decision, the one that took it.
        gates: (n, E) for the n tokens that this forward read of the request, on the CPU.
        probs: (n, E), before a selector chose among them.
        drawn: how many tokens of the answer there were before this forward.
    """

    layer: str
    gates: Tensor
    probs: Tensor
    drawn: int = 0


Watcher = Callable[[Decision], None]


class Composer:
    """Says to a model, forward by forward, which experts act for which row.

    What it makes of a batch is kept while the batch stays the same, so decoding makes nothing anew.

    Args:
        model: with the adapters inside.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._trace: Trace | None = None
        self._sizes: dict[str, int] = {}  # experts by adapter of slots
        self._kept: dict[tuple[Any, ...], dict[str, Rows]] = {}  # by jobs, and by jobs and counts; the latest ones

    @contextmanager
    def acting(self, jobs: Sequence[Job], counts: Sequence[int] | None = None) -> Iterator[None]:
        """Let the experts that the jobs ask for act in the forward inside the block, and nothing else.

        Args:
            jobs: in the order of the rows; with `counts`, of their tokens in one packed row.
            counts: how many tokens of each job the packed row has, one after another; None: one row for each job.
        """
        rows = self.rows(jobs) if counts is None else self.packed(jobs, counts)
        trace = self._find_trace()
        if trace is None:
            yield
            return
        reader = self._reader(jobs, counts)
        trace.rows = rows
        try:
            if reader is None:
                yield
            else:
                with trace.telling(reader):
                    yield
        finally:
            trace.rows = None

    def rows(self, jobs: Sequence[Job]) -> dict[str, Rows]:
        """Return what each of B rows gets, by adapter: gates (B, 1, E), or masks (B, 1, 1) for mixtures."""
        return self._keep(tuple(jobs), lambda: self._compose(jobs))

    def packed(self, jobs: Sequence[Job], counts: Sequence[int]) -> dict[str, Rows]:
        """Return what each of T tokens gets, by adapter: gates (1, T, E), or masks (1, T, 1) for mixtures."""
        return self._keep((tuple(jobs), tuple(counts)), lambda: _expand(self.rows(jobs), counts))

    def _keep(self, key: tuple[Any, ...], make: Callable[[], dict[str, Rows]]) -> dict[str, Rows]:
        """Return what was made for a key before, or make it."""
        if key not in self._kept:
            made = make()
            while len(self._kept) >= KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = made
        return self._kept[key]

    def _compose(self, jobs: Sequence[Job]) -> dict[str, Rows]:
        device = next(self.model.parameters()).device
        gates: dict[str, list[tuple[int, int, float]]] = {}  # by adapter: row, slot, weight
        masks: dict[str, list[int]] = {}
        for row, job in enumerate(jobs):
            if isinstance(job.program, Weighted):
                assert job.lease is not None
                for name, weight in job.program.weights:
                    adapter, slot = job.lease.rows[name]
                    gates.setdefault(adapter, []).append((row, int(slot or 0), float(weight)))
            elif isinstance(job.program, Mixture):
                assert job.lease is not None
                masks.setdefault(job.lease.rows[job.program.name][0], []).append(row)
        found = {}
        for adapter, told in gates.items():
            rows, slots, weights = zip(*told, strict=True)
            table = torch.zeros(len(jobs), self._size(adapter))  # filled at once: writing one by one takes longer
            table.index_put_((torch.tensor(rows), torch.tensor(slots)), torch.tensor(weights), accumulate=True)
            found[adapter] = Rows(gates=table[:, None].to(device))
        for adapter, chosen in masks.items():
            mask = torch.zeros(len(jobs), 1, 1)
            mask[chosen] = 1.0
            found[adapter] = Rows(mask=mask.to(device))
        return found

    def _size(self, adapter: str) -> int:
        """Return how many experts (slots) an adapter has."""
        if adapter not in self._sizes:
            banks = (module.molora_bank for module in self.model.modules() if isinstance(module, RoutedLayer))
            self._sizes[adapter] = next(bank[adapter].num_experts for bank in banks if adapter in bank)
        return self._sizes[adapter]

    def _find_trace(self) -> Trace | None:
        """Return the trace of the model; None while it has no adapter at all."""
        if self._trace is None:
            layers = (module for module in self.model.modules() if isinstance(module, RoutedLayer))
            self._trace = next((layer.trace for layer in layers), None)
        return self._trace

    def _reader(self, jobs: Sequence[Job], counts: Sequence[int] | None) -> Callable[..., None] | None:
        """Return a reader of the trace that hands each watcher the decisions about its own job; None for nobody."""
        watched = [
            (row, job, job.lease.rows[job.program.name][0])
            for row, job in enumerate(jobs)
            if job.watcher is not None and isinstance(job.program, Mixture) and job.lease is not None
        ]
        if not watched:
            return None
        starts = [0]
        for count in counts or ():
            starts.append(starts[-1] + count)

        def read(site: Any, routing: Any, context: Any) -> None:
            for row, job, adapter in watched:
                if site.adapter != adapter or job.watcher is None:
                    continue
                place = slice(starts[row], starts[row + 1]) if counts is not None else row
                job.watcher(Decision(site.name, *_cut(routing, place, context.valid), len(job.drawn)))

        return read


def _cut(routing: Any, place: int | slice, valid: Tensor | None) -> list[Tensor]:
    """Return the gates and probabilities (n, E) of the tokens of one job."""
    found = []
    for table in (routing.applied, routing.probs):
        table = table.detach().float()
        if isinstance(place, slice):
            part = table[0, place]
        else:
            part = table[place]
            if valid is not None and part.shape[0] == valid.shape[1]:
                part = part[valid[place]]
        found.append(part.cpu())
    return found


def _expand(rows: dict[str, Rows], counts: Sequence[int]) -> dict[str, Rows]:
    """Lay rows (B, 1, n) out as tokens (1, T, n)."""
    expanded = {}
    for name, given in rows.items():
        told = given.gates if given.gates is not None else given.mask
        assert told is not None
        repeats = torch.tensor(counts, device=told.device)
        tokens = told[:, 0].repeat_interleave(repeats, 0)[None]
        expanded[name] = Rows(gates=tokens) if given.gates is not None else Rows(mask=tokens)
    return expanded
