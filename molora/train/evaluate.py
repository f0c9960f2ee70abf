"""Evaluation of a saved adapter on data: accuracy of classifiers, loss, perplexity and exact match of generators.

A row of a task is judged among that task's own labels only. Perplexity is exp of the mean loss per supervised token.
Exact match generates greedily from the prompt and compares with the answer, white space at both ends left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoint import load
from ..control import set_progress, trace_of, using
from ..errors import ConfigError, DataError, LoadError
from ..files import CONFIG, local_folder, read_config
from ..routing.metrics import Usage
from .data import IGNORE, Collator, LabelMap, Task, encode_classification, encode_generation, load_tasks
from .disk import LABELS, TRAINING, read_json
from .models import Base, load_base, load_config, longest
from .settings import DEFAULT_MAX_LENGTH
from .task_types import resolve_task_type

if TYPE_CHECKING:
    import datasets
    from peft import PeftModel


@dataclass
class Adapter:
    """A saved adapter in its base model, with what evaluation must know.

    Attributes:
        model: the PeftModel, in eval mode, at the end of its schedules.
        base: tokenizer and task type.
        tasks: names of the trained tasks by id.
        label_map: of classifiers.
        max_length: tokens per row.
    """

    model: PeftModel
    base: Base
    tasks: list[str]
    label_map: LabelMap | None
    max_length: int


@dataclass
class Evaluation:
    """The result of an evaluation: metrics per task, and the routing statistics of the same forwards."""

    tasks: dict[str, dict[str, float]]
    usage: Usage
    notes: list[str] = field(default_factory=list)


def open_adapter(
    path: str | Path, model: str | None = None, *, quantize: str | None = None, dtype: str = "auto"
) -> Adapter:
    """Load a saved adapter into its base model.

    Args:
        path: the adapter's folder, or a Hub repository.
        model: the base, when it is not where training found it.
        quantize: 4bit, 8bit or none; by default as in training, because an adapter corrects its base's rounding too.
        dtype: of the base.

    Raises:
        LoadError, ConfigError: anything does not fit, or the base is not to be found.
    """
    folder = local_folder(path)
    if not (folder / CONFIG).is_file():
        raise LoadError(
            f"'{path}' holds no {CONFIG}, so it is no adapter; give the folder that molora train, or molora.save, wrote"
        )
    config = read_config(folder / CONFIG)
    facts = read_json(folder / TRAINING, "how it was trained") if (folder / TRAINING).is_file() else {}
    name = model or facts.get("model") or config.get("base_model_name_or_path")
    if not name:
        raise LoadError(f"adapter '{path}' does not say what its base model is; give --model")
    base_config = load_config(name)
    label_map = LabelMap.load(folder / LABELS) if (folder / LABELS).is_file() else None
    if label_map is None and config.get("task_type") == "SEQ_CLS":
        raise LoadError(f"adapter '{path}' is a classifier without {LABELS}, so its classes have no names")
    kind = "classification" if label_map is not None else "generation"
    task_type = resolve_task_type("auto", kind, base_config)
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    if quantize is None:
        quantize = (facts.get("settings") or {}).get("quantize")
    quantize = None if quantize == "none" else quantize
    base = load_base(
        name,
        task_type,
        config=base_config,
        label_map=label_map,
        quantize=quantize,
        dtype=dtype,
        tokenizer_from=str(folder) if has_tokenizer else None,
    )
    wrapped = load(base.model, folder)
    if torch.accelerator.is_available() and quantize is None:
        wrapped = wrapped.to(torch.accelerator.current_accelerator())
    set_progress(wrapped, 1.0)
    limit = facts.get("max_length") or min(DEFAULT_MAX_LENGTH, longest(base.tokenizer, base_config) or 10**9)
    tasks = list(label_map.labels) if label_map is not None else facts.get("tasks", [])
    return Adapter(wrapped.eval(), base, tasks, label_map, limit)


def evaluate_adapter(
    path: str | Path,
    data: Sequence[str],
    *,
    model: str | None = None,
    fields: dict[str, str] | None = None,
    quantize: str | None = None,
    dtype: str = "auto",
    batch_size: int = 16,
    limit: int | None = None,
    max_new_tokens: int = 32,
) -> Evaluation:
    """Evaluate a saved adapter on data; what `molora eval` calls.

    Args:
        data: `name=source` for each task, under the names of training.
        limit: rows per task at most, the first ones; None for all.
        max_new_tokens: of the generations for exact match; 0 leaves exact match out.

    Raises:
        DataError: unreadable data, a task or label that was unseen at training.
        LoadError, ConfigError: as `open_adapter`.
    """
    tasks = load_tasks(data, fields=fields)
    if limit is not None:
        tasks = [Task(task.name, task.rows[:limit], task.kind) for task in tasks]
    adapter = open_adapter(path, model, quantize=quantize, dtype=dtype)
    kinds = ("classification",) if adapter.label_map is not None else ("generation", "lm")
    wrong = [f"{task.name} is {task.kind} data" for task in tasks if task.kind not in kinds]
    if wrong:
        raise DataError(f"adapter '{path}' was trained on {' or '.join(kinds)} data, but {', '.join(wrong)}")
    return evaluate(adapter, tasks, batch_size=batch_size, max_new_tokens=max_new_tokens)


def evaluate(adapter: Adapter, tasks: Sequence[Task], *, batch_size: int = 16, max_new_tokens: int = 0) -> Evaluation:
    """Evaluate a loaded adapter task by task, and count what its routers do meanwhile.

    Args:
        adapter: from `open_adapter`, or made by training.
        tasks: rows of trained tasks.
        max_new_tokens: as in `evaluate_adapter`.

    Returns:
        per task: `rows`; for classifiers `accuracy`, `loss` (cross-entropy among the task's labels) and `majority`
        (the accuracy of always saying the most frequent label); for generators `loss`, `perplexity`, `tokens` and, when
        asked for, `exact_match`.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
    model = adapter.model
    was_training = model.training
    usage = Usage(adapter.tasks or [task.name for task in tasks])
    result = Evaluation({}, usage)
    model.eval()
    try:
        with torch.no_grad():
            for task in tasks:
                if adapter.label_map is not None:
                    result.tasks[task.name] = _classify(adapter, adapter.label_map, task, usage, batch_size)
                else:
                    result.tasks[task.name] = _generate(adapter, task, usage, batch_size, max_new_tokens)
    finally:
        model.train(was_training)
    return result


def _batches(model: nn.Module, data: datasets.Dataset, collator: Collator, size: int) -> Any:
    device = next(model.parameters()).device
    for start in range(0, len(data), size):
        rows = [data[i] for i in range(start, min(start + size, len(data)))]
        yield {name: tensor.to(device) for name, tensor in collator(rows).items()}


def _classify(adapter: Adapter, label_map: LabelMap, task: Task, usage: Usage, size: int) -> dict[str, float]:
    tokenizer, own = adapter.base.tokenizer, label_map.slice(task.name)
    data = encode_classification([task], tokenizer, label_map, adapter.max_length)
    right, loss, seen = 0, 0.0, [0] * (own.stop - own.start)
    for batch in _batches(adapter.model, data, Collator(tokenizer), size):
        labels = batch.pop("labels") - own.start
        with usage.reading(trace_of(adapter.model)):
            logits = adapter.model(**batch).logits[:, own].float()
        right += int((logits.argmax(-1) == labels).sum())
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        for label in labels.tolist():
            seen[label] += 1
    rows = len(data)
    return {"rows": rows, "accuracy": right / rows, "loss": loss / rows, "majority": max(seen) / rows}


def _generate(adapter: Adapter, task: Task, usage: Usage, size: int, max_new_tokens: int) -> dict[str, float]:
    tokenizer, pairs = adapter.base.tokenizer, adapter.base.task_type == "seq2seq_lm"
    names = adapter.tasks or [task.name]
    data = encode_generation([task], tokenizer, adapter.max_length, encoder_decoder=pairs, task_names=names)
    loss, tokens = 0.0, 0
    for batch in _batches(adapter.model, data, Collator(tokenizer), size):
        labels = batch["labels"]
        with usage.reading(trace_of(adapter.model)):
            # with labels an encoder-decoder makes its decoder inputs, and prompts are told from answers
            logits = adapter.model(**batch).logits
        if not pairs:
            logits, labels = logits[:, :-1], labels[:, 1:]
        loss += float(F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum"))
        tokens += int((labels != IGNORE).sum())
    figures = {
        "rows": len(data),
        "tokens": tokens,
        "loss": loss / max(tokens, 1),
        "perplexity": math.exp(min(loss / max(tokens, 1), 700)),
    }
    if max_new_tokens > 0 and task.kind == "generation":
        figures["exact_match"] = _exact_match(adapter, data, size, max_new_tokens, pairs)
    return figures


def _exact_match(adapter: Adapter, data: datasets.Dataset, size: int, new: int, pairs: bool) -> float:
    """The share of rows whose greedy continuation is the answer."""
    tokenizer = adapter.base.tokenizer
    device = next(adapter.model.parameters()).device
    right = 0
    for start in range(0, len(data), size):
        rows = [data[i] for i in range(start, min(start + size, len(data)))]
        prompts, answers = [], []
        for row in rows:
            supervised = [i for i, label in enumerate(row["labels"]) if label != IGNORE]
            prompts.append(row["input_ids"] if pairs else row["input_ids"][: supervised[0]])
            answers.append([row["labels"][i] for i in supervised])
        ids, mask = _pad_left(prompts, tokenizer.pad_token_id)
        tasks = torch.tensor([row["task_ids"] for row in rows], device=device)
        with using(adapter.model, task_ids=tasks) if adapter.tasks else nullcontext():
            out = adapter.model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=new,
                do_sample=False,
                num_beams=1,
            )
        said = tokenizer.batch_decode(out if pairs else out[:, ids.shape[1] :], skip_special_tokens=True)
        meant = tokenizer.batch_decode(answers, skip_special_tokens=True)
        right += sum(a.strip() == b.strip() for a, b in zip(said, meant, strict=True))
    return right / len(data)


def _pad_left(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Pad token ids on the left, where generation needs it, whatever the tokenizer's side -> ids, mask (B, S)."""
    longest_row = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (longest_row - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest_row - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
