"""wrap: the one line that users call.

`wrap(model, "dynmole")` returns what `peft.get_peft_model(model, MoloraConfig(...))` returns, so that Trainer,
`save_pretrained`, `PeftModel.from_pretrained`, `disable_adapter`, quantised bases and the rest work as usual.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from .compat.layers import linear_sizes
from .compat.models import is_encoder_decoder
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
    # some models named ForConditionalGeneration are decoders with vision or speech before them, and PEFT's class for
    # this task hands out input_ids, which models that read sound or images do not take
    reads_text = getattr(model, "main_input_name", "input_ids") == "input_ids"
    return None if found == "SEQ_2_SEQ_LM" and not (is_encoder_decoder(model) and reads_text) else found


# What PEFT trains whole for a task. It takes every module whose path ends like this, but keeps routed layers away from
# the modules of that name alone, and only for classifiers of sequences.
PEFT_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def heads_of(model: nn.Module, task_type: str | None) -> list[str]:
    """Return what of a classifier must be named to be trained and saved whole: all behind the backbone.

    It is not in a checkpoint of the backbone alone, so it starts at random (DeBERTa's pooler, DistilBERT's
    pre_classifier, BART's classification_head); an adapter without it could not be loaded again.

    Args:
        model: the base model.
        task_type: PEFT's, with which it adds heads of its own; None for images and audio.
    """
    if task_type not in PEFT_HEADS and not type(model).__name__.endswith("Classification"):
        return []
    backbone, usual = getattr(model, "base_model_prefix", ""), PEFT_HEADS["SEQ_CLS"]
    if isinstance(getattr(model, backbone, None), nn.Module):
        heads = [n for n, m in model.named_children() if n != backbone and any(True for _ in m.parameters())]
    else:
        heads = [name for name in usual if isinstance(getattr(model, name, None), nn.Module)]
    if task_type == "SEQ_CLS":
        heads = [name for name in heads if name not in usual]
    paths = [path for path, _ in model.named_modules()]
    # PEFT goes by the end of a path, so a name that the backbone has too cannot be told apart
    return [head for head in heads if not any(p.endswith(head) and p.partition(".")[0] != head for p in paths)]


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
    heads = heads_of(model, config.task_type)
    if config.task_type is None and config.modules_to_save is not None:
        heads = []
    if config.target_modules != "all-linear":  # layers that are asked for are routed
        heads = [head for head in heads if not any(_is_target(config, path) for path in _inside(model, head))]
    if heads:
        config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *heads]))
    asked = config.target_modules
    unused = _unused(model, config, changes)
    if unused:
        warnings.warn(f"these matched nothing in {type(model).__name__}: {'; '.join(unused)}", stacklevel=2)
    try:
        with warnings.catch_warnings():
            # the first is said better by our own checks; the second is between PEFT and transformers
            warnings.filterwarnings("ignore", message=".*(tie_word_embeddings|is_gradient_checkpointing).*")
            peft_model = get_peft_model(model, config, adapter_name=adapter_name)
    except NoMatchingPeftModuleError:
        raise _no_target(model, asked) from None
    if config.modules_to_save is not None:  # PEFT adds the heads of a task whether they are there or not
        config.modules_to_save = list(dict.fromkeys(config.modules_to_save))
    accept_own_arguments(peft_model)
    return peft_model


def _inside(model: nn.Module, head: str) -> list[str]:
    return [path for path, _ in model.named_modules() if path == head or path.startswith(f"{head}.")]


def _is_target(config: MoloraConfig, path: str) -> bool:
    return bool(check_target_module_exists(config, path))


def _unused(model: nn.Module, config: MoloraConfig, changes: Mapping[str, Any]) -> list[str]:
    """Return what a caller has named in vain; recipes name the layers of several architectures, so not theirs."""
    paths = [path for path, _ in model.named_modules()]
    leaves = {path.rpartition(".")[2] for path in paths}
    found = []
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        names = getattr(config, key) if key in changes else None
        if names is None or isinstance(names, str):
            continue
        vain = [name for name in names if not any(path == name or path.endswith(f".{name}") for path in paths)]
        if key == "target_modules" and len(vain) == len(names):
            continue  # an error of its own
        for name in vain:
            close = difflib.get_close_matches(str(name), leaves, n=1)
            found.append(f"{key} '{name}'" + (f" (did you mean '{close[0]}'?)" if close else ""))
    for entry in config.layers if "layers" in changes else ():
        if not any(re.search(entry["match"], path) for path in paths):
            found.append(f"layers.match '{entry['match']}'")
    return found


def _no_target(model: nn.Module, asked: Any) -> ConfigError:
    """Say which layers there are, when PEFT found none of those that were asked for."""
    leaves = sorted({p.rpartition(".")[2] for p, m in model.named_modules() if linear_sizes(m) is not None})
    if not leaves:
        return ConfigError(f"{type(model).__name__} has no linear layer, so there is nothing to route")
    names = () if isinstance(asked, str) else asked or ()
    if any(path == name or path.endswith(f".{name}") for path, _ in model.named_modules() for name in names):
        why = "match only layers that exclude_modules or modules_to_save keep out"
    else:
        why = f"match no layer of {type(model).__name__}"
    hint = "a string is a regular expression of whole paths, so write a list of names; " if asked in leaves else ""
    return ConfigError(
        f"target_modules={asked!r} {why}; {hint}its linear layers are called {', '.join(leaves[:20])}; name some of "
        "them, or use 'all-linear'"
    )


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


__all__ = ["accept_own_arguments", "heads_of", "task_type_of", "wrap"]
