"""Bandit policies: probabilities of choosing each adapter, from what the selector says and what rewards have told.

A policy returns the exact probabilities it chooses with, so that a log of its choices can be used to judge any other
policy (offpolicy.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError, raise_all
from .registry import policies

GRID = 4096  # points of the integral over (0, 1)


@dataclass(frozen=True)
class Belief:
    """What is known of one adapter in one situation.

    Attributes:
        number: of rewards.
        total: their sum; each is in [0, 1].
    """

    number: int = 0
    total: float = 0.0

    def plus(self, reward: float) -> Belief:
        """Return the belief after one more reward."""
        return Belief(self.number + 1, self.total + reward)


class Policy:
    """Chooses among adapters.

    Args:
        explore: the share of choices that is spread evenly over all adapters, in [0, 1]; it bounds the weights of
            off-policy estimates.
        trust: how many rewards the selector's word is worth.
    """

    def __init__(self, explore: float, trust: float) -> None:
        problems = [] if 0 <= explore <= 1 else [f"explore must be in [0, 1], got {explore}"]
        problems += [] if trust >= 0 and math.isfinite(trust) else [f"trust must be 0 or more, got {trust}"]
        raise_all(problems, ConfigError, "this bandit policy cannot be made")
        self.explore, self.trust = explore, trust

    def probabilities(self, prior: Mapping[str, float], beliefs: Mapping[str, Belief]) -> dict[str, float]:
        """Return the probability of each adapter of `prior`; they add up to 1.

        Args:
            prior: the selector's shares of the adapters that may be chosen.
            beliefs: by adapter; one that is missing has no rewards yet.
        """
        names = sorted(prior)
        known = [beliefs.get(name, Belief()) for name in names]
        shares = torch.tensor([prior[name] for name in names], dtype=torch.float64)
        number = torch.tensor([float(one.number) for one in known], dtype=torch.float64)
        total = torch.tensor([one.total for one in known], dtype=torch.float64)
        found = self._of(shares, number, total)
        found = (1 - self.explore) * found / found.sum() + self.explore / len(names)
        return dict(zip(names, (found / found.sum()).tolist(), strict=True))

    def _of(self, shares: Tensor, number: Tensor, total: Tensor) -> Tensor:
        raise NotImplementedError


@policies.register("thompson")
class Thompson(Policy):
    """Each adapter as often as it is the best under a Beta belief of its reward (Thompson sampling).

    The belief is Beta(1 + trust * share + rewards, 1 + trust * (1 - share) + missed rewards). Instead of a draw per
    adapter, the probability that its draw is the largest is computed by quadrature, and known for the log.

    Args:
        explore, trust: see Policy.
    """

    def __init__(self, *, explore: float = 0.05, trust: float = 4.0) -> None:
        super().__init__(explore, trust)

    def _of(self, shares: Tensor, number: Tensor, total: Tensor) -> Tensor:
        return probability_of_best(1 + self.trust * shares + total, 1 + self.trust * (1 - shares) + number - total)


@policies.register("softmax")
class Softmax(Policy):
    """Softmax of the mean rewards, where the selector's share counts as `trust` rewards; the rest is even.

    Args:
        explore, trust: see Policy.
        temperature: of the softmax; rewards are in [0, 1].
    """

    def __init__(self, *, explore: float = 0.05, trust: float = 4.0, temperature: float = 0.1) -> None:
        super().__init__(explore, trust)
        if not temperature > 0:
            raise ConfigError(f"bandit policy 'softmax': temperature must be positive, got {temperature}")
        self.temperature = temperature

    def _of(self, shares: Tensor, number: Tensor, total: Tensor) -> Tensor:
        weight = number + self.trust
        means = torch.where(weight > 0, (total + self.trust * shares) / weight.clamp_min(1e-12), shares)
        return torch.softmax(means / self.temperature, -1)


def probability_of_best(a: Tensor, b: Tensor) -> Tensor:
    """Return for each of E independent Beta(a, b) variables, a and b (E,) from 1, the probability that it is largest.

    The integral of f_i times the product of the other F_j, by cells around where the mass is: points are the quantiles
    of the sum of all densities, so that narrow beliefs are seen as well as wide ones.
    """
    coarse = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    mean, size = a / (a + b), a + b
    spread = (mean * (1 - mean) / (size + 1)).sqrt()
    own = mean[:, None] + spread[:, None] * torch.linspace(-10, 10, 512, dtype=torch.float64)
    points = torch.cat([coarse, own.flatten()]).clamp(1e-12, 1 - 1e-12).unique()
    logs = (a[:, None] - 1) * points.log() + (b[:, None] - 1) * (-points).log1p()
    dense = (logs - logs.amax(-1, keepdim=True)).exp()  # (E, P)
    cells = (dense[:, 1:] + dense[:, :-1]) / 2 * points.diff()
    cells = cells / cells.sum(-1, keepdim=True)
    below = cells.cumsum(-1) - cells / 2  # F at the middle of each cell
    logs = below.clamp_min(1e-300).log()
    found = (cells * (logs.sum(0) - logs).exp()).sum(-1)
    return found / found.sum()
