"""checkup: builds what `molora train` would train, and lets the doctor look at it; what `molora doctor` calls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .data import Collator, LabelMap, Task, encode_classification, encode_generation, load_tasks
from .doctor import doctor
from .findings import Finding
from .models import load_base, load_config, longest, wrap_base
from .settings import DEFAULT_MAX_LENGTH, resolve_recipe
from .task_types import resolve_task_type

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from .models import Base

ROWS = 8  # of the batch
CHECKPOINTING = ("non-reentrant", "reentrant")


def checkup(
    recipe: str,
    model: str,
    data: Sequence[str] = (),
    *,
    adapter: str | Path | None = None,
    task_type: str = "auto",
    quantize: str | None = None,
    dtype: str = "auto",
    overrides: Sequence[str] = (),
    fields: dict[str, str] | None = None,
    max_length: int | None = None,
    grad_accum: int = 1,
    checkpointing: str | None = None,
) -> list[Finding]:
    """Wrap a base model by a recipe and take real training steps on a small batch.

    Args:
        recipe, model, data, task_type, quantize, dtype, overrides, fields, max_length: as in TrainSettings; without
            data, a random batch is made up.
        adapter: folder of a saved adapter whose tensors must fit.
        grad_accum: accumulation steps of the training that is planned.
        checkpointing: `non-reentrant` or `reentrant` gradient checkpointing, None for none.

    Raises:
        ConfigError, DataError, LoadError: there is nothing to examine.
    """
    tasks = load_tasks(data, fields=fields, kind="classification" if task_type == "seq_cls" else None) if data else []
    config, _ = resolve_recipe(recipe, overrides, len(tasks) or 2)
    base_config = load_config(model)
    kind = tasks[0].kind if tasks else _kind_of(task_type, base_config)
    task_type = resolve_task_type(task_type, kind, base_config)
    labels = None
    if task_type == "seq_cls":
        labels = LabelMap.from_tasks(tasks) if tasks else LabelMap({"made_up": ("a", "b")})
    base = load_base(model, task_type, config=base_config, label_map=labels, quantize=quantize, dtype=dtype)
    if checkpointing is not None:
        # 5.23 renamed it
        enable = getattr(base.model, "activation_checkpointing_enable", base.model.gradient_checkpointing_enable)
        enable({"use_reentrant": checkpointing == "reentrant"})
    wrapped = wrap_base(base, config)
    limit = max_length or min(DEFAULT_MAX_LENGTH, longest(base.tokenizer, base_config) or DEFAULT_MAX_LENGTH)
    batch = _batch(base, tasks, labels, limit) if tasks else None
    notes = [Finding("ok", note) for note in base.notes]
    return notes + doctor(wrapped, batch, folder=adapter, accumulation=grad_accum)


def _kind_of(task_type: str, config: PretrainedConfig) -> str:
    """The kind of data that goes with a task type, or with what the model is."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as masked

    if task_type != "auto":
        return "classification" if task_type == "seq_cls" else "generation"
    classifies = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    encodes = config.model_type in masked and not (config.is_encoder_decoder or getattr(config, "is_decoder", False))
    return "classification" if classifies or encodes else "generation"


def _batch(base: Base, tasks: Sequence[Task], labels: LabelMap | None, max_length: int) -> dict[str, Any]:
    """The first rows of every task in one batch."""
    share = max(1, ROWS // len(tasks))
    few = [Task(task.name, task.rows[:share], task.kind) for task in tasks]
    if labels is not None:
        rows = encode_classification(few, base.tokenizer, labels, max_length)
    else:
        pairs = base.task_type == "seq2seq_lm"
        rows = encode_generation(few, base.tokenizer, max_length, encoder_decoder=pairs)
    return {name: tensor.to(base.model.device) for name, tensor in Collator(base.tokenizer)(list(rows)).items()}
