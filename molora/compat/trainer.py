"""What transformers' Trainer does to columns and to losses behind the back of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def keep_columns(trainer: Any, names: Sequence[str]) -> None:
    """Let Trainer keep columns of the data that are no arguments of the model; it drops the others by default."""
    trainer._set_signature_columns_if_needed()
    trainer._signature_columns = list(dict.fromkeys([*trainer._signature_columns, *names]))


def accumulation_left_to_the_loss(trainer: Any, total: Any) -> int:
    """Return by what a mean over a micro-batch must be divided because Trainer does not (see its `training_step`)."""
    told = getattr(trainer, "loss_is_scaled_for_ga", None)
    scaled = (trainer.model_accepts_loss_kwargs and total is not None) or trainer.compute_loss_func is not None
    return trainer.current_gradient_accumulation_steps if (scaled if told is None else told) else 1


def world_size_of(trainer: Any) -> int:
    """Return the factor by which Trainer multiplies a token-normalised loss to undo DDP's averaging (else 1)."""
    if not trainer.args.average_tokens_across_devices:
        return 1
    if trainer.args.n_gpu > 1:
        return trainer.args.n_gpu
    processes = trainer.accelerator.num_processes
    return processes // trainer.get_tp_size() if hasattr(trainer, "get_tp_size") else processes
