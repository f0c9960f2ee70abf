"""Scores of labelled examples: the loss of each row, whatever the batches they come in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..compat.models import generates, is_encoder_decoder
from ..errors import ConfigError

Batch = Mapping[str, Any]  # arguments of the model's forward


def base_of(model: nn.Module) -> nn.Module:
    """Return the base model inside a PeftModel."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def inputs_of(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Return the arguments of a forward without a loss of its own, in which routers see no more than with the labels.

    Encoder-decoder models keep their labels, of which they make the inputs of the decoder.
    """
    base, labels = base_of(model), batch.get("labels")
    if not isinstance(labels, Tensor) or is_encoder_decoder(base):
        return dict(batch)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if generates(base) and labels.dim() == 2:  # decisions per prompt read no answer
        inputs.setdefault("prompt_mask", (labels != -100).long().cumsum(1) == 0)
    return inputs


def labelled(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits (B, T, C), labels (B, T) and bool (B, T) of what is labelled, each label at its logits.

    Args:
        model: a wrapped model whose outputs have logits, per token or per row.
        batch: with `labels`; -100 is not counted.

    Raises:
        ConfigError: there are no labels, or they do not fit the logits.
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        raise ConfigError("examples need labels: give mappings of the model's arguments with 'labels' among them")
    base = base_of(model)
    logits = getattr(model(**inputs_of(model, batch)), "logits", None)
    if not isinstance(logits, Tensor):
        raise ConfigError(
            f"{type(base).__name__} gives no logits to compare with labels; pass a function that scores it"
        )
    logits = logits.float()
    # by what the model does, not by its `loss_type`, which is unset in models that then shift by default (GPT-2)
    if logits.dim() == labels.dim() + 1 == 3 and generates(base) and not is_encoder_decoder(base):
        logits, labels = logits[:, :-1], labels[:, 1:]
    if logits.dim() == 2 and labels.dim() == 1:
        logits, labels = logits[:, None], labels[:, None]
    if logits.shape[:-1] != labels.shape:
        raise ConfigError(f"labels {tuple(labels.shape)} do not fit logits {tuple(logits.shape)}")
    return logits, labels, labels != -100


def row_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Return (B,): the mean cross-entropy over the labels of each row; with its gradient where that is switched on."""
    logits, labels, counted = labelled(model, batch)
    each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    return each.view(labels.shape).sum(1) / counted.sum(1).clamp_min(1)


@torch.no_grad()
def row_matches(model: nn.Module, batch: Batch) -> Tensor:
    """Return (B,) bool: whether the likeliest token is right at every label of a row (exact match, teacher-forced)."""
    logits, labels, counted = labelled(model, batch)
    return ((logits.argmax(-1) == labels) | ~counted).all(1)


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Return the mean of `row_losses` over all rows of all batches: how rows are batched does not change it."""
    if not batches:
        raise ConfigError("there are no examples to score")
    return float(torch.cat([row_losses(model, batch) for batch in batches]).double().mean())
