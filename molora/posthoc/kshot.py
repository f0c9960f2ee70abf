"""K-shot selection (ROCKET, "Leveraging Open Knowledge", arXiv 2408.15915): which adapters help with K examples.

1. Every adapter answers the K examples: how many are right, and how likely it finds their rationales.
2. Of the best ones, the group that differs most is taken: over all groups, the smallest sum of |cos(dW_i, dW_j)|.
3. They become a mixture with a top-2 router by token, of which router and experts are trained, on the K examples and on
   further data near them (`nearest`, without near copies: `deduplicate`).

The cosine is that of the weight changes themselves, `<dW_1, dW_2> = sum((B_1^T B_2) * (A_1 A_2^T))`. The authors
compare A and B tensor by tensor, where one and the same change in two factorisations looks different.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..control import pin, routed_layers
from ..errors import ConfigError, raise_all
from .rerouting import expert_names, keep_experts, posthoc_routers, reroute
from .scoring import Batch, row_losses, row_matches

MOST_GROUPS = 1_000_000  # how many groups are compared one by one


@dataclass(frozen=True)
class Choice:
    """What a selection has seen and chosen; E experts.

    Attributes:
        names: of the experts.
        accuracy: (E,) the share of examples with every label right.
        perplexity: (E,) mean over rationales of exp(cross-entropy); none were given: all 1.
        similarity: (E, E) |cos| of the weight changes.
        shortlist: numbers of the best experts, best first.
        chosen: numbers of the experts of the group, best first.
    """

    names: tuple[str, ...]
    accuracy: Tensor
    perplexity: Tensor
    similarity: Tensor
    shortlist: tuple[int, ...]
    chosen: tuple[int, ...]


@torch.no_grad()
def similarity(model: nn.Module, adapter: str = "default") -> Tensor:
    """Return |cos(dW_i, dW_j)| over all layers of a mixture, (E, E) float64; an expert that does nothing is like none.

    No d_out x d_in matrix is formed: the work is of the size of all ranks squared.
    """
    total: Tensor | float = 0.0
    expert_names(model, adapter)
    for layer in routed_layers(model, adapter).values():
        bank = layer.molora_bank[adapter]
        A, B = (factor.double() for factor in bank.stack())
        own = F.one_hot(torch.arange(bank.num_experts).repeat_interleave(torch.tensor(bank.ranks))).to(A)  # (R, E)
        total = total + own.T @ ((B.T @ B) * (A @ A.T)) @ own * bank.scaling**2
    lengths = total.diagonal().clamp_min(0).sqrt()
    cosines = (total / (lengths[:, None] * lengths).clamp_min(1e-300)).abs().clamp_max(1.0)
    return cosines * ((lengths[:, None] > 0) & (lengths > 0))


@torch.no_grad()
def score_experts(
    model: nn.Module,
    examples: Sequence[Batch] = (),
    rationales: Sequence[Batch] = (),
    adapter: str = "default",
    *,
    score: Callable[[nn.Module], float] | None = None,
) -> tuple[Tensor, Tensor]:
    """Let every expert alone answer the examples.

    Args:
        model: a mixture.
        examples: batches whose labels are the answers, -100 elsewhere; a row is right when the likeliest token is, at
            every label, which is what greedy generation would answer.
        rationales: batches whose labels are the tokens of a rationale, -100 at the prompt.
        adapter: the name of the mixture.
        score: takes the place of the examples: of the model with one expert acting, a number in [0, 1].

    Returns:
        Accuracy (E,) and perplexity (E,), the mean over rows of exp(mean cross-entropy of the row); float64.
    """
    if bool(examples) == (score is not None):
        raise ConfigError("K-shot selection needs either examples (batches with labels), or a score")
    number = len(expert_names(model, adapter))
    was_training = model.training
    model.eval()
    accuracy, perplexity = torch.zeros(number, dtype=torch.float64), torch.ones(number, dtype=torch.float64)
    try:
        for expert in range(number):
            with pin(model, F.one_hot(torch.tensor(expert), number).float()):
                if score is not None:
                    accuracy[expert] = float(score(model))
                else:
                    accuracy[expert] = torch.cat([row_matches(model, batch) for batch in examples]).double().mean()
                if rationales:
                    losses = torch.cat([row_losses(model, batch) for batch in rationales]).double()
                    perplexity[expert] = losses.exp().mean()
    finally:
        model.train(was_training)
    return accuracy, perplexity


def rank(accuracy: Tensor, perplexity: Tensor, mix: float = 0.5) -> list[int]:
    """Return the experts, best first, by `(1 - mix) accuracy + mix / perplexity`; ties stay in order.

    How the authors weigh the two is not known to us; both lie in [0, 1] here, and at equal accuracy the likelier
    rationale wins, whatever the mix in (0, 1].
    """
    if not 0 <= mix <= 1:
        raise ConfigError(f"mix must be in [0, 1], got {mix}")
    score = (1 - mix) * accuracy + mix / perplexity
    return sorted(range(len(score)), key=lambda expert: -float(score[expert]))


def most_diverse(similar: Tensor, size: int, among: Sequence[int] | None = None) -> tuple[int, ...]:
    """Return the group of `size` experts with the smallest sum of similarities over its pairs; of equals, the first.

    Args:
        similar: (E, E).
        size: of the group.
        among: the experts to choose from, in order of preference; all by default.

    Raises:
        ConfigError: there are fewer experts than the group has, or too many groups to compare.
    """
    candidates = list(range(len(similar)) if among is None else among)
    groups = math.comb(len(candidates), size) if 1 <= size <= len(candidates) else 0
    if not 0 < groups <= MOST_GROUPS:
        reason = (
            f"there are {groups} of them; make a shorter list" if groups else f"there are {len(candidates)} experts"
        )
        raise ConfigError(f"cannot compare the groups of {size} experts: {reason}")
    rows = similar.tolist()
    pairs = itertools.combinations
    return min(pairs(candidates, size), key=lambda group: sum(rows[i][j] for i, j in pairs(group, 2)))


def select(
    model: nn.Module,
    examples: Sequence[Batch] = (),
    rationales: Sequence[Batch] = (),
    adapter: str = "default",
    *,
    score: Callable[[nn.Module], float] | None = None,
    shortlist: int = 8,
    size: int = 4,
    mix: float = 0.5,
) -> Choice:
    """Choose the experts of a mixture that help with K examples and differ most.

    Args:
        model: a mixture, as `molora.import_peft` makes it.
        examples: see `score_experts`; the authors use 50 rows.
        rationales: see `score_experts`; none leaves them out.
        adapter: the name of the mixture.
        score: see `score_experts`.
        shortlist: how many of the best experts are compared for difference.
        size: how many are chosen; 4 in the authors' code.
        mix: weight of the rationales, see `rank`.

    Raises:
        ConfigError: numbers that do not fit.
    """
    names = expert_names(model, adapter)
    if not 1 <= size <= min(shortlist, len(names)):
        raise ConfigError(
            f"size must be between 1 and shortlist {shortlist} and the number of experts {len(names)}, got {size}"
        )
    accuracy, perplexity = score_experts(model, examples, rationales, adapter, score=score)
    best = rank(accuracy, perplexity, mix if rationales else 0.0)[:shortlist]
    similar = similarity(model, adapter)
    return Choice(tuple(names), accuracy, perplexity, similar, tuple(best), most_diverse(similar, size, best))


@posthoc_routers.register("kshot")
def build(
    model: nn.Module,
    adapter: str = "default",
    *,
    examples: Sequence[Batch] | None = None,
    rationales: Sequence[Batch] = (),
    score: Callable[[nn.Module], float] | None = None,
    experts: Sequence[int] | None = None,
    shortlist: int = 8,
    size: int = 4,
    mix: float = 0.5,
    k: int = 2,
    train_experts: bool = True,
    losses: Sequence[dict[str, Any]] = (),
) -> nn.Module:
    """Keep the experts that K examples ask for, and route them by a linear top-k router by token, to be trained.

    Args:
        model: a mixture, as `molora.import_peft` makes it.
        adapter: the name of the mixture.
        examples, rationales, score, shortlist, size, mix: see `select`.
        experts: keep these instead of selecting.
        k: experts per token; 2 in the paper.
        train_experts: train the experts beside the router, as in the paper.
        losses: auxiliary losses, as in a recipe.

    Returns:
        The model, with only the experts that were kept; `experts.names` of its config says which. Its optimizer must be
        made anew.

    Raises:
        ConfigError: options that do not fit; nothing is changed.
    """
    names, problems = expert_names(model, adapter), []
    if sum(given is not None for given in (examples, score, experts)) != 1:
        problems.append("give either examples or a score to select by, or experts to keep")
    kept = size if experts is None else len(experts)
    if not 1 <= k <= min(kept, len(names)):
        problems.append(f"k must be between 1 and the number of experts that are kept, {kept}, got {k}")
    raise_all(problems, ConfigError, "K-shot selection cannot be made")
    if experts is None:
        numbers = {"shortlist": shortlist, "size": size, "mix": mix}
        chosen = select(model, examples or (), rationales, adapter, score=score, **numbers).chosen
    else:
        chosen = tuple(experts)
    keep_experts(model, chosen, adapter)
    selector = {"name": "top_k", "k": k, "normalise": "sum1"}
    frozen = {"frozen": [] if train_experts else "all"}
    reroute(model, adapter, scorer="linear", selector=selector, losses=list(losses), experts=frozen)
    return model


# --- data -------------------------------------------------------------------------------------------------------------


def nearest(shots: Tensor, pool: Tensor, count: int) -> list[int]:
    """Return the numbers of the `count` items of a pool nearest to the mean of the K shots, nearest first (Euclid).

    Args:
        shots: (K, d) embeddings; the authors take bge-m3's first token, with its instruction for retrieval.
        pool: (N, d) of the open data.
        count: how many; 1000 - K in the paper.
    """
    if shots.dim() != 2 or pool.dim() != 2 or shots.shape[1] != pool.shape[1] or not len(shots):
        raise ConfigError(f"embeddings must be (K, d) and (N, d), got {tuple(shots.shape)} and {tuple(pool.shape)}")
    distances = (pool.double() - shots.double().mean(0)).norm(dim=-1)
    return distances.argsort(stable=True)[:count].tolist()


def deduplicate(embeddings: Tensor, distance: float = 0.1) -> list[int]:
    """Return the numbers of the items to keep: each is dropped that is closer to a kept earlier one than `distance`.

    Args:
        embeddings: (N, d), in order of preference.
        distance: 1 - cos, 0.1 in the paper.
    """
    unit, kept = F.normalize(embeddings.double(), dim=-1), list[int]()
    for item in range(len(unit)):
        if not kept or float((unit[kept] @ unit[item]).max()) <= 1 - distance:
            kept.append(item)
    return kept
