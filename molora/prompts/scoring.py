"""How prompts are scored: the methods behind a prompt selector, each fitted on unit vectors of examples per adapter.

A method sees groups, one tensor (n, D) per adapter, and scores prompts (B, D) -> (B, E) in the order of the groups. It
knows nothing of names, rights or guards: `PromptSelector` fits it on the allowed groups alone, so that nothing of other
adapters can reach a score. Everything is deterministic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError
from .gathered import Gathered
from .registry import prompt_selectors

MODES = ("mean", "max")


class Method:
    """Scores prompts by examples.

    Attributes:
        temperature: of the softmax that turns scores into shares: of cosines, or of logarithms of probabilities.
    """

    temperature = 1.0

    def fit(self, groups: Sequence[Tensor]) -> None:
        """Learn from unit vectors (n, D) of each adapter's examples; every group has at least one."""
        raise NotImplementedError

    def score(self, vectors: Tensor) -> Tensor:
        """Return (B, E) for unit vectors (B, D), higher is better."""
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """Return what was learned."""
        raise NotImplementedError

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `state` returned."""
        raise NotImplementedError

    def rest(self) -> None:
        """Give up what can be made again at once, since it may not be asked for long; by default nothing."""


@prompt_selectors.register("centroid", scores="cosine")
class Centroid(Method):
    """The cosine with the mean of an adapter's examples."""

    temperature = 0.05

    def fit(self, groups: Sequence[Tensor]) -> None:
        """Keep each group's mean."""
        self.centroids = F.normalize(torch.stack([group.mean(0) for group in groups]), dim=-1)

    def score(self, vectors: Tensor) -> Tensor:
        """Return cosines."""
        return vectors @ self.centroids.t()

    def state(self) -> dict[str, Tensor]:
        """Return the unit centroids (E, D)."""
        return {"centroids": self.centroids}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back the centroids."""
        self.centroids = tensors["centroids"]


@prompt_selectors.register("knn", scores="probability")
class Knn(Method):
    """The share of an adapter in the votes of the nearest examples of all, the nearer the heavier (1 / distance).

    Args:
        neighbours: how many vote.
    """

    def __init__(self, *, neighbours: int = 10) -> None:
        if neighbours < 1:
            raise ConfigError(f"prompt selector 'knn': neighbours must be at least 1, got {neighbours}")
        self.neighbours = neighbours

    def fit(self, groups: Sequence[Tensor]) -> None:
        """Keep all examples."""
        self.examples = Gathered(groups)
        self.examples.rows()  # so that what this takes can be told
        self.owner = torch.repeat_interleave(torch.tensor([len(group) for group in groups]))
        self.number = len(groups)

    def score(self, vectors: Tensor) -> Tensor:
        """Return shares that add up to 1."""
        near = vectors @ self.examples.rows().t()
        cosine, index = near.topk(min(self.neighbours, near.shape[1]), dim=-1)
        distance = (2 - 2 * cosine.clamp(-1, 1)).sqrt()
        votes = 1 / (distance + 1e-3)  # an example that is the prompt itself outvotes hundreds, not all
        shares = torch.zeros(len(vectors), self.number).scatter_add_(-1, self.owner[index], votes)
        return shares / shares.sum(-1, keepdim=True)

    def state(self) -> dict[str, Tensor]:
        """Return the examples (N, D) and their owners (N,)."""
        return {"examples": self.examples.rows(), "owner": self.owner}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back the examples."""
        self.examples, self.owner = Gathered([tensors["examples"]]), tensors["owner"]
        self.number = int(self.owner.max()) + 1

    def rest(self) -> None:
        """Give up the matrix of the examples."""
        self.examples.rest()


@prompt_selectors.register("pilots", scores="cosine")
class Pilots(Method):
    """RouterRetriever (arXiv 2409.02685): the mean cosine with an adapter's pilots, which are centres of its examples.

    The paper's pilots are centres of the queries that an adapter answers best, one per dataset; here they are k-means
    centres of the adapter's examples. With one pilot this is `centroid`.

    Args:
        number: of pilots per adapter, at most as many as it has examples.
        mode: `mean` over an adapter's pilots as in the paper, or `max` as in its code.
        rounds: of k-means at most.
    """

    temperature = 0.05

    def __init__(self, *, number: int = 3, mode: str = "mean", rounds: int = 50) -> None:
        if number < 1 or rounds < 1:
            raise ConfigError(f"prompt selector 'pilots': number and rounds must be at least 1, got {number}, {rounds}")
        if mode not in MODES:
            raise ConfigError(f"prompt selector 'pilots': mode {mode!r} is unknown; known: {', '.join(MODES)}")
        self.number, self.mode, self.rounds = number, mode, rounds

    def fit(self, groups: Sequence[Tensor]) -> None:
        """Find each group's pilots."""
        found = [centres(group, self.number, self.rounds) for group in groups]
        self.pilots = F.normalize(torch.cat(found), dim=-1)
        self.owner = torch.repeat_interleave(torch.tensor([len(one) for one in found]))

    def score(self, vectors: Tensor) -> Tensor:
        """Return the mean, or the largest, cosine with each adapter's pilots."""
        near, number = vectors @ self.pilots.t(), int(self.owner.max()) + 1
        way = "mean" if self.mode == "mean" else "amax"
        index = self.owner.expand(len(near), -1)
        return torch.zeros(len(near), number).scatter_reduce(-1, index, near, way, include_self=False)

    def state(self) -> dict[str, Tensor]:
        """Return the unit pilots (P, D) and their owners (P,)."""
        return {"pilots": self.pilots, "owner": self.owner}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back the pilots."""
        self.pilots, self.owner = tensors["pilots"], tensors["owner"]


def centres(vectors: Tensor, number: int, rounds: int = 50) -> Tensor:
    """Return at most `number` k-means centres (P, D) of unit vectors by cosine; no draw decides anything.

    The first centre is the mean of all; each further one starts at the example that is farthest from those before.
    """
    if number == 1 or len(vectors) == 1:
        return vectors.mean(0, keepdim=True)
    first = int((vectors @ vectors.mean(0)).argmax())
    chosen = [first]
    nearest = vectors @ vectors[first]
    while len(chosen) < min(number, len(vectors)):
        far = int(nearest.argmin())
        if nearest[far] > 1 - 1e-6:
            break  # the rest are copies of what is chosen
        chosen.append(far)
        nearest = torch.maximum(nearest, vectors @ vectors[far])
    found, before = vectors[chosen], None
    for _ in range(rounds):
        mine = (vectors @ F.normalize(found, dim=-1).t()).argmax(-1)
        if before is not None and torch.equal(mine, before):
            break
        before = mine
        means = [vectors[mine == i].mean(0) if (mine == i).any() else found[i] for i in range(len(found))]
        found = torch.stack(means)
    return found


@prompt_selectors.register("classifier", scores="probability")
class Classifier(Method):
    """Multinomial logistic regression: the probability of each adapter; every adapter weighs the same in its fit.

    Minimises the mean cross entropy (mean over adapters of the mean over their examples) + l2 / 2 * (|W|^2 + |b|^2),
    which has one minimum, by L-BFGS in float64.

    Args:
        l2: the penalty.
        rounds: of L-BFGS at most.
    """

    def __init__(self, *, l2: float = 1e-3, rounds: int = 200) -> None:
        if not l2 > 0 or rounds < 1:
            raise ConfigError(
                f"prompt selector 'classifier': l2 must be positive and rounds at least 1, got {l2} and {rounds}"
            )
        self.l2, self.rounds = l2, rounds

    def fit(self, groups: Sequence[Tensor]) -> None:
        """Find the minimum."""
        x = torch.cat(list(groups)).double()
        sizes = torch.tensor([len(group) for group in groups])
        y = torch.repeat_interleave(sizes)
        share = (1.0 / (len(groups) * sizes.double()))[y]
        weight = torch.zeros(len(groups), x.shape[1], dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(len(groups), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [weight, bias],
            max_iter=self.rounds,
            tolerance_grad=1e-9,
            tolerance_change=1e-14,
            line_search_fn="strong_wolfe",
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = (share * F.cross_entropy(x @ weight.t() + bias, y, reduction="none")).sum()
            value = value + self.l2 / 2 * (weight.square().sum() + bias.square().sum())
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(loss)
        self.weight, self.bias = weight.detach(), bias.detach()

    def score(self, vectors: Tensor) -> Tensor:
        """Return probabilities."""
        return torch.softmax(vectors.double() @ self.weight.t() + self.bias, -1).float()

    def state(self) -> dict[str, Tensor]:
        """Return the weights (E, D) and biases (E,)."""
        return {"weight": self.weight, "bias": self.bias}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back weights and biases."""
        self.weight, self.bias = tensors["weight"], tensors["bias"]
