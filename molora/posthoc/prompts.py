"""Routers that choose once per request, from its text: embedders, selections, and how a selection reaches a mixture.

Such a router is an object beside the model: it turns prompts into gates (B, 1, E), which are pinned for the forwards
of those prompts. A selection of zeros is an abstention: the base model answers alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..control import pin, tuner_of
from ..errors import ConfigError, LoadError
from .base import refuse_shared
from .rerouting import expert_names

Embedder = Callable[[Sequence[str]], Any]  # texts -> (N, D), as a tensor, an array or lists


@dataclass(frozen=True)
class Selection:
    """What was chosen for B prompts.

    Attributes:
        gates: (B, 1, E), zero in the rows that abstain.
        scores: (B, E), what was compared; -inf for experts that could not be chosen.
        abstained: (B,) bool.
    """

    gates: Tensor
    scores: Tensor
    abstained: Tensor


def embedded(embed: Embedder, texts: Sequence[str]) -> Tensor:
    """Return the vectors (N, D) of texts, float32, on the CPU.

    Raises:
        ConfigError: the embedder returned something else, or NaN or Inf.
    """
    vectors = embed(list(texts))
    vectors = (vectors if isinstance(vectors, Tensor) else torch.as_tensor(vectors)).detach().float().cpu()
    if vectors.dim() != 2 or len(vectors) != len(texts) or not vectors.shape[1]:
        raise ConfigError(
            f"the embedder returned shape {tuple(vectors.shape)} for {len(texts)} texts, not (texts, size)"
        )
    if not torch.isfinite(vectors).all():
        raise ConfigError("the embedder returned NaN or Inf")
    return vectors


def cosines(these: Tensor, those: Tensor) -> Tensor:
    """Return (N, M) cosines of vectors (N, D) with vectors (M, D); 0 for a vector of zeros."""
    if these.shape[1] != those.shape[1]:
        raise ConfigError(
            f"vectors of size {these.shape[1]} and {those.shape[1]} do not compare; use one embedder for both"
        )
    return F.normalize(these, dim=-1) @ F.normalize(those, dim=-1).t()


class PromptRouter:
    """A router that chooses experts for whole prompts; subclasses say how prompts are scored.

    Args:
        names: of the experts, in the order of their slots.
        top_k: how many experts act; their gates are the softmax of their scores / temperature, 1.0 for one expert.
        temperature: see top_k.
        min_score: prompts whose best score is below it abstain.
    """

    def __init__(
        self, names: Sequence[str], *, top_k: int = 1, temperature: float = 1.0, min_score: float | None = None
    ) -> None:
        if not 1 <= top_k <= len(names):
            raise ConfigError(f"top_k must be between 1 and the {len(names)} experts, got {top_k}")
        if not temperature > 0:
            raise ConfigError(f"temperature must be positive, got {temperature}")
        self.names, self.top_k = list(names), top_k
        self.temperature, self.min_score = float(temperature), min_score

    def scores(self, prompts: Sequence[str]) -> Tensor:
        """Return (B, E) scores of prompts; -inf for experts that cannot be chosen."""
        raise NotImplementedError

    def select(self, prompts: Sequence[str]) -> Selection:
        """Choose experts for each of B prompts."""
        return self.choose(self.scores(prompts))

    def choose(self, scores: Tensor) -> Selection:
        """Choose experts by scores (B, E); ties go to the first expert."""
        order = scores.argsort(dim=-1, descending=True, stable=True)[:, : self.top_k]
        kept = torch.full_like(scores, -torch.inf).scatter(-1, order, scores.gather(-1, order))
        best = scores.amax(-1)
        abstained = ~(best > -torch.inf)
        if self.min_score is not None:
            abstained = abstained | (best < self.min_score)
        gates = torch.softmax(kept.masked_fill(abstained[:, None], 0.0) / self.temperature, -1)
        return Selection(gates.masked_fill(abstained[:, None], 0.0)[:, None], scores, abstained)

    @contextmanager
    def routing(self, model: nn.Module, prompts: Sequence[str], adapter: str = "default") -> Iterator[Selection]:
        """Let the experts that fit `prompts` act in every forward inside the block; one prompt per row of the batch.

        Raises:
            ConfigError: the experts of the mixture are not those of this router.
        """
        self.check(model, adapter)
        chosen = self.select(prompts)
        with pin(model, chosen.gates):
            yield chosen

    def check(self, model: nn.Module, adapter: str = "default") -> None:
        """Raise ConfigError when the experts of a mixture are not those of this router, in the same order."""
        refuse_shared(model, adapter)
        names = expert_names(model, adapter)
        if names != self.names:
            raise ConfigError(
                f"this router chooses among {self.names}, but adapter '{adapter}' has the experts {names}"
            )

    def attach(self, model: nn.Module, adapter: str = "default") -> nn.Module:
        """Keep this router with a mixture, where `prompted` finds it; returns the model. It is not saved with it."""
        self.check(model, adapter)
        tuner_of(model).__dict__.setdefault("prompt_routers", {})[adapter] = self
        return model

    @property
    def choosing(self) -> dict[str, Any]:
        """The options of this class, as they were given."""
        return {"top_k": self.top_k, "temperature": self.temperature, "min_score": self.min_score}


def prompt_router(model: nn.Module, adapter: str = "default") -> PromptRouter:
    """Return the prompt router that is kept with a mixture; raise ConfigError when there is none."""
    found = tuner_of(model).__dict__.get("prompt_routers", {}).get(adapter)
    if found is None:
        raise ConfigError(
            f"adapter '{adapter}' has no router for prompts; see molora.posthoc.retrieval and router_retriever"
        )
    return found


@contextmanager
def prompted(model: nn.Module, prompts: Sequence[str], adapter: str = "default") -> Iterator[Selection]:
    """Let the mixture's own prompt router choose the experts for every forward inside the block."""
    with prompt_router(model, adapter).routing(model, prompts, adapter) as chosen:
        yield chosen


def write_router(path: str | Path, kind: str, embed: Embedder, told: Mapping[str, Any], **tensors: Tensor) -> Path:
    """Write a prompt router to one .safetensors file: its tensors, and what else it was made with; not the embedder."""
    file, told = Path(path), {**told, "embedder": getattr(embed, "name", None)}
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.new")
    try:
        parts = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(parts, draft, {"format": "pt", "molora": kind, "router": json.dumps(told)})
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)
    return file


def read_router(path: str | Path, kind: str, embed: Embedder, make: Callable[..., Any]) -> Any:
    """Return `make(embed=..., **told, **tensors)` for a file that `write_router` has written.

    Raises:
        LoadError: the file is damaged, holds something else, or belongs to another embedder.
    """
    try:
        with safe_open(path, "pt") as content:
            metadata = content.metadata() or {}
            if metadata.get("molora") != kind:
                raise LoadError(f"'{path}' is in format {metadata.get('molora')!r}; this router reads '{kind}'")
            told = json.loads(metadata["router"])
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118  (not a dict)
        wanted, mine = told.pop("embedder"), getattr(embed, "name", None)
        if wanted != mine:
            raise LoadError(f"'{path}' was made with embedder {wanted!r}, but this one is called {mine!r}")
        if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
            raise LoadError(f"'{path}' holds NaN or Inf")
        return make(embed=embed, **told, **tensors)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, LoadError):
            raise
        raise LoadError(f"'{path}' holds no router: {error}") from None


class MeanEmbedder:
    """Sentence vectors from a transformer: the mean of the last hidden states over real tokens.

    Args:
        model: an encoder; a molora mixture over one computes with the base alone unless `experts`.
        tokenizer: of the model.
        experts: let the experts of a mixture act.
        max_length: tokens per text.
        batch_size: texts at once.
        name: what the embedder is called.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        experts: bool = False,
        max_length: int = 128,
        batch_size: int = 32,
        name: str | None = None,
    ) -> None:
        self.model, self.tokenizer, self.experts = model, tokenizer, experts
        self.max_length, self.batch_size, self.name = max_length, batch_size, name

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors (N, D)."""
        found = [self._batch(list(texts[i : i + self.batch_size])) for i in range(0, len(texts), self.batch_size)]
        return torch.cat(found) if found else torch.zeros(0, 0)

    @torch.no_grad()
    def _batch(self, texts: list[str]) -> Tensor:
        options = {"padding": True, "truncation": True, "max_length": self.max_length, "return_tensors": "pt"}
        batch = self.tokenizer(texts, **options).to(next(self.model.parameters()).device)
        was_training = self.model.training
        self.model.eval()
        try:
            if self.experts or not hasattr(self.model, "disable_adapter"):
                states = self._states(batch)
            else:
                with self.model.disable_adapter():
                    states = self._states(batch)
        finally:
            self.model.train(was_training)
        mask = batch["attention_mask"][..., None].to(states)
        return F.normalize(((states * mask).sum(1) / mask.sum(1).clamp_min(1.0)).float().cpu(), dim=-1)

    def _states(self, batch: Any) -> Tensor:
        outputs = self.model(**batch, output_hidden_states=True)
        return outputs.hidden_states[-1]
