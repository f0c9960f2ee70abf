"""Encoder: prompts into vectors or class probabilities, by the base model or with adapters."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...compat.models import is_encoder_decoder
from ..backends.decoding import pad
from ..request import Program, ServeError
from .jobs import Lease
from .programs import Composer

POOLINGS = ("mean", "first", "last", "model")


@dataclass(eq=False)
class Encoding:
    """Prompts that wait to be encoded; to the engine's queue, an item like a job.

    Attributes:
        prompts: tokens.
        program: which experts act.
        pooling: one of POOLINGS; None: class probabilities.
        tenant: whose it is.
        result: gets (N, d) or (N, labels).
        lease, failure, watcher, backend: as of a job.
    """

    prompts: list[list[int]]
    program: Program
    pooling: str | None
    tenant: str
    result: Future[Tensor] = field(default_factory=Future)
    lease: Lease | None = None
    failure: ServeError | None = None
    watcher: None = None
    backend: None = None


@dataclass(frozen=True)
class Encoded:
    """What became of prompts.

    Attributes:
        values: (N, d) vectors of length 1, or (N, labels) probabilities.
        chosen: what a selector chose and why, where one was asked.
    """

    values: Tensor
    chosen: Mapping[str, Any] | None = None


class Encoder:
    """Runs a model once over whole prompts.

    Args:
        model: with the adapters inside; PEFT's wrapper will do.
        pad_id: any token; it fills rows up.
        max_batch: rows of one forward.
        composer: says which experts act.
    """

    def __init__(self, model: nn.Module, pad_id: int, max_batch: int, composer: Composer) -> None:
        self.model: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.pad_id, self.max_batch, self.composer = pad_id, max_batch, composer
        accepted = inspect.signature(self.model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._cacheless = {"use_cache": False} if "use_cache" in accepted else {}

    def steps(self, asked: Encoding) -> Iterator[Tensor | None]:
        """Run one forward after another; yield None, and at last the vectors or probabilities in the prompts' order.

        Raises:
            ServeError: the model cannot do what is asked.
        """
        order = sorted(range(len(asked.prompts)), key=lambda row: len(asked.prompts[row]))  # little padding
        parts = []
        for start in range(0, len(order), self.max_batch):
            rows = order[start : start + self.max_batch]
            prompts = [asked.prompts[row] for row in rows]
            with torch.inference_mode(), self.composer.acting([asked] * len(rows)):
                parts.append(self._vectors(prompts, asked.pooling) if asked.pooling else self._classes(prompts))
            if start + self.max_batch < len(order):
                yield None
        back = torch.tensor(sorted(range(len(order)), key=order.__getitem__))
        with torch.inference_mode():
            yield torch.cat(parts)[back]

    def _vectors(self, prompts: Sequence[Sequence[int]], pooling: str) -> Tensor:
        ids, mask = pad(prompts, self.pad_id, left=False, device=next(self.model.parameters()).device)
        if is_encoder_decoder(self.model):
            outputs = self.model.get_encoder()(input_ids=ids, attention_mask=mask, return_dict=True)
            hidden = outputs[0]
        else:
            outputs = self.model(
                input_ids=ids, attention_mask=mask, output_hidden_states=True, return_dict=True,
                **self._last_only, **self._cacheless,
            )  # fmt: skip
            hidden = outputs.hidden_states[-1]
        vectors = self._pooled(hidden.float(), mask, pooling, outputs)
        return torch.nn.functional.normalize(vectors, dim=-1).cpu()

    @staticmethod
    def _pooled(hidden: Tensor, mask: Tensor, pooling: str, outputs: Any) -> Tensor:
        """Return (B, d) of hidden states (B, S, d)."""
        if pooling == "mean":
            weights = mask[..., None].float()
            return (hidden * weights).sum(1) / weights.sum(1)
        if pooling == "first":
            return hidden[:, 0]
        if pooling == "last":
            return hidden[torch.arange(len(mask)), mask.sum(1) - 1]
        if getattr(outputs, "pooler_output", None) is None:
            raise ServeError("this model has no pooling of its own; use pooling 'mean'", param="pooling")
        return outputs.pooler_output.float()

    def _classes(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        labels = getattr(self.model.config, "num_labels", 0)
        if "Classification" not in type(self.model).__name__ or not labels:
            raise ServeError(f"{type(self.model).__name__} has no classes; serve a model for sequence classification")
        ids, mask = pad(prompts, self.pad_id, left=False, device=next(self.model.parameters()).device)
        logits = self.model(input_ids=ids, attention_mask=mask, return_dict=True).logits.float()
        many = getattr(self.model.config, "problem_type", None) == "multi_label_classification"
        return (logits.sigmoid() if many else logits.softmax(-1)).cpu()
