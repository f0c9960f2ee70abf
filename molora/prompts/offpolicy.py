"""Off-policy estimates: what reward another policy would have had, from the log of the one that ran.

`ips` weighs each reward by how much more often the other policy would have chosen that adapter; it is unbiased when the
one that ran could choose all that the other one chooses. `snips` divides by the sum of the weights instead of their
number: a little bias, less variance, and never outside the range of the rewards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError


@dataclass(frozen=True)
class Round:
    """One choice that was rewarded.

    Attributes:
        situation: the selector's first choice.
        name: the adapter that answered.
        reward: in [0, 1].
        probabilities: with which it was drawn.
        prior: the selector's shares.
        version: of the bandit.
    """

    situation: str
    name: str
    reward: float
    probabilities: Mapping[str, float]
    prior: Mapping[str, float]
    version: int = 0


Target = Callable[[Round], Mapping[str, float]]  # probabilities of the policy that is asked about


@dataclass(frozen=True)
class Estimate:
    """The mean reward of a policy that did not run.

    Attributes:
        value: the estimate.
        error: its standard error.
        rounds: how many rewarded choices it is made of.
        effective: how many unweighted ones would tell as much: (sum w)^2 / sum w^2.
        uncovered: the mean probability of choosing what could not be drawn; above 0 the estimate is biased.
    """

    value: float
    error: float
    rounds: int
    effective: float
    uncovered: float


def rounds(log: Iterable[Mapping[str, Any]], version: int | None = None) -> list[Round]:
    """Return the rewarded choices of a log, in the order of their rewards; only those of one version, if given.

    Choices without a reward are left out: estimates are about those who answer, which is all that feedback can tell.
    """
    picks: dict[str, Mapping[str, Any]] = {}
    found = []
    for event in log:
        if event["event"] == "pick":
            picks[event["id"]] = event
        elif event["event"] == "reward" and event["id"] in picks:
            one = picks.pop(event["id"])
            if version in (None, one["version"]):
                known = (one["probabilities"], one["prior"], one["version"])
                found.append(Round(one["situation"], one["name"], float(event["reward"]), *known))
    return found


def always(name: str) -> Target:
    """Return the policy that chooses one adapter wherever it may be chosen, and else as the one that ran."""
    return lambda one: {name: 1.0} if name in one.probabilities else one.probabilities


def ips(log: Sequence[Round], target: Target) -> Estimate:
    """Estimate by inverse propensity: the mean of weight * reward."""
    weights, uncovered = _weights(log, target)
    terms = [weight * one.reward for weight, one in zip(weights, log, strict=True)]
    value = sum(terms) / len(terms)
    spread = sum((term - value) ** 2 for term in terms) / max(1, len(terms) - 1)
    return Estimate(value, math.sqrt(spread / len(terms)), len(terms), _effective(weights), uncovered)


def snips(log: Sequence[Round], target: Target) -> Estimate:
    """Estimate by self-normalised inverse propensity: the mean of rewards, weighted; the error by the delta method."""
    weights, uncovered = _weights(log, target)
    total = sum(weights)
    if total == 0:
        raise ConfigError("the policy never chooses what was chosen in this log, so the log tells nothing about it")
    value = sum(weight * one.reward for weight, one in zip(weights, log, strict=True)) / total
    spread = sum((weight * (one.reward - value)) ** 2 for weight, one in zip(weights, log, strict=True))
    return Estimate(value, math.sqrt(spread) / total, len(log), _effective(weights), uncovered)


def _weights(log: Sequence[Round], target: Target) -> tuple[list[float], float]:
    """Return the weight of each round, and how much the target would choose what could not be drawn."""
    if not log:
        raise ConfigError("the log holds no rewarded choice, so there is nothing to estimate from")
    weights, uncovered = [], 0.0
    for one in log:
        wanted = target(one)
        if abs(sum(wanted.values()) - 1) > 1e-6:
            raise ConfigError(f"the probabilities of a policy must add up to 1, got {dict(wanted)}")
        weights.append(wanted.get(one.name, 0.0) / one.probabilities[one.name])
        uncovered += sum(p for name, p in wanted.items() if not one.probabilities.get(name, 0.0) > 0)
    return weights, uncovered / len(log)


def _effective(weights: Sequence[float]) -> float:
    squares = sum(weight**2 for weight in weights)
    return sum(weights) ** 2 / squares if squares else 0.0
