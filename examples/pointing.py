"""Pointing: a model with an adapter embeds a text, and the nearest of some frozen candidate vectors is its answer.

What the shipped library and its benchmark have in common: vectors, batches, scores, accuracy and training.
"""

from __future__ import annotations

import copy
import functools
import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import demo_tasks
import torch
from library_tasks import Row
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, BertModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import logging as transformers_logging

BASE = "sentence-transformers/all-MiniLM-L6-v2"
MAX_LENGTH = 32  # tokens of a text or a candidate
TEMPERATURE = 0.05  # divides cosines in the loss


class PointingBert(BertModel):
    """BERT, which with `candidates` (B, C, d) also says how near they are: logits (B, C), the cosines / TEMPERATURE."""

    def forward(self, *args: Any, candidates: Tensor | None = None, there: Tensor | None = None, **options: Any) -> Any:
        """Run BERT; without candidates, what it returns is BERT's own output."""
        output = super().forward(*args, **options)
        if candidates is None:
            return output
        vectors = mean_states(output.last_hidden_state, options["attention_mask"])
        logits = torch.einsum("bd,bcd->bc", vectors, candidates) / TEMPERATURE
        return SequenceClassifierOutput(logits=logits if there is None else logits.masked_fill(~there, -torch.inf))


def base_model() -> nn.Module:
    """Return the frozen MiniLM, in eval mode; a new one on every call."""
    return copy.deepcopy(_loaded())


@functools.lru_cache(maxsize=1)
def _loaded() -> nn.Module:
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # the pooler of the checkpoint is not used
    return PointingBert.from_pretrained(demo_tasks.minilm(), add_pooling_layer=False).eval()


def load_tokenizer() -> Any:
    """Return the tokenizer of MiniLM."""
    return AutoTokenizer.from_pretrained(demo_tasks.minilm())


def mean_vectors(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return unit vectors (B, d) of texts."""
    return mean_states(model(**inputs).last_hidden_state, inputs["attention_mask"])


def mean_states(states: Tensor, attention_mask: Tensor) -> Tensor:
    """Return unit vectors (B, d): the mean of states (B, S, d) over real tokens (B, S)."""
    mask = attention_mask[..., None].to(states)
    return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


@dataclass(frozen=True)
class Batch:
    """Rows as tensors.

    Attributes:
        inputs: of the model, for the texts (B, S).
        candidates: (B, C, d) unit vectors by the frozen base.
        there: (B, C) bool, False for candidates that a row does not have.
        answers: (B,).
        texts: the texts.
        order: (B,) places of the rows in what they were made from.
    """

    inputs: dict[str, Tensor]
    candidates: Tensor
    there: Tensor
    answers: Tensor
    texts: tuple[str, ...]
    order: tuple[int, ...]


class Pointer:
    """Turns rows into batches; every candidate is embedded once, by the frozen base.

    Args:
        base: the frozen encoder, without adapters.
        tokenizer: of it.
    """

    def __init__(self, base: nn.Module, tokenizer: Any) -> None:
        self.base, self.tokenizer = base, tokenizer
        self._known: dict[str, Tensor] = {}

    def tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return inputs of the model, padded to the longest text."""
        found = self.tokenizer(list(texts), padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    @torch.no_grad()
    def vectors(self, texts: Iterable[str]) -> Tensor:
        """Return the base's vectors (N, d) of texts."""
        texts = list(texts)
        new = sorted({text for text in texts if text not in self._known}, key=lambda text: (len(text), text))
        for start in range(0, len(new), 64):
            some = new[start : start + 64]
            self._known.update(zip(some, mean_vectors(self.base, self.tokens(some)), strict=True))
        return torch.stack([self._known[text] for text in texts])

    def batch(self, rows: Sequence[Row], order: Sequence[int] | None = None) -> Batch:
        """Return rows as one batch."""
        most = max(len(row.options) for row in rows)
        vectors = torch.zeros(len(rows), most, self.base.config.hidden_size)
        there = torch.zeros(len(rows), most, dtype=torch.bool)
        for number, row in enumerate(rows):
            vectors[number, : len(row.options)] = self.vectors(row.options)
            there[number, : len(row.options)] = True
        answers, texts = torch.tensor([row.answer for row in rows]), tuple(row.text for row in rows)
        return Batch(self.tokens(texts), vectors, there, answers, texts, tuple(order or range(len(rows))))

    def batches(self, rows: Sequence[Row], size: int = 40) -> list[Batch]:
        """Return all rows in batches of texts of like length, which pads little."""
        places = sorted(range(len(rows)), key=lambda place: len(rows[place].text))
        parts = [places[start : start + size] for start in range(0, len(places), size)]
        return [self.batch([rows[place] for place in part], part) for part in parts]

    def endless(self, rows: Sequence[Row], size: int, seed: int) -> Iterator[Batch]:
        """Yield shuffled batches of rows again and again, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            places = torch.randperm(len(rows), generator=generator).tolist()
            for start in range(0, len(places) - size + 1, size):
                part = places[start : start + size]
                yield self.batch([rows[place] for place in part], part)


def cosines(model: nn.Module, batch: Batch) -> Tensor:
    """Return (B, C): the cosine of each text with its candidates; -inf where there is none."""
    found = torch.einsum("bd,bcd->bc", mean_vectors(model, batch.inputs), batch.candidates)
    return found.masked_fill(~batch.there, -torch.inf)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross-entropy of the answers."""
    return F.cross_entropy(cosines(model, batch) / TEMPERATURE, batch.answers)


@torch.no_grad()
def hits(model: nn.Module, batches: Sequence[Batch], around: Callable[[Batch], Any] | None = None) -> Tensor:
    """Return (N,) bool, which rows are answered right, in the order of the rows.

    Args:
        model: an encoder, with or without an adapter.
        batches: as `Pointer.batches` returns them.
        around: of a batch, a context in which the model is called: where the gates come from, for example.
    """
    model.eval()
    found = torch.zeros(sum(len(batch.answers) for batch in batches), dtype=torch.bool)
    for batch in batches:
        if around is None:
            right = cosines(model, batch).argmax(-1) == batch.answers
        else:
            with around(batch):
                right = cosines(model, batch).argmax(-1) == batch.answers
        found[list(batch.order)] = right
    return found


def fit(
    model: nn.Module,
    feed: Iterator[Batch],
    *,
    steps: int,
    lr: float,
    weight_decay: float = 0.01,
    warmup: float = 0.1,
    objective: Callable[[nn.Module, Batch], Tensor] = loss,
) -> list[float]:
    """Train what is trainable of a model; returns the loss of each step. The learning rate rises, then falls to 0."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=weight_decay)
    rising, seen = max(1, round(warmup * steps)), []
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / rising, (steps - step) / max(1, steps - rising))
        value = objective(model, next(feed))
        value.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(float(value.detach()))
    model.eval()
    return seen
