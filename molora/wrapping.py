"""wrap: the one line that users call.

`wrap(model, "dynmole")` returns what `peft.get_peft_model(model, MoloraConfig(...))` returns, so that Trainer,
`save_pretrained`, `PeftModel.from_pretrained`, `disable_adapter`, quantised bases and the rest work as usual.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from torch import nn

from . import compat
from .config import MoloraConfig, build_config
from .errors import ConfigError
from .hooks import OWN_ARGUMENTS, TASK_IDS


def task_type_of(model: nn.Module) -> str | None:
    """Return PEFT's task type by the name of the model's class, so that fresh heads are trained and saved."""
    name = type(model).__name__
    endings = {
        "ForSequenceClassification": "SEQ_CLS",
        "ForTokenClassification": "TOKEN_CLS",
        "ForQuestionAnswering": "QUESTION_ANS",
        "ForConditionalGeneration": "SEQ_2_SEQ_LM",
        "LMHeadModel": "CAUSAL_LM",
        "ForCausalLM": "CAUSAL_LM",
    }
    found = next((task for ending, task in endings.items() if name.endswith(ending)), None)
    # some models named ForConditionalGeneration are decoders with vision or speech before them
    return None if found == "SEQ_2_SEQ_LM" and not compat.is_encoder_decoder(model) else found


def head_of(model: nn.Module) -> list[str] | None:
    """Return the head of a classifier for which PEFT has no task type (images, audio): it is trained whole."""
    heads = [name for name in ("classifier", "score") if isinstance(getattr(model, name, None), nn.Module)]
    return heads if heads and type(model).__name__.endswith("Classification") else None


def wrap(
    model: nn.Module,
    recipe: str | Path | Mapping[str, Any] | MoloraConfig = "molora",
    *,
    adapter_name: str = "default",
    **changes: Any,
) -> PeftModel:
    """Freeze a model and put routed experts into it.

    Args:
        model: any model with linear layers; transformers models need nothing else.
        recipe: a name (`molora.recipes()` lists them), a path to a YAML, a mapping, or a MoloraConfig.
        adapter_name: what PEFT calls the adapter.
        changes: fields of MoloraConfig that differ from the recipe; mappings are merged key by key, as in
            `experts={"num": 4}` or `selector={"k": 1}`.

    Returns:
        A PeftModel, ready for any Trainer. `molora.report(model)` says what was wrapped and what was skipped.

    Raises:
        ConfigError: the recipe is unknown or contradicts itself, or nothing in the model matches it.
    """
    if isinstance(model, PeftModel):
        raise ConfigError(
            "the model is wrapped already; for a second adapter call "
            "model.add_adapter(name, molora.MoloraConfig.from_recipe(recipe))"
        )
    config = build_config(recipe, changes)
    config.fingerprint = None if not isinstance(recipe, MoloraConfig) else config.fingerprint
    if config.task_type is None:
        config.task_type = task_type_of(model)
    if config.task_type is None and config.modules_to_save is None:
        config.modules_to_save = head_of(model)
    with warnings.catch_warnings():
        # the first is said better by our own checks; the second is between PEFT and transformers
        warnings.filterwarnings("ignore", message=".*(tie_word_embeddings|is_gradient_checkpointing).*")
        peft_model = get_peft_model(model, config, adapter_name=adapter_name)
    accept_own_arguments(peft_model)
    return peft_model


def accept_own_arguments(peft_model: PeftModel) -> None:
    """Let `generate(task_ids=...)` through: PEFT hands these to the tuner and hides them from transformers' checks."""
    own = {*OWN_ARGUMENTS, TASK_IDS}
    if not own <= set(peft_model.special_peft_forward_args):
        peft_model.special_peft_forward_args = {*peft_model.special_peft_forward_args, *own}
        peft_model.register_forward_pre_hook(_rename_task_ids, with_kwargs=True)


def _rename_task_ids(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    if kwargs.get("task_ids") is None:
        return args, kwargs
    return args, {TASK_IDS if name == "task_ids" else name: value for name, value in kwargs.items()}


__all__ = ["accept_own_arguments", "head_of", "task_type_of", "wrap"]
