"""search: adapters by task, base and kind, by words, by what their descriptions mean, and by what they do.

Three ways to rank, one at a time: `text` by its words (index.py); `text` with an `embedder` by the cosine between it
and the descriptions; `like` by the cosine between the weight changes of two LoRAs, which is about what they do and not
about what is said of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..compat.layers import linear_sizes
from ..errors import ConfigError, LoadError
from ..fingerprint import differences, of_model
from .deltas import cosine, read_deltas
from .entry import Entry
from .index import Index
from .names import Ref

Embedder = Callable[[list[str]], Any]  # texts -> (N, d) numbers


class Library(Protocol):
    """What is searched: a `molora.hub.store.Hub`."""

    index: Index

    def list(self, *, all_versions: bool = False) -> list[Entry]:
        """Return the newest version of every adapter, or all versions."""

    def get(self, ref: str | Ref) -> Entry:
        """Return one adapter."""

    def folder(self, ref: Ref) -> Path:
        """Return the folder of a version, whose files are here then."""


@dataclass(frozen=True)
class Hit:
    """An adapter that was found.

    Attributes:
        entry: which.
        score: how well it fits, more is better; a cosine, a weight of words, or 1 when nothing ranks.
        by: what the score is: `words`, `meaning`, `deltas` or `filter`.
    """

    entry: Entry
    score: float
    by: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for programs."""
        return {"score": self.score, "by": self.by, **self.entry.to_dict()}


def search(
    hub: Library,
    text: str | None = None,
    *,
    task: str | None = None,
    base: str | nn.Module | None = None,
    kind: str | None = None,
    like: str | Ref | None = None,
    embedder: Embedder | None = None,
    embedder_name: str | None = None,
    all_versions: bool = False,
    limit: int = 20,
) -> list[Hit]:
    """Return undamaged adapters that fit, the best first.

    Args:
        hub: the library.
        text: words, any of which an adapter's name, task, description, data or prompts start with; with an embedder a
            sentence, whose meaning is compared.
        task: only of this task.
        base: only for this base model: its name, whole or after the last `/`, or a model, whose fingerprint counts
            where the card has one and whose name where not.
        kind: `lora` or `mixture`.
        like: a LoRA; others are ranked by the cosine of their weight changes with its own. Adapters that have no layer
            in common with it, and mixtures, are left out.
        embedder: texts -> (N, d). Embeddings in cards are used when they are of `embedder_name`; other descriptions
            are embedded now.
        embedder_name: of the embedder; by default its attribute `name`, if any.
        all_versions: also older versions.
        limit: at most so many.

    Raises:
        ConfigError: the arguments contradict each other.
        LoadError: `like` is damaged or no LoRA.
    """
    if text is not None and like is not None:
        raise ConfigError("search ranks by text or by like, not by both; leave one out")
    if embedder is not None and text is None:
        raise ConfigError("search with an embedder needs the text whose meaning is compared")
    if limit < 1:
        raise ConfigError(f"limit must be at least 1, got {limit}")
    entries = [entry for entry in hub.list(all_versions=all_versions) if not entry.problems]
    entries = [entry for entry in entries if _fits(entry, task, kind)]
    entries = _of_base(entries, base) if base is not None else entries
    if like is not None:
        scores, by = _by_deltas(hub, hub.get(like), entries), "deltas"
    elif embedder is not None:
        scores, by = _by_meaning(str(text), entries, embedder, embedder_name), "meaning"
    elif text is not None:
        scores, by = hub.index.find(text), "words"
    else:
        return [Hit(entry, 1.0, "filter") for entry in entries[:limit]]
    hits = [Hit(entry, scores[entry.ref], by) for entry in entries if entry.ref in scores]
    return sorted(hits, key=lambda hit: (-hit.score, hit.entry.ref))[:limit]


def _fits(entry: Entry, task: str | None, kind: str | None) -> bool:
    return (task is None or entry.card.task.casefold() == task.casefold()) and kind in (None, entry.kind)


def _of_base(entries: Sequence[Entry], base: str | nn.Module) -> list[Entry]:
    if isinstance(base, str):
        return [entry for entry in entries if _same_name(entry.card.base, base)]
    mine, weights = of_model(base, linear_sizes)
    name = getattr(getattr(base, "config", None), "_name_or_path", "") or ""
    return [
        entry
        for entry in entries
        if (
            not differences(entry.card.fingerprint, mine, weights)
            if entry.card.fingerprint is not None
            else bool(name) and _same_name(entry.card.base, name)
        )
    ]


def _same_name(ours: str, wanted: str) -> bool:
    ours, wanted = ours.rstrip("/").casefold(), wanted.rstrip("/").casefold()
    return ours == wanted or ("/" not in wanted and ours.rpartition("/")[2] == wanted)


def _by_deltas(hub: Library, wanted: Entry, entries: Sequence[Entry]) -> dict[Ref, float]:
    mine = read_deltas(wanted.folder)
    scores = {}
    for entry in entries:
        if entry.kind != "lora" or entry.ref == wanted.ref:
            continue
        folder = hub.folder(entry.ref)
        try:
            score = cosine(mine, read_deltas(folder))
        except LoadError:  # such as a LoRA on embeddings alone
            continue
        if score is not None:
            scores[entry.ref] = score
    return scores


def _by_meaning(text: str, entries: Sequence[Entry], embedder: Embedder, name: str | None) -> dict[Ref, float]:
    name = name or getattr(embedder, "name", None)
    stored = {e.ref: e.card.embedding.values for e in entries if e.card.embedding and e.card.embedding.embedder == name}
    fresh = [entry for entry in entries if entry.ref not in stored and entry.card.description]
    made = embed(embedder, [text, *(entry.card.description for entry in fresh)])
    scores = {}
    vectors = {**stored, **{entry.ref: vector for entry, vector in zip(fresh, made[1:], strict=True)}}
    for ref, vector in vectors.items():
        vector = torch.as_tensor(vector, dtype=torch.float64)
        if vector.shape != made[0].shape:
            raise ConfigError(
                f"the description of '{ref}' was embedded by '{name}' with {len(vector)} numbers, this embedder gives "
                f"{len(made[0])}; give it another embedder_name"
            )
        scores[ref] = float(torch.nn.functional.cosine_similarity(made[0], vector, dim=0))
    return scores


def embed(embedder: Embedder, texts: list[str]) -> Tensor:
    """Return what an embedder makes of texts, (N, d) in float64; raise ConfigError when it is something else."""
    made = embedder(texts)
    made = made.detach().cpu() if isinstance(made, Tensor) else made
    vectors = torch.as_tensor(made, dtype=torch.float64)
    if vectors.dim() != 2 or len(vectors) != len(texts) or not torch.isfinite(vectors).all():
        raise ConfigError(
            f"the embedder must return ({len(texts)}, d) finite numbers for {len(texts)} texts, got "
            f"{tuple(vectors.shape)}"
        )
    return vectors
