"""RouterRetriever (arXiv 2409.02685): one LoRA per domain over a text encoder, chosen per query by pilot embeddings.

For each training query the expert with the best metric (nDCG@10) is found; within each dataset the queries are grouped
by their best expert, and the centroid of each group's **base** embeddings is a pilot of that expert (at most T^2 of
them). A query goes to the expert of highest **mean** similarity over its pilots, as the paper says; the released code
takes the **max**, by dot product. They disagree where an expert owns scattered pilots.

The base encoder embeds the query to route it, the chosen expert embeds it for the search.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..control import pin
from ..errors import ConfigError, raise_all
from .base import slot_of
from .prompts import Embedder, MeanEmbedder, PromptRouter, Selection, cosines, embedded, read_router, write_router
from .registry import posthoc_routers
from .rerouting import expert_names

MODES = ("mean", "max")
SIMILARITIES = ("cosine", "dot")
TIES = ("first", "drop")
FORMAT = "molora-router-retriever-1"


def pilots_of(
    vectors: Tensor, quality: Tensor, groups: Sequence[str | int], *, ties: str = "first"
) -> tuple[Tensor, Tensor]:
    """Return pilots (P, D) and the expert (P,) of each, from the base embeddings of training queries.

    Args:
        vectors: (N, D), base embeddings.
        quality: (N, T), the metric of each expert on each query; higher is better.
        groups: N names of the dataset that each query comes from.
        ties: a query whose best metric several experts reach counts for the `first` of them (the paper), or not at all
            (`drop`): where all experts fail, the first would get every such query.
    """
    if ties not in TIES:
        raise ConfigError(f"ties {ties!r} is unknown; known: {', '.join(TIES)}")
    if vectors.dim() != 2 or quality.dim() != 2 or not len(vectors) == len(quality) == len(groups):
        raise ConfigError(
            f"pilots need vectors (N, D), quality (N, T) and N groups, got {tuple(vectors.shape)}, "
            f"{tuple(quality.shape)} and {len(groups)}"
        )
    best = quality.amax(-1, keepdim=True)
    winner = (quality == best).long().argmax(-1)
    counts = (quality == best).sum(-1) == 1 if ties == "drop" else torch.ones(len(quality), dtype=torch.bool)
    pilots, owner = [], []
    for group in dict.fromkeys(groups):
        here = torch.tensor([one == group for one in groups])
        for expert in range(quality.shape[1]):
            mine = here & counts & (winner == expert)
            if mine.any():
                pilots.append(vectors[mine].float().mean(0))
                owner.append(expert)
    if not pilots:
        raise ConfigError("no query has a best expert, so there are no pilots")
    return torch.stack(pilots), torch.tensor(owner)


class RouterRetriever(PromptRouter):
    """Routes queries by their similarity to the pilots of each expert.

    Args:
        names: of the experts.
        embed: texts -> base embeddings (N, D).
        pilots: (P, D).
        owner: (P,) long, the slot of the expert that each pilot belongs to.
        mode: `mean` over an expert's pilots, or `max`.
        similarity: `cosine` or `dot`.
        top_k, temperature, min_score: see PromptRouter.
    """

    def __init__(
        self,
        names: Sequence[str],
        embed: Embedder,
        pilots: Tensor,
        owner: Tensor,
        *,
        mode: str = "mean",
        similarity: str = "cosine",
        top_k: int = 1,
        temperature: float = 1.0,
        min_score: float | None = None,
    ) -> None:
        super().__init__(names, top_k=top_k, temperature=temperature, min_score=min_score)
        problems = [] if mode in MODES else [f"mode {mode!r} is unknown; known: {', '.join(MODES)}"]
        if similarity not in SIMILARITIES:
            problems.append(f"similarity {similarity!r} is unknown; known: {', '.join(SIMILARITIES)}")
        if pilots.dim() != 2 or owner.shape != pilots.shape[:1] or not len(owner):
            problems.append(f"pilots are (P, D) with an owner each, got {tuple(pilots.shape)} and {tuple(owner.shape)}")
        raise_all(problems, ConfigError, "this is no RouterRetriever")
        slot_of(self.names, int(owner.max()))
        self.embed, self.pilots, self.owner = embed, pilots.float(), owner.long()
        self.mode, self.similarity = mode, similarity

    def scores(self, prompts: Sequence[str]) -> Tensor:
        """Return (B, E); -inf for an expert without pilots."""
        return self.score_vectors(embedded(self.embed, prompts))

    def score_vectors(self, vectors: Tensor) -> Tensor:
        """Return (B, E) for base embeddings (B, D)."""
        if self.similarity == "cosine":
            near = cosines(vectors, self.pilots)
        else:
            near = vectors.float() @ self.pilots.t()
        found = torch.full((len(near), len(self.names)), -torch.inf)
        for slot in self.owner.unique().tolist():
            mine = near[:, self.owner == slot]
            found[:, slot] = mine.mean(-1) if self.mode == "mean" else mine.amax(-1)
        return found

    def without(self, expert: int | str) -> RouterRetriever:
        """Return the router without one expert: its pilots go, all others stay, and so do their scores."""
        kept = self.owner != slot_of(self.names, expert)
        if not kept.any():
            raise ConfigError(f"expert {expert!r} owns all pilots; a router needs some")
        options = {"mode": self.mode, "similarity": self.similarity, **self.choosing}
        return RouterRetriever(self.names, self.embed, self.pilots[kept], self.owner[kept], **options)

    def save(self, path: str | Path) -> Path:
        """Write the pilots to a .safetensors file; the embedder is not part of it."""
        told = {"names": self.names, "mode": self.mode, "similarity": self.similarity, **self.choosing}
        return write_router(path, FORMAT, self.embed, told, pilots=self.pilots, owner=self.owner)

    @classmethod
    def load(cls, path: str | Path, embed: Embedder) -> RouterRetriever:
        """Read a saved router; raise LoadError when it is damaged or belongs to another embedder."""
        return read_router(path, FORMAT, embed, cls)

    def encode(
        self,
        model: nn.Module,
        tokenizer: Any,
        texts: Sequence[str],
        *,
        adapter: str = "default",
        max_length: int = 128,
    ) -> tuple[Tensor, Selection]:
        """Return unit vectors (N, D) of texts, each from its own expert, and what was chosen."""
        self.check(model, adapter)
        chosen = self.select(texts)
        encoder = MeanEmbedder(model, tokenizer, experts=True, max_length=max_length, batch_size=max(1, len(texts)))
        with pin(model, chosen.gates):
            return encoder(texts), chosen


@posthoc_routers.register("router_retriever")
def build(
    model: nn.Module,
    adapter: str = "default",
    *,
    embed: Embedder,
    queries: Sequence[str],
    quality: Tensor,
    groups: Sequence[str | int] | None = None,
    mode: str = "mean",
    similarity: str = "cosine",
    ties: str = "first",
    top_k: int = 1,
    temperature: float = 1.0,
    min_score: float | None = None,
) -> nn.Module:
    """Give a mixture over a text encoder a RouterRetriever, which `molora.posthoc.prompt_router(model)` returns.

    Args:
        model: a wrapped encoder.
        adapter: the name of the mixture.
        embed: texts -> base embeddings (N, D), such as `MeanEmbedder(model, tokenizer)`.
        queries: N training queries.
        quality: (N, E), the metric of each expert on each query, such as nDCG@10.
        groups: the dataset of each query; none: one dataset.
        mode, similarity, top_k, temperature, min_score: see `RouterRetriever`.
        ties: see `pilots_of`.

    Returns:
        The model; `prompt_router(model).encode(model, tokenizer, texts)` embeds with it.

    Raises:
        ConfigError: tables or vectors that do not fit.
    """
    names = expert_names(model, adapter)
    if quality.dim() != 2 or quality.shape[1] != len(names):
        raise ConfigError(f"quality must be (queries, {len(names)} experts), got {tuple(quality.shape)}")
    groups = [""] * len(queries) if groups is None else groups
    pilots, owner = pilots_of(embedded(embed, queries), quality, groups, ties=ties)
    options = {"mode": mode, "similarity": similarity, "top_k": top_k, "temperature": temperature}
    return RouterRetriever(names, embed, pilots, owner, min_score=min_score, **options).attach(model, adapter)
