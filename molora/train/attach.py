"""attach: what a Trainer must do for molora that hooks on the model cannot.

Hooks see the loss only when the model computes it. With label smoothing, a `compute_loss_func`, or a trainer that
builds its loss from logits, the loss is formed outside; `attach(trainer)` adds the auxiliary loss there, with the same
scaling, and runs the batch as often as an `objective` wants. It also moves schedules and prices with the optimizer's
steps.

Routers that are trained by a loss of their own (RoMA, preferences) bring a tuner, which makes the loss of each batch
from the batch itself: `attach(trainer, tuner)`.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..compat.models import labels_are_shifted, loss_is_shifted
from ..compat.trainer import accumulation_left_to_the_loss, keep_columns, world_size_of
from ..control import set_progress, settle, trace_of, tuner_of
from ..errors import ConfigError, raise_all
from ..hooks import OWN_ARGUMENTS
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


class Tuner(Protocol):
    """What trains routers by a loss of its own: `molora.posthoc.roma.Roma`, `molora.posthoc.mol_moe.PreferenceTuner`.

    It may also have `begin_epoch(batches)`, which is called with the training data, in order, when an epoch begins.

    Attributes:
        model: the wrapped model that it tunes.
        columns: of the data, beside the arguments of the model.
    """

    model: nn.Module
    columns: tuple[str, ...]

    def batch_loss(self, batch: Any) -> Tensor:
        """Return the training loss of a batch, a mean over its rows, auxiliary losses included or still pending."""

    def report(self) -> dict[str, float]:
        """Return what is worth logging beside the loss."""


class EpochCallback(TrainerCallback):
    """Shows a tuner the training data whenever an epoch begins."""

    def __init__(self, trainer: Any, tuner: Any) -> None:
        self.trainer, self.tuner = trainer, tuner

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Run through the training data in order; the order of training, and its random numbers, are left alone."""
        with torch.random.fork_rng():  # a loader draws a number when it begins
            batches = self.trainer.get_test_dataloader(self.trainer.train_dataset)
            self.tuner.begin_epoch(self.trainer._prepare_inputs(batch) for batch in batches)


def attach(trainer: Any, tuner: Tuner | None = None) -> Any:
    """Make a Trainer add the auxiliary loss to whatever loss it forms, and drive schedules and prices.

    Works for Trainer and its subclasses (TRL) by wrapping this instance's `compute_loss`. Calling it twice does nothing
    more.

    Args:
        trainer: a transformers Trainer whose model was wrapped by molora.
        tuner: makes the training loss in place of the trainer; evaluation is the trainer's as before. Its columns are
            kept in the data, and what it reports is logged.

    Returns:
        The same trainer.

    Raises:
        ConfigError: the tuner is of another model, cannot be used in this trainer, or comes too late.
    """
    if getattr(trainer, "_molora_attached", False):
        if tuner is not None and trainer._molora_tuner is not tuner:
            raise ConfigError("this trainer is attached already, without this tuner; call attach(trainer, tuner) once")
        return trainer
    if tuner is not None:
        _check_tuner(trainer, tuner)
        _serve_tuner(trainer, tuner)
    trace = trace_of(trainer.model)
    inner = trainer.compute_loss
    base = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    shifted = labels_are_shifted(base)

    @functools.wraps(inner)
    def compute_loss(model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        total = kwargs.get("num_items_in_batch")
        if tuner is not None and model.training and torch.is_grad_enabled():
            parts = accumulation_left_to_the_loss(trainer, total)
            loss = tuner.batch_loss(inputs)
            loss = (trace.aux.add_to(loss) if trace.aux.pending else loss) / parts
            return (loss, {}) if return_outputs else loss
        if tuner is not None:  # the model knows its own arguments only
            inputs = {k: v for k, v in inputs.items() if k not in tuner.columns or k in OWN_ARGUMENTS}
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
    trainer._molora_attached, trainer._molora_tuner = True, tuner
    return trainer


def _check_tuner(trainer: Any, tuner: Tuner) -> None:
    """Raise ConfigError when a trainer cannot train by a tuner's loss; all problems at once."""
    problems = []
    if tuner_of(tuner.model) is not tuner_of(trainer.model):
        problems.append("the tuner was made for another model than the trainer's")
    if objective_of(trainer.model) is not None:
        problems.append(
            f"the adapter has the objective '{objective_of(trainer.model).name}' too; choose one of the two"
        )
    if trainer.accelerator.num_processes > 1 or trainer.args.n_gpu > 1:
        problems.append("it runs the model itself, past what averages gradients of several processes; train in one")
    if trainer.args.use_liger_kernel:
        problems.append("use_liger_kernel leaves out the logits that it needs; set it to False")
    raise_all(problems, ConfigError, "this tuner cannot train in this trainer")


def _serve_tuner(trainer: Any, tuner: Tuner) -> None:
    """Keep the columns that a tuner reads, show it the data, and log what it reports."""
    keep_columns(trainer, tuner.columns)
    if hasattr(tuner, "begin_epoch"):
        trainer.add_callback(EpochCallback(trainer, tuner))
    inner = trainer.log

    @functools.wraps(inner)
    def log(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        inner({**logs, **tuner.report()} if "loss" in logs else logs, *args, **kwargs)

    trainer.log = log
