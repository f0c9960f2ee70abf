"""Whether a model's loss counts the tokens of the whole optimizer batch, as Trainer believes it does.

Trainer hands `num_items_in_batch` to every model whose forward takes extra keyword arguments, then does not divide the
loss by the number of accumulation steps, and multiplies it by the number of processes to undo DDP's averaging. Several
models (transformers' BertForSequenceClassification and T5 among them) take the argument and ignore it, so that their
task loss counts once per accumulation step and process.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn


def takes_loss_arguments(base: nn.Module) -> bool:
    """Tell whether Trainer hands `num_items_in_batch` to this base model; the rule is Trainer's own."""
    if hasattr(base, "accepts_loss_kwargs"):
        return bool(base.accepts_loss_kwargs)
    kinds = {parameter.kind for parameter in inspect.signature(base.forward).parameters.values()}
    return inspect.Parameter.VAR_KEYWORD in kinds


@torch.no_grad()
def ignores_token_count(model: nn.Module, base: nn.Module, batch: dict[str, Any]) -> bool:
    """Tell whether the loss of a model that is handed `num_items_in_batch` does not depend on it.

    Measured on one batch, in eval mode, where nothing random happens and no auxiliary loss is added.

    Args:
        model: what is called, wrapped or not.
        base: the base model inside it.
        batch: a batch with labels, on the model's device.
    """
    if not takes_loss_arguments(base):
        return False
    was_training = model.training
    model.eval()
    try:
        one, many = (float(model(**batch, num_items_in_batch=torch.tensor(n)).loss) for n in (1, 1000))
    finally:
        model.train(was_training)
    return one == many and one != 0
