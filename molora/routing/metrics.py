"""Routing statistics: what the routers did over a run, per site and per task, and how much two runs differ.

`Usage` is a reader of the trace. It keeps sums only, in float64 on the CPU, so that batches of any size, processes
and files add up exactly; everything that is reported is computed from the sums in `Figures`.

Terms, for one site and E experts, over all real tokens (padding never counts):

- load f: the share of all choices that fell on an expert; sums to 1.
- gate mass: the mean gate of an expert per token; its sum is the weight that all experts have together.
- P: the mean of the probs over tokens. Its entropy is high when the load is spread; the mean entropy of the single
  tokens is low when each of them knows what it wants. Both are divided by ln E, so they lie in [0, 1].
- effective experts: exp(entropy of P), from 1 to E.
- dead: an expert whose share of choices, or of the gate mass, is below `dead_below` times the even share 1 / E. The
  second condition finds dead experts of soft mixtures, which "choose" every expert.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, LoadError
from .entropy import shannon
from .losses import shares
from .trace import Site, Trace
from .types import Context, Routing

FORMAT = 1
DEAD_BELOW = 0.1  # of the even share
UNKNOWN = -1  # the task id of rows without a task


@dataclass(frozen=True)
class Figures:
    """What one site did, over one task or over all.

    Attributes:
        tokens: decisions counted: real tokens, or rows where the decision is per prompt or per task.
        load: (E,) share of choices of each expert; zeros when nothing was chosen.
        gate_mass: (E,) mean gate per token.
        gate_share: (E,) share of the gate mass, in absolute values; zeros when all gates are zero.
        token_entropy: mean entropy of a token's probs, in [0, 1].
        mean_entropy: entropy of the mean probs P, in [0, 1].
        effective_experts: exp of the entropy of P in nats, in [1, E].
        experts_per_token: mean number of experts with a gate that is not zero.
        dead: experts below the threshold.
        load_variation: standard deviation of the load over its mean; 0 when even, sqrt(E - 1) when one takes all.
        max_violation: the largest load times E, minus 1: how much more than its even share the busiest expert has
            (MaxVio of arXiv 2408.15664).
    """

    tokens: int
    load: list[float]
    gate_mass: list[float]
    gate_share: list[float]
    token_entropy: float
    mean_entropy: float
    effective_experts: float
    experts_per_token: float
    dead: list[int]
    load_variation: float
    max_violation: float

    @property
    def num_experts(self) -> int:
        """The number of experts E."""
        return len(self.load)


@dataclass
class _Sums:
    """Sums over the counted tokens of one site and one task; (E,) float64."""

    tokens: float
    entropy: float
    chosen: Tensor
    gates: Tensor
    size: Tensor  # of |gates|
    probs: Tensor

    @classmethod
    def zero(cls, experts: int) -> _Sums:
        return cls(0.0, 0.0, *(torch.zeros(experts, dtype=torch.float64) for _ in range(4)))

    def add(self, other: _Sums) -> None:
        self.tokens += other.tokens
        self.entropy += other.entropy
        for name in ("chosen", "gates", "size", "probs"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass
class _SiteSums:
    """The sums of one site per task id; `group` names the decision when several sites share it."""

    experts: int
    group: str | None = None
    tasks: dict[int, _Sums] = field(default_factory=dict)


class Usage:
    """A reader of the trace that adds up what the routers of one adapter decide.

        usage = Usage(tasks=["news", "toxicity"])
        with usage.reading(trace_of(model)): ...

    Sites that share a decision are counted once, under the site that takes it.

    Args:
        tasks: task names by id; rows whose id has no name here count as unknown.
        adapter: whose decisions count.
        dead_below: threshold of dead experts, as a part of the even share 1 / E.
    """

    def __init__(self, tasks: Sequence[str] = (), *, adapter: str = "default", dead_below: float = DEAD_BELOW) -> None:
        if not 0 < dead_below <= 1:
            raise ConfigError(f"dead_below must be in (0, 1], as a part of the even share, got {dead_below}")
        self.tasks = list(tasks)
        self.adapter = adapter
        self.dead_below = dead_below
        self._sites: dict[str, _SiteSums] = {}

    # --- reading ----------------------------------------------------------------------------------------------------

    @contextmanager
    def reading(self, trace: Trace) -> Iterator[Usage]:
        """Count the decisions of all forwards inside the block."""
        with trace.telling(self):
            yield self

    @torch.no_grad()
    def __call__(self, site: Site, routing: Routing, ctx: Context) -> None:
        """Count one decision; this is what the trace calls."""
        if site.adapter != self.adapter:
            return
        experts = routing.num_experts
        sums = self._sites.setdefault(site.name, _SiteSums(experts, site.group if site.shared else None))
        weights = ctx.weights(routing.gates)
        values = {
            "chosen": routing.selected[..., :experts],  # null experts have no load of their own
            "gates": routing.gates,
            "size": routing.gates.abs(),
            "probs": shares(routing)[..., :experts],
            "entropy": shannon(shares(routing))[..., None],
        }
        per_row = {name: _rows(value, weights) for name, value in values.items()}
        tokens = weights.double().sum(1).cpu()
        for task, rows in _rows_of(ctx.task_ids, len(tokens), len(self.tasks)):
            picked = {name: value[rows].sum(0) for name, value in per_row.items()}
            new = _Sums(float(tokens[rows].sum()), float(picked.pop("entropy")), **picked)
            sums.tasks.setdefault(task, _Sums.zero(experts)).add(new)

    def add(self, other: Usage) -> None:
        """Add what another reader of the same model counted, for example on another part of the data."""
        if other.tasks != self.tasks:
            raise ConfigError(f"statistics of tasks {other.tasks} cannot be added to those of {self.tasks}")
        for name, theirs in other._sites.items():
            mine = self._sites.setdefault(name, _SiteSums(theirs.experts, theirs.group))
            if mine.experts != theirs.experts:
                raise ConfigError(f"site '{name}' has {mine.experts} experts here and {theirs.experts} there")
            for task, sums in theirs.tasks.items():
                mine.tasks.setdefault(task, _Sums.zero(mine.experts)).add(sums)

    # --- figures ----------------------------------------------------------------------------------------------------

    @property
    def sites(self) -> list[str]:
        """The sites that took decisions, in the order of the model."""
        return list(self._sites)

    def group(self, site: str) -> str | None:
        """Return the name of the decision that a site takes for others too, None when it decides for itself."""
        return self._sites[site].group

    @property
    def counted_tasks(self) -> list[str]:
        """The named tasks of which something was counted, in the order of their ids."""
        seen = {task for site in self._sites.values() for task in site.tasks}
        return [name for task, name in enumerate(self.tasks) if task in seen]

    def figures(self, site: str, task: str | None = None) -> Figures | None:
        """Return what a site did over one task, or over everything; None when nothing of it was counted.

        Raises:
            KeyError: no such site, or no such task.
        """
        entry = self._sites[site]
        total = _Sums.zero(entry.experts)
        if task is not None and task not in self.tasks:
            raise KeyError(task)
        for number, sums in entry.tasks.items():
            if task is None or number == self.tasks.index(task):
                total.add(sums)
        return None if total.tokens == 0 else _figures(total, self.dead_below)

    # --- files ------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return the sums as plain JSON data; nothing is rounded."""
        return {
            "format": FORMAT,
            "adapter": self.adapter,
            "dead_below": self.dead_below,
            "tasks": self.tasks,
            "sites": {
                name: {
                    "experts": site.experts,
                    "group": site.group,
                    "sums": {
                        str(task): {
                            "tokens": sums.tokens,
                            "entropy": sums.entropy,
                            **{key: getattr(sums, key).tolist() for key in _VECTORS},
                        }
                        for task, sums in site.tasks.items()
                    },
                }
                for name, site in self._sites.items()
            },
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Usage:
        """Read what `to_dict` returned.

        Raises:
            LoadError: it is something else.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise LoadError(f"not routing statistics of format {FORMAT}; record them again with molora inspect")
        try:
            usage = cls(data["tasks"], adapter=data["adapter"], dead_below=data["dead_below"])
            for name, site in data["sites"].items():
                entry = _SiteSums(int(site["experts"]), site["group"])
                for task, sums in site["sums"].items():
                    vectors = {k: torch.tensor(sums[k], dtype=torch.float64) for k in _VECTORS}
                    if any(v.shape != (entry.experts,) for v in vectors.values()):
                        raise ValueError(f"site '{name}' needs {entry.experts} numbers per expert list")
                    numbers = float(sums["tokens"]), float(sums["entropy"])
                    entry.tasks[int(task)] = _Sums(*numbers, **vectors)
                usage._sites[name] = entry
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise LoadError(f"damaged routing statistics: {type(error).__name__}: {error}") from None
        return usage


_VECTORS = ("chosen", "gates", "size", "probs")


def _rows(values: Tensor, weights: Tensor) -> Tensor:
    """Sum values (B, S, E) over the counted positions of each row -> (B, E) float64 on the CPU."""
    return (values.double() * weights.double()[..., None]).sum(1).cpu()


def _rows_of(ids: Tensor | None, rows: int, named: int) -> Iterator[tuple[int, Tensor]]:
    """(task id, rows of that task (n,)) for each task among the rows; UNKNOWN stands for all ids without a name."""
    tasks = torch.full((rows,), UNKNOWN) if ids is None else ids.detach().reshape(-1).cpu()
    if tasks.numel() != rows:
        # one id for the whole batch, or one decision for rows of several tasks
        tasks = tasks[:1].expand(rows) if len(set(tasks.tolist())) == 1 else torch.full((rows,), UNKNOWN)
    tasks = torch.where((tasks >= 0) & (tasks < named), tasks, torch.full_like(tasks, UNKNOWN))
    for task in tasks.unique().tolist():
        yield int(task), (tasks == task).nonzero()[:, 0]


def _share(values: Tensor) -> Tensor:
    total = values.sum()
    return values / total if total > 0 else torch.zeros_like(values)


def _figures(sums: _Sums, dead_below: float) -> Figures:
    experts = len(sums.chosen)
    load, gate_share = _share(sums.chosen), _share(sums.size)
    mean_entropy = float(shannon(_share(sums.probs)))
    least = torch.minimum(load, gate_share)
    return Figures(
        tokens=round(sums.tokens),
        load=load.tolist(),
        gate_mass=(sums.gates / sums.tokens).tolist(),
        gate_share=gate_share.tolist(),
        token_entropy=sums.entropy / sums.tokens,
        mean_entropy=mean_entropy,
        effective_experts=math.exp(mean_entropy * math.log(experts)),
        experts_per_token=float(sums.chosen.sum()) / sums.tokens,
        dead=[e for e in range(experts) if least[e] < dead_below / experts],
        load_variation=float(load.std(correction=0) * experts),
        max_violation=float(load.max() * experts - 1) if load.sum() > 0 else 0.0,
    )
