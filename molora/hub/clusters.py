"""Groups of adapters that do alike: model-based clustering (MBC, arXiv 2405.11157), in the space of weight changes.

The authors flatten A and B, and run k-means on cosines. Here the points are the weight changes themselves, each divided
by its norm: their Gram matrix is the matrix of cosines, and points with the same Gram matrix have the same distances,
so k-means on the n rows of its square root is k-means on the dense matrices, exactly, whatever their size.
MBC then trains one adapter on the data of each group; `average` of a group is what there is without its data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from .arithmetic import Adapter, similarity


@dataclass(frozen=True)
class Clusters:
    """Groups of adapters.

    Attributes:
        labels: the group of each adapter; groups are numbered by their first member.
        similarity: (n, n) cosines of their weight changes.
        spread: sum over adapters of the squared distance to the mean of their group, of changes with norm 1.
    """

    labels: tuple[int, ...]
    similarity: Tensor
    spread: float

    @property
    def members(self) -> list[list[int]]:
        """The numbers of the adapters in each group."""
        return [[i for i, label in enumerate(self.labels) if label == group] for group in range(max(self.labels) + 1)]


def cluster(adapters: Sequence[Adapter], groups: int, *, seed: int = 0, restarts: int = 20) -> Clusters:
    """Return the best of several runs of k-means over the directions of the adapters' weight changes.

    Args:
        adapters: folders or changes, for one base.
        groups: how many; at most as many as there are adapters.
        seed: of the first centres (k-means++).
        restarts: runs from other centres.

    Raises:
        ConfigError: numbers that cannot be, or an adapter that changes nothing.
    """
    cosines = similarity(adapters)
    if not 1 <= groups <= len(adapters) or restarts < 1:
        raise ConfigError(f"{len(adapters)} adapters make 1 to {len(adapters)} groups in 1 run or more, got {groups}")
    values, vectors = torch.linalg.eigh(cosines)
    points = vectors * values.clamp_min(0).sqrt()  # (n, n), the rows have the inner products of the changes
    generator = torch.Generator().manual_seed(seed)
    runs = (_lloyd(points, _starts(points, groups, generator)) for _ in range(restarts))
    labels, spread = min(runs, key=lambda run: run[1])
    order: dict[int, int] = {}
    return Clusters(tuple(order.setdefault(label, len(order)) for label in labels.tolist()), cosines, spread)


def _starts(points: Tensor, groups: int, generator: torch.Generator) -> Tensor:
    """Return the first centres (k, n): each next one is drawn with the squared distance to the nearest so far."""
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    while len(chosen) < groups:
        far = torch.cdist(points, points[chosen]).amin(1).square()
        far[chosen] = 0.0
        if far.sum() <= 0:  # copies: any other will do
            far = torch.ones(len(points), dtype=points.dtype)
            far[chosen] = 0.0
        chosen.append(int(torch.multinomial(far, 1, generator=generator)))
    return points[chosen].clone()


def _lloyd(points: Tensor, centres: Tensor) -> tuple[Tensor, float]:
    """Return labels (n,) and the sum of squared distances when no point moves to another centre any more."""
    labels = torch.full((len(points),), -1)
    while True:
        distances = torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist").square()
        near = distances.argmin(1)
        for group in range(len(centres)):  # an empty group takes the point that is farthest from its own centre
            if not (near == group).any():
                sizes = torch.bincount(near, minlength=len(centres))
                own = distances.gather(1, near[:, None])[:, 0].masked_fill(sizes[near] == 1, -1.0)
                near[own.argmax()] = group
        if torch.equal(near, labels):
            break
        labels = near
        centres = torch.stack([points[labels == group].mean(0) for group in range(len(centres))])
    means = torch.stack([points[labels == group].mean(0) for group in range(len(centres))])
    return labels, float((points - means[labels]).square().sum())
