"""attach: what a Trainer must do for molora that hooks on the model cannot.

Hooks see the loss only when the model computes it. With label smoothing, a `compute_loss_func`, or a trainer that
builds its loss from logits, the loss is formed outside; `attach(trainer)` adds the auxiliary loss there, with the same
scaling, and runs the batch as often as an `objective` wants. It also moves schedules and prices with the optimizer's
steps.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from ..compat import labels_are_shifted, loss_is_shifted, world_size_of
from ..control import set_progress, settle, trace_of
from .objectives import objective_of, run


class ProgressCallback(TrainerCallback):
    """Tells schedules the progress of training, and prices that an optimizer step is over."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set progress to the share of steps that are done."""
        set_progress(self.model, min(1.0, state.global_step / max(1, state.max_steps)))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move prices, before anything is saved."""
        settle(self.model)


def attach(trainer: Any) -> Any:
    """Make a Trainer add the auxiliary loss to whatever loss it forms, and drive schedules and prices.

    Works for Trainer and its subclasses (TRL) by wrapping this instance's `compute_loss`. Calling it twice does nothing
    more.

    Args:
        trainer: a transformers Trainer whose model was wrapped by molora.

    Returns:
        The same trainer.
    """
    if getattr(trainer, "_molora_attached", False):
        return trainer
    trace = trace_of(trainer.model)
    inner = trainer.compute_loss
    base = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    shifted = labels_are_shifted(base)

    @functools.wraps(inner)
    def compute_loss(model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        total = kwargs.get("num_items_in_batch")
        # Trainer takes the labels out of the inputs, so count them first.
        share, labels = 1.0, inputs.get("labels")
        scaled = trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None
        if scaled and total is not None and isinstance(labels, Tensor):
            counted = labels[..., 1:] if shifted else labels
            share = (counted != -100).sum() / total * world_size_of(trainer)
        objective = objective_of(trainer.model) if model.training and torch.is_grad_enabled() else None
        with trace.gathering(hold=objective is not None):
            if objective is None:
                result = inner(model, inputs, return_outputs=return_outputs, **kwargs)
            else:
                # a copy each time, since Trainer takes labels out
                once = functools.partial(inner, model, return_outputs=True, **kwargs)
                result = run(trace, objective, lambda: once(dict(inputs)), labels, loss_is_shifted(base), share)
                result = result if return_outputs else result[0]
        loss, rest = (result[0], result[1:]) if isinstance(result, tuple) else (result, ())
        if model.training and trace.aux.pending:
            loss = trace.aux.add_to(loss, share)
        return (loss, *rest) if rest else loss

    trainer.compute_loss = compute_loss
    trainer.add_callback(ProgressCallback(trainer.model))
    trainer._molora_attached = True
    return trainer
