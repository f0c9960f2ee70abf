"""The settings of a training run, and how they meet the recipe: flags override `--set`, which overrides the recipe.

The recipe's `train:` mapping holds arguments of transformers' TrainingArguments under their own names.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
import yaml

from ..config import MoloraConfig, build_config, read_recipe
from ..errors import ConfigError, did_you_mean, raise_all
from ..routing.tasks import tasks_in, with_tasks
from .models import DTYPES, QUANTIZE
from .task_types import TASK_TYPES

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from .tasks import Task

DEFAULT_MAX_LENGTH = 512

# Arguments that molora sets itself, with what to use instead.
RESERVED = {
    "output_dir": "--output",
    "seed": "--seed",
    "data_seed": "--seed",
    "save_steps": "--save-steps",
    "save_strategy": "--save-steps",
    "save_total_limit": "--keep",
    "save_only_model": "nothing: resuming needs the optimizer",
    "resume_from_checkpoint": "--resume",
    "eval_strategy": "molora eval",
    "eval_steps": "molora eval",
    "load_best_model_at_end": "molora eval on the checkpoints",
    "remove_unused_columns": "nothing: routing needs task_ids",
    "label_names": "nothing: it is labels",
    "push_to_hub": "model.push_to_hub()",
    "auto_find_batch_size": "--batch-size",
}


@dataclass
class TrainSettings:
    """What `molora train` is told.

    Attributes:
        recipe: a name or a path to a YAML.
        model: folder or Hub name of the base model.
        data: `name=source` for each task (see read_rows for sources).
        output: folder that the adapter is written to.
        task_type: auto, seq_cls, causal_lm or seq2seq_lm; auto follows data and model.
        quantize: 4bit, 8bit, or none.
        dtype: of the base: auto, float32, bfloat16 or float16.
        max_length: tokens per row; None takes 512, or less when the model takes less.
        batch_size, grad_accum, epochs, max_steps, learning_rate: None leaves it to the recipe.
        seed: of the new weights, the order of the data, dropout and the split.
        gradient_checkpointing: recompute activations in backward to save memory.
        eval_fraction: part of every task's rows that is held out for the final evaluation.
        save_steps: optimizer steps between two checkpoints.
        keep: how many checkpoints stay.
        resume: go on from the newest whole checkpoint in `output`.
        overwrite: replace an earlier run in `output`.
        fields: column names, ours to theirs: {"text": "headline"}.
        set: overrides such as `experts.num=4`, `losses.0.weight=0.1` or `train.warmup_steps=100`.
        quiet: no progress bar.
    """

    recipe: str
    model: str
    data: list[str]
    output: str
    task_type: str = "auto"
    quantize: str | None = None
    dtype: str = "auto"
    max_length: int | None = None
    batch_size: int | None = None
    grad_accum: int | None = None
    epochs: float | None = None
    max_steps: int | None = None
    learning_rate: float | None = None
    seed: int = 0
    gradient_checkpointing: bool = False
    eval_fraction: float = 0.1
    save_steps: int = 500
    keep: int = 2
    resume: bool = False
    overwrite: bool = False
    fields: dict[str, str] = field(default_factory=dict)
    set: list[str] = field(default_factory=list)
    quiet: bool = False

    def __post_init__(self) -> None:
        """Raise ConfigError with all values that cannot work."""
        found = []
        for name, choices in (("task_type", TASK_TYPES), ("dtype", DTYPES), ("quantize", QUANTIZE)):
            value = getattr(self, name)
            if value not in choices and not (name == "quantize" and value is None):
                found.append(f"{name} '{value}' is unknown{did_you_mean(str(value), choices)}")
        for name in ("batch_size", "grad_accum", "max_steps", "save_steps", "keep"):
            value = getattr(self, name)
            if value is not None and value < 1:
                found.append(f"{name} must be at least 1, got {value}")
        for name in ("epochs", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                found.append(f"{name} must be positive, got {value}")
        if self.max_length is not None and self.max_length < 2:
            found.append(f"max_length must be at least 2 tokens, got {self.max_length}")
        if not 0 <= self.eval_fraction < 1:
            found.append(f"eval_fraction must be at least 0 and below 1, got {self.eval_fraction}")
        if not 0 <= self.seed < 2**32:  # numpy's range
            found.append(f"seed must be a whole number from 0 to 4294967295, got {self.seed}")
        if self.epochs is not None and self.max_steps is not None:
            found.append("epochs and max_steps both say how long to train; give one of them")
        raise_all(found, ConfigError, "settings")


def parse_override(text: str) -> tuple[list[str], Any]:
    """Take `experts.num=4` apart into (["experts", "num"], 4); the value is read as YAML, and 1e-4 as a number."""
    path, equals, value = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"'{text}' is not an override; write key=value, such as experts.num=4 or selector.k=1")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(
            f"the value of '{text}' is not readable YAML; write numbers, words, [lists] or {{k: v}}"
        ) from None
    if isinstance(parsed, str) and re.fullmatch(r"[-+]?[0-9.]+[eE][-+]?[0-9]+", parsed):
        parsed = float(parsed)
    return keys, parsed


def apply_overrides(recipe: Mapping[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (changes for build_config, changes of the `train` mapping) that these overrides make.

    A number as a key is a position in a list: `losses.0.weight=0.1`.

    Raises:
        ConfigError: all overrides that cannot be read, or that point to nothing.
    """
    defaults = vars(MoloraConfig())
    defaults["experts"] = {}  # what is not given stays with the config
    changes: dict[str, Any] = {}
    problems = []
    for text in overrides:
        try:
            keys, value = parse_override(text)
            if keys[0] != "train" and keys[0] not in defaults:
                raise ConfigError(f"'{text}': key '{keys[0]}' is unknown{did_you_mean(keys[0], [*defaults, 'train'])}")
            if len(keys) == 1:
                changes[keys[0]] = value
                continue
            old = changes.get(keys[0], recipe.get(keys[0], defaults.get(keys[0])))
            if isinstance(old, str):  # "selector: top_k" and selector.k=1
                old = {"name": old}
            # of a mapping only what changes is passed on, so that another name replaces a component whole
            start = changes.get(keys[0], {}) if isinstance(old, Mapping) else old
            if keys[0] not in recipe and isinstance(old, Mapping) and "name" in old and keys[1] != "name":
                start = {**old, **start}
            changes[keys[0]] = _put(start, keys[1:], value, text)
        except ConfigError as error:
            problems.append(str(error))
    raise_all(problems, ConfigError, "--set")
    train = changes.pop("train", {})
    if not isinstance(train, Mapping):
        raise ConfigError(f"--set: 'train' must be a mapping of training arguments, got {train!r}")
    return changes, dict(train)


def _put(inside: Any, keys: list[str], value: Any, text: str) -> Any:
    """A copy of `inside` in which the place named by `keys` holds `value`."""
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if isinstance(inside, (list, tuple)):
        if not key.isdigit() or int(key) >= len(inside):
            raise ConfigError(f"'{text}': '{key}' is no position in a list of {len(inside)}")
        at = int(key)
        return [_put(item, rest, value, text) if i == at else item for i, item in enumerate(inside)]
    if inside is None or isinstance(inside, Mapping):
        inside = dict(inside or {})
        return {**inside, key: _put(inside.get(key), rest, value, text)}
    raise ConfigError(f"'{text}': there is a plain value where '{key}' is looked for")


def resolve_recipe(recipe: str, overrides: Sequence[str], num_tasks: int) -> tuple[MoloraConfig, dict[str, Any]]:
    """Return the config of a recipe with overrides, and its `train` mapping; routing tables get `num_tasks` rows."""
    content = read_recipe(recipe)
    changes, train = apply_overrides(content, overrides)
    of_recipe, changed = (_mapping(part.get("scorer")) for part in (content, changes))
    renamed = changed.get("name", of_recipe.get("name")) != of_recipe.get("name")
    scorer = changed if renamed else {**of_recipe, **changed}
    if isinstance(scorer.get("name"), str):
        fitted = with_tasks(scorer, num_tasks)
        if tasks_in(fitted):
            changes["scorer"] = fitted
    config = build_config(content, changes)
    recipe_train = content.get("train") or {}
    if not isinstance(recipe_train, Mapping):
        raise ConfigError(f"recipe '{recipe}': 'train' must be a mapping of training arguments, got {recipe_train!r}")
    return config, {**recipe_train, **train}


def _mapping(spec: Any) -> dict[str, Any]:
    """Return a component spec as a mapping, empty for none."""
    return dict(spec) if isinstance(spec, Mapping) else {} if spec is None else {"name": spec}


def training_arguments(settings: TrainSettings, train: Mapping[str, Any], folder: Path) -> TrainingArguments:
    """Return the TrainingArguments of a run.

    Args:
        settings: flags that are not None override `train`.
        train: the recipe's `train` mapping with overrides.
        folder: where checkpoints go.

    Raises:
        ConfigError: unknown or reserved arguments, or values that TrainingArguments refuses.
    """
    from transformers import TrainingArguments
    from transformers.utils import logging

    known = {f.name for f in dataclasses.fields(TrainingArguments) if f.init}
    found = [f"'{key}' is set by molora; use {RESERVED[key]}" for key in train if key in RESERVED]
    found += [f"'{key}' is unknown{did_you_mean(str(key), known - set(RESERVED))}" for key in train if key not in known]
    found += _wrong_numbers(train)
    raise_all(found, ConfigError, "training arguments (train: in the recipe, or --set train.<name>=...)")
    pin = torch.accelerator.is_available()  # without one, torch warns about pinned memory
    arguments: dict[str, Any] = {"logging_steps": 10, "report_to": "none", "dataloader_pin_memory": pin, **train}
    if settings.max_steps is not None:
        arguments.pop("num_train_epochs", None)
    if settings.epochs is not None:
        arguments.pop("max_steps", None)
    flags = {
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.grad_accum,
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps,
        "learning_rate": settings.learning_rate,
    }
    arguments |= {name: value for name, value in flags.items() if value is not None}
    # 5.23 renamed gradient checkpointing; older versions know only the first name
    new = "activation_checkpointing" in known
    prefix = "activation_checkpointing" if new else "gradient_checkpointing"
    on = settings.gradient_checkpointing
    for old in ("gradient_checkpointing", "activation_checkpointing"):
        on = bool(arguments.pop(old, False)) or on
        options = arguments.pop(f"{old}_kwargs", None)
        arguments[f"{prefix}_kwargs"] = options or arguments.get(f"{prefix}_kwargs") or {"use_reentrant": False}
    arguments[prefix] = on
    arguments |= {
        "output_dir": str(folder),
        "seed": settings.seed,
        "data_seed": settings.seed,
        "save_strategy": "steps",
        "save_steps": settings.save_steps,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "disable_tqdm": settings.quiet or bool(train.get("disable_tqdm", False)),
    }
    verbosity = logging.get_verbosity()
    try:
        return TrainingArguments(**arguments)
    except Exception as error:  # of many kinds: wrong types, values, missing hardware
        reason = textwrap.shorten(str(error), 800, placeholder=" ...")
        raise ConfigError(f"training arguments: {type(error).__name__}: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)


def _wrong_numbers(train: Mapping[str, Any]) -> list[str]:
    """Return which arguments hold words where transformers expects numbers, which it would notice in training only."""
    from transformers import TrainingArguments

    found = []
    for argument in dataclasses.fields(TrainingArguments):
        kinds = set(get_args(argument.type) or (argument.type,)) - {type(None)}
        value = train.get(argument.name)
        if isinstance(value, (str, list, dict)) and kinds and kinds <= {int, float, bool}:
            wanted = "true or false" if kinds == {bool} else "a number"
            found.append(f"'{argument.name}' must be {wanted}, got {value!r}")
    return found


def run_facts(
    settings: TrainSettings,
    config: MoloraConfig,
    train: Mapping[str, Any],
    arguments: TrainingArguments,
    tasks: Sequence[Task],
) -> dict[str, Any]:
    """Return what decides the weights of a run, as JSON data; a resumed run must have the same."""
    digest = hashlib.sha256()
    for task in tasks:
        rows = [{key: value for key, value in row.items() if key != "where"} for row in task.rows]
        digest.update(json.dumps([task.name, task.kind, rows], sort_keys=True).encode())
    given = ("model", "task_type", "quantize", "dtype", "max_length", "seed", "eval_fraction")
    flags = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps")
    adapter = {key: value for key, value in config.to_dict().items() if key not in ("fingerprint", "inference_mode")}
    return {
        **{name: getattr(settings, name) for name in given},
        **{name: getattr(arguments, name) for name in (*flags, "learning_rate")},
        "train": {key: value for key, value in train.items() if not key.startswith(("log", "report", "disable"))},
        "adapter": json.loads(json.dumps(adapter, sort_keys=True, default=str)),
        "tasks": [task.name for task in tasks],
        "data": digest.hexdigest(),
    }
