"""Retrieval: the expert whose training examples are nearest to the prompt answers it.

A baseline of PHATGOOSE (arXiv 2402.05859): up to 1000 examples per task are embedded by all-MiniLM-L6-v2 (their text
is the answer options and the input), and a prompt goes to the expert that owns its nearest neighbour by cosine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from .base import slot_of, slots_of
from .prompts import Embedder, PromptRouter, cosines, embedded, read_router, write_router
from .registry import posthoc_routers
from .rerouting import expert_names

LIMIT = 1000  # examples per expert
FORMAT = "molora-retrieval-1"


class Retrieval(PromptRouter):
    """Routes prompts by their nearest examples.

    Args:
        names: of the experts.
        embed: texts -> vectors (N, D).
        examples: (P, D), the vectors of all examples.
        owner: (P,) long, the slot of the expert that each example belongs to.
        neighbours: an expert's score is the mean over its so many nearest examples; 1: the nearest (the authors).
        options: `top_k`, `temperature`, `min_score` of PromptRouter.
    """

    def __init__(
        self,
        names: Sequence[str],
        embed: Embedder,
        examples: Tensor,
        owner: Tensor,
        *,
        neighbours: int = 1,
        **options: float | None,
    ) -> None:
        super().__init__(names, **options)  # type: ignore[arg-type]
        if neighbours < 1:
            raise ConfigError(f"neighbours must be at least 1, got {neighbours}")
        if examples.dim() != 2 or owner.shape != examples.shape[:1] or not len(owner):
            raise ConfigError(
                f"retrieval needs examples (P, D) and their owners, got {tuple(examples.shape)}, {tuple(owner.shape)}"
            )
        slot_of(self.names, int(owner.max()))
        self.embed, self.neighbours = embed, neighbours
        self.examples, self.owner = F.normalize(examples.float(), dim=-1), owner.long()

    def scores(self, prompts: Sequence[str]) -> Tensor:
        """Return (B, E): the cosine with the nearest examples of each expert; -inf for an expert without examples."""
        near = cosines(embedded(self.embed, prompts), self.examples)  # (B, P)
        found = torch.full((len(near), len(self.names)), -torch.inf)
        for slot in self.owner.unique().tolist():
            mine = near[:, self.owner == slot]
            found[:, slot] = mine.topk(min(self.neighbours, mine.shape[1]), dim=-1).values.mean(-1)
        return found

    def save(self, path: str | Path) -> Path:
        """Write the examples' vectors to a .safetensors file; the embedder is not part of it."""
        told = {"names": self.names, "neighbours": self.neighbours, **self.choosing}
        return write_router(path, FORMAT, self.embed, told, examples=self.examples, owner=self.owner)

    @classmethod
    def load(cls, path: str | Path, embed: Embedder) -> Retrieval:
        """Read a saved router; raise LoadError when it is damaged or belongs to another embedder."""
        return read_router(path, FORMAT, embed, cls)


@posthoc_routers.register("retrieval")
def build(
    model: nn.Module,
    adapter: str = "default",
    *,
    embed: Embedder,
    examples: Mapping[int | str, Sequence[str]],
    limit: int = LIMIT,
    neighbours: int = 1,
    top_k: int = 1,
    temperature: float = 1.0,
    min_score: float | None = None,
) -> nn.Module:
    """Give a mixture a retrieval router.

    Its weights stay as they are: `with molora.posthoc.prompted(model, prompts): model.generate(...)` pins the gates.

    Args:
        model: a wrapped model.
        adapter: the name of the mixture.
        embed: texts -> vectors (N, D), such as a `MeanEmbedder` or `SentenceTransformer.encode`.
        examples: number or name of an expert -> texts of its data. Experts without examples are never chosen.
        limit: at most so many examples per expert, spread evenly over those that are given.
        neighbours, top_k, temperature, min_score: see `Retrieval` and `PromptRouter`.

    Returns:
        The model.

    Raises:
        ConfigError: unknown experts, no examples, or vectors that are none.
    """
    names = expert_names(model, adapter)
    slots = slots_of(names, list(examples))
    vectors, owner = [], []
    for slot, texts in zip(slots, examples.values(), strict=True):
        kept = list(texts)
        if len(kept) > limit:
            kept = [kept[int(i * len(kept) / limit)] for i in range(limit)]
        if kept:
            vectors.append(embedded(embed, kept))
            owner += [slot] * len(kept)
    if not vectors:
        raise ConfigError("retrieval needs examples of at least one expert")
    options = {"top_k": top_k, "temperature": temperature, "min_score": min_score}
    router = Retrieval(names, embed, torch.cat(vectors), torch.tensor(owner), neighbours=neighbours, **options)
    return router.attach(model, adapter)
