"""Loads the base model of an adapter for the commands, as what the adapter was trained for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ConfigError, LoadError
from ..files import CONFIG, look, read_config

_CLASSES = {  # of PEFT's task types; others, and LoRAs of another kind, are on the bare model
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


def base_model(name: str, source: Path, other: str | None = None) -> Any:
    """Load the base model of an adapter folder as what the adapter was trained for.

    Args:
        name: folder or Hub name of the model.
        source: the folder of the adapter.
        other: the task type (of PEFT) to take when the adapter's config names none; by default the bare model.

    Raises:
        ConfigError: there is no such model, or it cannot be what the adapter needs.
        LoadError: the config of the adapter cannot be read.
    """
    import transformers

    path = Path(name).expanduser()
    if (name.startswith((".", "/", "~")) or path.exists()) and not path.is_dir():
        raise ConfigError(f"model folder '{name}' does not exist")
    task = _task_of(source) if other is None or (source / CONFIG).is_file() else ""
    kind = getattr(transformers, _CLASSES.get(task) or _CLASSES.get(str(other), "AutoModel"))
    transformers.utils.logging.disable_progress_bar()
    place = str(path) if path.is_dir() else name
    try:
        if kind is transformers.AutoModel:
            kind = _around(transformers.AutoConfig.from_pretrained(place), source) or kind
        labels = _labels_in(source) if task in ("SEQ_CLS", "TOKEN_CLS") else None
        sized = {} if labels is None else {"num_labels": labels, "ignore_mismatched_sizes": True}
        return kind.from_pretrained(place, **sized)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"the base model '{name}' cannot be loaded as {kind.__name__}: {reason}") from error


def _task_of(source: Path) -> str:
    try:
        return str(read_config(source / CONFIG).get("task_type"))
    except LoadError as error:
        raise LoadError(f"'{source}' is no adapter: {error}") from None


def _labels_in(source: Path) -> int | None:
    """Return how many labels the head has that a classifier's adapter brings; None when it brings none."""
    for name, tensor in look(source).tensors.items():
        if name.endswith((".classifier.weight", ".score.weight", ".out_proj.weight")) and ".molora_" not in name:
            return tensor.shape[0]
    return None


def _around(config: Any, source: Path) -> Any:
    """Return the class of the whole model when a LoRA that names no task is on that, and not on the bare model."""
    import transformers

    whole = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    prefix = getattr(whole, "base_model_prefix", None)
    paths = [name.removeprefix("base_model.model.") for name in look(source).tensors]
    return whole if prefix and any(path.startswith(f"{prefix}.") for path in paths) else None
