"""Routers that look at token ids, or at nothing, instead of hidden states: hash, distilled and random scorers.

A scorer here decides by pushing the scores of all other experts so far down (by `FAR`) that softmax and sigmoid make
exact zeros of them; selectors, links and losses then work as usual.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError, RoutingError
from .features import Place
from .losses import Parts, losses, mean_over_tokens
from .scorers import scorers
from .types import Context, Routing

FAR = 1e4  # exp(-FAR) and sigmoid(-FAR) are 0 in float32
EVALUATIONS = ("mean", "token")


def ids_of(ctx: Context, vocab: int, who: str) -> Tensor:
    """Return the token ids (B, S) of a forward; raise RoutingError when there are none, or some are out of range."""
    ids = ctx.token_ids
    if ids is None:
        raise RoutingError(
            f"{who} routes by token ids, but none describe this layer's input; give the model input_ids instead of "
            "inputs_embeds, and leave out layers that do not see tokens with exclude_modules"
        )
    if not torch.compiler.is_compiling() and ids.numel() and int(ids.max()) >= vocab:
        raise RoutingError(f"token id {int(ids.max())} is out of range: {who} knows {vocab}; set vocab_size")
    return ids


def _vocabulary(place: Place | None, vocab_size: int | None, who: str) -> int:
    known = vocab_size if vocab_size is not None else place.vocab if place is not None else None
    if known is None or known < 1:
        raise ConfigError(f"{who} needs vocab_size, since the model does not tell how many token ids it knows")
    return known


def only(scores: Tensor, chosen: Tensor) -> Tensor:
    """Return scores (..., E) with all experts but the chosen (..., E) bool pushed down by FAR."""
    return torch.where(chosen, scores, scores - FAR)


def balanced_bins(counts: Sequence[float] | Tensor, bins: int, seed: int | None = None) -> Tensor:
    """Return the bin (V,) of each id: from the most frequent on, each goes to the bin that is lightest so far.

    No bin gets heavier than the mean plus the heaviest id. The balanced variant of Hash layers (arXiv 2106.04426),
    inferred from the abstract. Ties go to the id and to the bin with the lower number. A seed makes another table:
    ids are then ranked by their counts times a random number in [0.5, 1), which keeps the bound.
    """
    weights = torch.as_tensor(counts, dtype=torch.float64)
    ranks = weights
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        ranks = weights * (0.5 + 0.5 * torch.rand(len(weights), generator=generator, dtype=torch.float64, device="cpu"))
    table, load = torch.empty(len(weights), dtype=torch.long), [(0.0, number) for number in range(bins)]
    for token in ranks.argsort(descending=True, stable=True).tolist():
        weight, lightest = heapq.heappop(load)
        table[token] = lightest
        heapq.heappush(load, (weight + float(weights[token]), lightest))
    return table


@scorers.register("hash", given=("place",), has_gradient=False)
class Hash(nn.Module):
    """A fixed expert for each token id, from a random table: nothing is learned (Hash layers, arXiv 2106.04426).

    With `hashes: n` the experts are n groups of E / n, and an id has one expert in each group, by a table of its own;
    that reading of the paper's multi-hash (an expert cut into sub-matrices that are hashed apart) is inferred. Choose
    with `{name: top_k, k: n, normalise: sumk}`, so that every gate is 1. `balance` makes tables from token counts.

    Options:
        seed: of the tables; the same at every layer.
        hashes: how many experts an id has.
        vocab_size: how many ids there are; none asks the model.
    """

    table: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        seed: int = 42,
        hashes: int = 1,
        vocab_size: int | None = None,
        place: Place | None = None,
    ) -> None:
        super().__init__()
        if hashes < 1 or num_experts % hashes:
            raise ConfigError(f"scorer 'hash' needs hashes that divide the {num_experts} experts, got {hashes}")
        self.num_experts, self.hashes = num_experts, hashes
        vocab = _vocabulary(place, vocab_size, "scorer 'hash'")
        size = num_experts // hashes
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(size, (hashes, vocab), generator=generator, device="cpu")
        self.register_buffer("table", self._in_groups(drawn))

    def _in_groups(self, table: Tensor) -> Tensor:
        """Return a table (n, V) of numbers inside groups as numbers of experts."""
        first = torch.arange(self.hashes, device="cpu")[:, None] * (self.num_experts // self.hashes)
        return (table.cpu() + first).to(torch.int32)

    @torch.no_grad()
    def balance(self, counts: Sequence[float] | Tensor) -> None:
        """Make the tables even for token counts (V,); several tables rank the ids differently (see balanced_bins).

        Raises:
            ConfigError: not one count per id.
        """
        vocab = self.table.shape[1]
        if len(counts) != vocab:
            raise ConfigError(f"balance() needs one count per token id: {vocab}, got {len(counts)}")
        bins = self.num_experts // self.hashes
        tables = [balanced_bins(counts, bins, seed=number or None) for number in range(self.hashes)]
        self.table.copy_(self._in_groups(torch.stack(tables)))

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """Look up the ids of x (B, S, d) -> (B, S, E): 0 at their experts, -FAR elsewhere."""
        ids = ids_of(ctx, self.table.shape[1], "scorer 'hash'")
        experts = self.table[:, ids.to(self.table.device)].long().movedim(0, -1)
        chosen = torch.zeros(*ids.shape, self.num_experts, dtype=torch.bool, device=experts.device)
        return only(torch.zeros((), device=x.device), chosen.scatter(-1, experts, True).to(x.device))

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Put the experts in another order."""
        self.table.copy_(order.argsort().to(self.table)[self.table.long()])


def balance_hashes(model: nn.Module, counts: Sequence[float] | Tensor) -> None:
    """Make the tables of all hash routers of a model even for token counts (V,) of the training corpus.

    Raises:
        ConfigError: the model has no hash router, or not one count per id was given.
    """
    found = [module for module in model.modules() if isinstance(module, Hash)]
    if not found:
        raise ConfigError("balance_hashes() found no router with scorer: hash in this model")
    for scorer in found:
        scorer.balance(counts)


@scorers.register("random", given=("generator",), has_gradient=False)
class Random(nn.Module):
    """One expert drawn uniformly per router and forward, for the whole batch (THOR, arXiv 2110.04260).

    Choose with the selector `softmax`. The authors draw at inference too, per token or per sentence; here evaluation
    is deterministic, which is inferred.

    Options:
        evaluate: `mean` (all experts with weight 1 / E) or `token` (a fixed expert per token id).
    """

    experts: Tensor

    def __init__(self, dim: int, num_experts: int, *, evaluate: str = "mean") -> None:
        super().__init__()
        if evaluate not in EVALUATIONS:
            raise ConfigError(f"scorer 'random': evaluate {evaluate!r} is unknown; known: {', '.join(EVALUATIONS)}")
        self.evaluate, self.num_experts = evaluate, num_experts
        self.register_buffer("experts", torch.arange(num_experts, dtype=torch.int32))  # in the order of their numbers

    def forward(self, x: Tensor, ctx: Context, *, generator: torch.Generator | None = None) -> Tensor:
        """Return (B, S, E): 0 at the drawn expert and -FAR elsewhere; at inference as `evaluate` says."""
        zeros = x.new_zeros(self.num_experts)
        if ctx.training:
            number = torch.randint(self.num_experts, (1, 1), generator=generator, device=x.device)
        elif self.evaluate == "mean":
            return zeros.expand(*x.shape[:-1], -1)
        else:
            # multiplicative hashing: neighbouring ids do not get neighbouring experts
            ids = ids_of(ctx, 2**31, "scorer 'random' with evaluate: token").to(x.device)
            number = (ids * 2654435761 % 2**32 >> 12) % self.num_experts
        chosen = F.one_hot(self.experts.long()[number], self.num_experts).bool()
        return only(zeros, chosen).expand(*x.shape[:-1], -1)

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Put the experts in another order."""
        self.experts.copy_(order.argsort().to(self.experts)[self.experts.long()])


@scorers.register("distilled", given=("place", "notes"), follows_progress=True)
class Distilled(nn.Module):
    """A learned router that teaches a light one, which then decides alone and frozen (StableMoE, arXiv 2204.08396).

    Stage 1, the first `switch` of training: `s = C x`, and the expert of a token is the largest s. The light router
    `C^D Emb[id]` learns to predict it (loss `distillation`) and decides in evaluation already. Stage 2: the light
    router decides, with no gradient any more. In both the weight of the expert comes from s; choose with link: sigmoid
    and `{name: top_k, k: 1, normalise: none}`, which makes it the authors' `sigmoid(s)`.

    Options:
        width: of the light embedding.
        switch: the training progress at which stage 2 begins.
        vocab_size: how many ids there are; none asks the model.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        width: int = 50,
        switch: float = 0.1,
        vocab_size: int | None = None,
        place: Place | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= switch <= 1 or width < 1:
            raise ConfigError(f"scorer 'distilled' needs 0 <= switch <= 1 and width >= 1, got {switch} and {width}")
        self.switch = switch
        vocab = _vocabulary(place, vocab_size, "scorer 'distilled'")
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.embedding = nn.Parameter(torch.empty(vocab, width))
        self.light = nn.Parameter(torch.empty(num_experts, width))
        nn.init.orthogonal_(self.weight, gain=0.1)
        nn.init.normal_(self.embedding, std=width**-0.5)
        nn.init.orthogonal_(self.light, gain=0.1)

    def forward(self, x: Tensor, ctx: Context, *, notes: dict[str, Tensor] | None = None) -> Tensor:
        """Score x (B, S, d) -> (B, S, E); leaves `light` and `learned` scores (B, S, E) in the notes in stage 1."""
        scores = F.linear(x, self.weight)
        ids = ids_of(ctx, self.embedding.shape[0], "scorer 'distilled'").to(x.device)
        settled = ctx.progress >= self.switch
        if settled:
            light = F.linear(self.embedding.detach()[ids], self.light.detach())
        else:
            light = F.linear(self.embedding[ids], self.light)
            if notes is not None:
                notes["light"], notes["learned"] = light, scores
            scores = scores + 0 * light  # a gradient of zero without the loss: DDP waits for one from every process
            if ctx.training:
                return scores
        best = light.detach().argmax(-1, keepdim=True)
        return only(scores, torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True))

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Put the experts in another order."""
        self.weight.copy_(self.weight[order])
        self.light.copy_(self.light[order])


def _why_not_taught(router: Any) -> str | None:
    return None if isinstance(router.scorer, Distilled) else "it teaches the light router of scorer: distilled"


@losses.register(
    "distillation",
    at_balance=lambda experts: math.log(experts),
    given=("parts",),
    reads_notes=True,
    why_not=_why_not_taught,
)
def distillation(routing: Routing, ctx: Context, *, parts: Parts) -> Tensor:
    """Cross-entropy of the light router against the learned router's choice (StableMoE, arXiv 2204.08396).

    For scorer: distilled; 0 in its second stage, where nothing is learned any more. A mean over real tokens, where the
    authors sum over them.
    """
    notes = routing.notes or {}
    if "light" not in notes:
        return routing.scores.new_zeros(())
    wrong = F.cross_entropy(notes["light"].flatten(0, -2), notes["learned"].argmax(-1).flatten(), reduction="none")
    return mean_over_tokens(wrong.view(notes["light"].shape[:-1]), ctx.weights(notes["light"]))


@losses.register("centred_balance", at_balance=lambda experts: 0.0)
def centred_balance(routing: Routing, ctx: Context) -> Tensor:
    """Return `sum_e ((n_e - mean n) / mean n) mean_t(p_te if t chose e)`: 0 when the load is even (StableMoE).

    n_e counts choices, without gradient: the probs of overloaded experts are pushed down, of the others up. A mean
    over real tokens, where the authors' code (arXiv 2204.08396) sums over them.
    """
    weights, selected = ctx.weights(routing.probs), routing.selected.to(routing.probs.dtype)
    load = mean_over_tokens(selected, weights).detach()
    mean = load.mean()
    excess = (load - mean) / torch.where(mean > 0, mean, torch.ones_like(mean))
    return (excess * mean_over_tokens(routing.probs * selected, weights)).sum()
