"""Objectives: how a training loss is made of several forwards of the same batch. Pure functions of their outcomes.

An objective is a class built with its options; `forwards` says how often the batch is run, `shares_noise` whether
dropout and other noise is the same in all of them (only what routers draw differs), and calling it with the outcomes
gives the loss. molora/train/objectives.py runs the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import ConfigError
from ..registry import Registry, Spec, split_spec

# Fact `selector`: the selector that an objective trains; without it, it works with any.
objectives = Registry("objective")


@dataclass(frozen=True)
class Outcome:
    """What one forward of the batch gave.

    Attributes:
        loss: () the task loss as the trainer forms it, without auxiliary losses.
        rows: (B,) the part of each row in the plain cross-entropy, without gradient; the parts add up to `loss`.
            None where the outputs do not tell.
        logits: (N, C) at the N positions that have a label; None where the outputs do not tell.
        weight: what each of these positions weighs in the loss (1 / N for a plain mean).
        log_prob: (B,) log-probability of what the routers drew, summed over decisions and real tokens; None when no
            router draws.
    """

    loss: Tensor
    rows: Tensor | None = None
    logits: Tensor | None = None
    weight: Tensor | float = 1.0
    log_prob: Tensor | None = None


class Objective(Protocol):
    """What every objective has; see the module."""

    name: str
    forwards: int
    shares_noise: bool

    def __call__(self, outcomes: Sequence[Outcome]) -> Tensor:
        """Return the loss that is differentiated."""


def build_objective(spec: Spec | None) -> Any:
    """Build the objective of a config; None stays None. Raises ConfigError for what cannot work."""
    if spec is None:
        return None
    built = objectives.build(spec)
    built.name = split_spec(spec)[0]
    return built


def check_objective(spec: Any) -> list[str]:
    """Return what is wrong with the objective of a config."""
    if spec is None:
        return []
    problems = objectives.problems(spec)
    if not problems:
        try:
            build_objective(spec)
        except (ConfigError, TypeError) as error:
            problems.append(f"objective {spec!r}: {error}")
    return problems


def symmetric_kl(first: Tensor, second: Tensor) -> Tensor:
    """Return `1/2 sum (p - q)(ln p - ln q)` = (KL(p, q) + KL(q, p)) / 2 of two sets of logits (..., C) -> (...)."""
    log_p, log_q = torch.log_softmax(first.float(), -1), torch.log_softmax(second.float(), -1)
    return 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)


@objectives.register("consistency")
class Consistency:
    """Two forwards: the sum of their losses, plus alpha times how far their outputs differ (THOR, arXiv 2110.04260).

    The distance is the symmetric KL divergence, summed over the positions that have a label and divided as the loss
    is (by the number of labels, for a mean).

    Options:
        alpha: weight of the distance; 1 is the default of the authors' code, 5 what their script uses.
    """

    forwards = 2
    shares_noise = False

    def __init__(self, *, alpha: float = 1.0) -> None:
        if alpha < 0:
            raise ConfigError(f"alpha must not be negative, got {alpha}")
        self.alpha = float(alpha)

    def __call__(self, outcomes: Sequence[Outcome]) -> Tensor:
        """Return the loss."""
        first, second = outcomes
        if first.logits is None or second.logits is None:
            raise ConfigError("objective 'consistency' compares the logits of labelled positions; give it labels")
        apart = (symmetric_kl(first.logits, second.logits) * first.weight).sum()
        return first.loss + second.loss + self.alpha * apart


@objectives.register("rloo", selector="sample")
class Rloo:
    """Leave-one-out policy gradient of the routers over M draws (ReMix, arXiv 2603.10160).

    `mean_m L_m` trains the experts; `sum_m stopgrad((L_m - mean L) / (M - 1)) log Q_m` the routers: its value is 0
    here, so that the reported loss is the task loss. Every draw is compared with the others, so a constant in L changes
    nothing. That the experts get the mean over the M forwards is our reading.

    Options:
        draws: M, how often the batch is run.
        per: `row` gives each row its own L and log Q (rows do not influence each other, so this is exact and less
            noisy); `batch` takes the trainer's loss as one number, whatever it is made of.
    """

    shares_noise = True

    def __init__(self, *, draws: int = 4, per: str = "row") -> None:
        if isinstance(draws, bool) or not isinstance(draws, int) or draws < 2:
            raise ConfigError(f"draws must be a whole number >= 2, since draws are compared, got {draws!r}")
        if per not in ("row", "batch"):
            raise ConfigError(f"per {per!r} is unknown; known: row, batch")
        self.forwards, self.per = draws, per

    def __call__(self, outcomes: Sequence[Outcome]) -> Tensor:
        """Return the loss."""
        log_probs = [outcome.log_prob for outcome in outcomes]
        if any(log_prob is None for log_prob in log_probs):
            raise ConfigError("objective 'rloo' needs routers that draw; use selector: {name: sample, k: ...}")
        log_q = torch.stack(log_probs)  # type: ignore[arg-type]
        task = torch.stack([outcome.loss for outcome in outcomes])
        losses = task.detach()
        if self.per == "row":
            rows = [outcome.rows for outcome in outcomes]
            if any(row is None or row.shape != log_q.shape[1:] for row in rows):
                raise ConfigError(
                    "objective 'rloo' with per: row needs the loss of each row, from logits and labels of the same "
                    "rows that the routers saw; write per: batch for this model or trainer"
                )
            losses = torch.stack(rows)  # type: ignore[arg-type]
        else:
            log_q = log_q.sum(1)
        return task.mean() + leave_one_out(losses, log_q)


def leave_one_out(losses: Tensor, log_q: Tensor) -> Tensor:
    """Return a scalar of value 0 whose gradient is `sum_m (L_m - mean L) / (M - 1) grad log Q_m`, (M, ...) each."""
    advantage = (losses - losses.mean(0)) / (losses.shape[0] - 1)
    return (advantage.detach() * (log_q - log_q.detach())).sum()
