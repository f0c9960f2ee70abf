"""Guards: abstain on prompts that are unlike every example, with a stated rate of false abstentions.

Both are conformal tests. The p-value of a prompt is the share of examples (and itself) that are as odd as it is, so for
a prompt that is drawn like the examples, P(p <= rate) <= rate exactly, at any number of examples and for any embedder
(exchangeability is all that is assumed; nothing is promised about how many unlike prompts are caught). The promise is
an average over draws of the examples and the prompt. With fewer than 1 / rate - 1 examples no prompt can be refused at
that rate: the guard is blind, and says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from .choice import Judged
from .gathered import Gathered
from .registry import guards

SCOPES = ("pool", "adapter")
PIECE = 8_000_000  # similarities at once


class Guard:
    """Judges whether prompts are like the examples.

    Args:
        rate: of false abstentions.
    """

    def __init__(self, name: str, rate: float) -> None:
        if not 0 < rate < 1:
            raise ConfigError(f"prompt guard '{name}': rate must be between 0 and 1, got {rate}")
        self.rate = rate

    def fit(self, groups: Sequence[Tensor]) -> None:
        """Learn from unit vectors (n, D) of each adapter's examples."""
        raise NotImplementedError

    def judge(self, vectors: Tensor) -> Judged:
        """Judge unit vectors (B, D)."""
        raise NotImplementedError

    def rest(self) -> None:
        """Give up what can be made again at once, since it may not be asked for long; by default nothing."""


@dataclass(frozen=True)
class _Pool:
    """Examples (n, D), and of those that are ranked (c of them) the rows, the sum of their largest cosines with the
    others, and the smallest of these."""

    examples: Gathered
    rows: Tensor
    sums: Tensor
    smallest: Tensor
    neighbours: int


@guards.register("nearest")
class Nearest(Guard):
    """By the mean cosine with the nearest examples; leave-one-out, with the prompt in the pool of every example.

    That is full conformal prediction: to rank a prompt among the examples, each example is scored as if the prompt were
    one more example, so nothing is lost to a split and the promise is exact.

    Args:
        rate: of false abstentions.
        neighbours: how many nearest examples make the score.
        scope: `pool`: the promise is for prompts like all allowed examples together. `adapter`: for prompts like those
            of any one adapter, however rare it is; each needs 1 / rate - 1 examples of its own.
        ranked: at most so many examples are ranked against, spread evenly; the promise stays exact.
    """

    def __init__(self, *, rate: float = 0.05, neighbours: int = 3, scope: str = "pool", ranked: int = 1000) -> None:
        super().__init__("nearest", rate)
        if scope not in SCOPES:
            raise ConfigError(f"prompt guard 'nearest': scope {scope!r} is unknown; known: {', '.join(SCOPES)}")
        if neighbours < 1 or ranked < 1:
            raise ConfigError(f"prompt guard 'nearest': neighbours and ranked must be at least 1, got {neighbours}, "
                              f"{ranked}")  # fmt: skip
        self.neighbours, self.scope, self.ranked = neighbours, scope, ranked

    def fit(self, groups: Sequence[Tensor]) -> None:
        """Score every ranked example against the others."""
        parts = [Gathered(groups)] if self.scope == "pool" else [Gathered([group]) for group in groups]
        self.pools = [self._pool(part) for part in parts if len(part) > 1]
        self.is_blind = len(self.pools) < len(parts) or any(1 / (len(pool.rows) + 1) > self.rate for pool in self.pools)

    def _pool(self, gathered: Gathered) -> _Pool:
        examples, number = gathered.rows(), len(gathered)
        wanted = min(number, self.ranked)
        rows = torch.tensor([i * number // wanted for i in range(wanted)])
        k = min(self.neighbours, number - 1)
        best = []
        for some in rows.split(max(1, PIECE // number)):
            near = examples[some] @ examples.t()
            near[torch.arange(len(some)), some] = -torch.inf
            best.append(near.topk(k, dim=-1).values)
        top = torch.cat(best)
        return _Pool(gathered, rows, top.sum(-1), top[:, -1], k)

    def judge(self, vectors: Tensor) -> Judged:
        """Judge by the pool, or by the adapter that a prompt is most like."""
        found = torch.zeros(len(vectors), dtype=torch.float64)
        for pool in self.pools:
            size = max(1, PIECE // len(pool.examples))
            found = torch.maximum(found, torch.cat([self._share(pool, some) for some in vectors.split(size)]))
        # without a pool nothing is known of any prompt
        familiarity = found.tolist() if self.pools else [1.0] * len(vectors)
        return Judged(familiarity, self.rate, self.is_blind)

    def rest(self) -> None:
        """Give up the matrices of the examples."""
        for pool in self.pools:
            pool.examples.rest()

    @staticmethod
    def _share(pool: _Pool, vectors: Tensor) -> Tensor:
        near = vectors @ pool.examples.rows().t()
        mine = near.topk(pool.neighbours, dim=-1).values.sum(-1, keepdim=True)
        gained = (near[:, pool.rows] - pool.smallest).clamp_min(0)  # where the prompt is among an example's nearest
        as_odd = (pool.sums + gained <= mine).sum(-1)
        return (1 + as_odd).double() / (len(pool.rows) + 1)  # float64, or 1 / 20 would be above 0.05


@guards.register("mahalanobis")
class Mahalanobis(Guard):
    """By the smallest Mahalanobis distance to an adapter's mean, under one covariance within all allowed adapters.

    Every second example makes means and covariance, the others are ranked (split conformal prediction); the promise is
    for prompts like all allowed examples together.

    Args:
        rate: of false abstentions.
        shrink: how far the covariance is moved towards a multiple of the identity, in (0, 1].
    """

    def __init__(self, *, rate: float = 0.05, shrink: float = 0.1) -> None:
        super().__init__("mahalanobis", rate)
        if not 0 < shrink <= 1:
            raise ConfigError(f"prompt guard 'mahalanobis': shrink must be in (0, 1], got {shrink}")
        self.shrink = shrink

    def fit(self, groups: Sequence[Tensor]) -> None:
        """Learn means and covariance from one half, and rank the other."""
        halves = [(group[0::2].double(), group[1::2].double()) for group in groups]
        self.means = torch.stack([learnt.mean(0) for learnt, _ in halves])
        apart = torch.cat([learnt - mean for (learnt, _), mean in zip(halves, self.means, strict=True)])
        covariance = apart.t() @ apart / max(1, len(apart) - len(halves))
        size = covariance.shape[0]
        spread = max(float(covariance.trace()) / size, 1e-6)
        covariance = (1 - self.shrink) * covariance + self.shrink * spread * torch.eye(size, dtype=torch.float64)
        self.root = torch.linalg.cholesky(covariance)
        self.whitened = torch.linalg.solve_triangular(self.root, self.means.t(), upper=False).t()
        self.distances = self._distance(torch.cat([held for _, held in halves])).sort().values
        self.is_blind = 1 / (len(self.distances) + 1) > self.rate

    def _distance(self, vectors: Tensor) -> Tensor:
        white = torch.linalg.solve_triangular(self.root, vectors.double().t(), upper=False).t()
        if not len(white):
            return white.new_zeros(0)
        return torch.cdist(white, self.whitened, compute_mode="donot_use_mm_for_euclid_dist").amin(-1)

    def judge(self, vectors: Tensor) -> Judged:
        """Judge by the rank of the distance."""
        number = len(self.distances)
        as_far = number - torch.searchsorted(self.distances, self._distance(vectors))
        return Judged(((1 + as_far).double() / (number + 1)).tolist(), self.rate, self.is_blind)
