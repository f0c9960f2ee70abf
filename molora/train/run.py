"""train(settings): a training run from recipe, base model and data to a saved adapter; what `molora train` calls.

transformers' Trainer does the training. Around it, this file decides what goes in, lets a killed run be resumed to
bit-equal weights, evaluates, and writes what disk.py lists.
"""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from ..checkpoint import save
from ..config import MoloraConfig
from ..control import report, set_progress
from ..errors import ConfigError
from .attach import attach
from .data import Collator, LabelMap, Task, encode_classification, encode_generation, load_tasks, split
from .disk import (
    LABELS,
    ROUTING,
    TRAINING,
    begin_run,
    check_output,
    mark_complete,
    prune,
    read_json,
    save_tokenizer,
    write_json,
)
from .evaluate import Adapter, Evaluation, evaluate
from .models import Base, load_base, load_config, longest, wrap_base
from .scaling import ignores_token_count
from .settings import DEFAULT_MAX_LENGTH, TrainSettings, resolve_recipe, run_facts, training_arguments
from .task_types import resolve_task_type

if TYPE_CHECKING:
    from datasets import Dataset

# Without an evaluation part, routing is looked at on this many training rows per task.
TRAINING_ROWS_LOOKED_AT = 200


@dataclass
class TrainResult:
    """What a run did.

    Attributes:
        output: the adapter's folder.
        metrics: per task, of the final evaluation; empty without an evaluation part.
        train_loss: mean over the steps of this process; None when there was nothing left to train.
        steps: optimizer steps in all.
        seconds: of training in this process.
        trainable, total: numbers of parameters.
        notes: what a user should be told.
    """

    output: Path
    metrics: dict[str, dict[str, float]]
    train_loss: float | None
    steps: int
    seconds: float
    trainable: int
    total: int
    notes: list[str] = field(default_factory=list)


class Checkpoints(TrainerCallback):
    """Marks each checkpoint as whole once everything in it is written, then deletes old ones.

    Trainer's own `save_total_limit` would delete the old ones first, and a kill in between would leave none.
    """

    def __init__(self, keep: int) -> None:
        self.keep = keep

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark the checkpoint that Trainer has just written."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            mark_complete(folder / f"checkpoint-{state.global_step}")
            prune(folder, self.keep)


def train(settings: TrainSettings, tell: Callable[[str], None] = lambda note: None) -> TrainResult:
    """Train an adapter and write it to `settings.output`.

    Args:
        settings: what to train on what.
        tell: called with each note before training begins; `TrainResult.notes` holds them too.

    Raises:
        ConfigError, DataError, LoadError: bad input, before anything is trained.
    """
    output = Path(settings.output).expanduser()
    check_output(output, resume=settings.resume, overwrite=settings.overwrite)
    tasks = load_tasks(settings.data, fields=settings.fields, kind=_kind(settings))
    config, train_mapping = resolve_recipe(settings.recipe, settings.set, len(tasks))
    base_config = load_config(settings.model)
    task_type = resolve_task_type(settings.task_type, tasks[0].kind, base_config)
    arguments = training_arguments(settings, train_mapping, output / "checkpoints")
    label_map = LabelMap.from_tasks(tasks) if task_type == "seq_cls" else None
    parts = [split(task.rows, settings.eval_fraction, settings.seed) for task in tasks]
    training = [Task(t.name, rows, t.kind) for t, (rows, _) in zip(tasks, parts, strict=True)]
    held_out = [Task(t.name, rows, t.kind) for t, (_, rows) in zip(tasks, parts, strict=True) if rows]

    # first of all random draws, so that a new head is the same in every run with this seed
    set_seed(settings.seed)
    base = load_base(
        settings.model,
        task_type,
        config=base_config,
        label_map=label_map,
        quantize=settings.quantize,
        dtype=settings.dtype,
    )
    max_length = _max_length(settings, base)
    facts = run_facts(settings, config, train_mapping, arguments, tasks) | {"max_length": max_length}
    model = wrap_base(base, config)
    data = _encode(base, training, label_map, max_length)
    start, notes = begin_run(output, facts, resume=settings.resume, overwrite=settings.overwrite)

    notes += base.notes
    if config.experts["frozen"] == "all":
        notes.append(
            "this recipe freezes all experts, and new ones change nothing, so neither will this adapter; make experts "
            "of finished LoRAs by molora.import_peft(model, [paths], recipe=...), and train that"
        )
    for note in notes:
        tell(note)

    trainer = _trainer(model, data, Collator(base.tokenizer), arguments, settings.keep)
    trained = _train(trainer, start)
    adapter = Adapter(model, base, [task.name for task in tasks], label_map, max_length)
    result = TrainResult(
        output=output,
        metrics={},
        steps=trainer.state.global_step,
        trainable=report(model).trainable,
        total=report(model).total,
        notes=notes,
        **trained,
    )
    if trainer.is_world_process_zero():
        _finish(settings, config, arguments, adapter, training, held_out, result)
    return result


def _kind(settings: TrainSettings) -> str | None:
    return "classification" if settings.task_type == "seq_cls" else None


def _max_length(settings: TrainSettings, base: Base) -> int:
    limit = longest(base.tokenizer, base.model.config)
    if settings.max_length is None:
        return min(DEFAULT_MAX_LENGTH, limit or DEFAULT_MAX_LENGTH)
    if limit is not None and settings.max_length > limit:
        raise ConfigError(f"max_length {settings.max_length} is more than the {limit} tokens that the model can take")
    return settings.max_length


def _encode(base: Base, tasks: Sequence[Task], label_map: LabelMap | None, max_length: int) -> Dataset:
    if label_map is not None:
        return encode_classification(tasks, base.tokenizer, label_map, max_length)
    return encode_generation(tasks, base.tokenizer, max_length, encoder_decoder=base.task_type == "seq2seq_lm")


def _trainer(model: PeftModel, data: Dataset, collator: Collator, arguments: TrainingArguments, keep: int) -> Trainer:
    trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=collator)
    if arguments.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
    attach(trainer)
    trainer.add_callback(Checkpoints(keep))
    if trainer.model_accepts_loss_kwargs:
        inner = model.get_base_model()
        probe = {k: v.to(inner.device) for k, v in collator([data[0]]).items() if k != "task_ids"}
        with model.disable_adapter():
            if ignores_token_count(inner, inner, probe):
                # its loss is a mean over the micro-batch whatever it is told, so Trainer must scale it (see scaling.py)
                trainer.model_accepts_loss_kwargs = False
    return trainer


def _train(trainer: Trainer, start: Path | None) -> dict[str, Any]:
    """Train to the end from a checkpoint or from the beginning; returns train_loss and seconds."""
    before = time.monotonic()
    if start is not None and _is_finished(trainer, start):
        # Trainer would train one more step
        trainer.model.load_adapter(str(start), "default", is_trainable=True)
        trainer.state.global_step = read_json(start / "trainer_state.json", "Trainer's state")["global_step"]
        return {"train_loss": None, "seconds": 0.0}
    output = trainer.train(resume_from_checkpoint=None if start is None else str(start))
    return {"train_loss": output.training_loss, "seconds": time.monotonic() - before}


def _is_finished(trainer: Trainer, checkpoint: Path) -> bool:
    state = read_json(checkpoint / "trainer_state.json", "Trainer's state")
    return state["global_step"] >= state["max_steps"]


def _finish(
    settings: TrainSettings,
    config: MoloraConfig,
    arguments: TrainingArguments,
    adapter: Adapter,
    training: Sequence[Task],
    held_out: Sequence[Task],
    result: TrainResult,
) -> None:
    """Evaluate, and write everything; training.json comes last."""
    output = result.output
    save(adapter.model, output)
    save_tokenizer(adapter.base.tokenizer, output)
    if adapter.label_map is not None:
        adapter.label_map.save(output / LABELS)
    set_progress(adapter.model, 1.0)
    evaluation = _evaluate(adapter, training, held_out, arguments.per_device_eval_batch_size)
    result.metrics = evaluation.tasks if held_out else {}
    write_json(output / ROUTING, {"data": "evaluation" if held_out else "training", **evaluation.usage.to_dict()})
    write_json(
        output / TRAINING,
        {
            "recipe": config.recipe or settings.recipe,
            "model": settings.model,
            "task_type": adapter.base.task_type,
            "tasks": adapter.tasks,
            "rows": {task.name: len(task.rows) for task in training},
            "max_length": adapter.max_length,
            "steps": result.steps,
            "train_loss": result.train_loss,
            "seconds": round(result.seconds, 3),
            "trainable_parameters": result.trainable,
            "parameters": result.total,
            "metrics": result.metrics,
            "notes": result.notes,
            "settings": dataclasses.asdict(settings),
            "training_arguments": arguments.to_sanitized_dict(),
            "versions": versions(),
        },
    )


def _evaluate(adapter: Adapter, training: Sequence[Task], held_out: Sequence[Task], size: int) -> Evaluation:
    if held_out:
        return evaluate(adapter, held_out, batch_size=size)
    seen = [Task(task.name, task.rows[:TRAINING_ROWS_LOOKED_AT], task.kind) for task in training]
    return evaluate(adapter, seen, batch_size=size)


def versions() -> dict[str, str]:
    """Return the versions of what a run depends on."""
    packages = ("transformers", "peft", "accelerate", "datasets", "safetensors")
    from .. import __version__

    return {
        "molora": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in packages},
    }
