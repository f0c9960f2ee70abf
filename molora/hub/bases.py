"""Loads the base model of an adapter for the commands, as what the adapter was trained for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import CONFIG, read_config

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
    task = str(read_config(source / CONFIG).get("task_type")) if other is None or (source / CONFIG).is_file() else ""
    kind = getattr(transformers, _CLASSES.get(task) or _CLASSES.get(str(other), "AutoModel"))
    transformers.utils.logging.disable_progress_bar()
    try:
        return kind.from_pretrained(str(path) if path.is_dir() else name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"the base model '{name}' cannot be loaded as {kind.__name__}: {reason}") from error
