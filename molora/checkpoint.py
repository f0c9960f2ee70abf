"""Save and load: an adapter folder in PEFT's layout, written as a whole and read with every doubt spoken out.

    adapter_config.json         the MoloraConfig, with a format version and a fingerprint of the base
    adapter_model.safetensors   banks, routers and modules_to_save, adapter names left out
    README.md                   the model card, which says how to load it

`PeftModel.save_pretrained` and `PeftModel.from_pretrained` read and write the same folder.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn

from .adapter_names import check_adapter_name
from .compat.layers import linear_sizes
from .compat.models import embeddings_of
from .compat.registration import MOLORA
from .config import MoloraConfig
from .errors import ConfigError, LoadError, MoloraError, raise_all
from .files import CARD, Contents, TensorInfo, local_folder, look, mention_molora, replacing
from .fingerprint import differences, of_model
from .layers import RoutedLayer
from .tuner import MoloraModel
from .undo import undone_on_error
from .wrapping import accept_own_arguments

FREE = "free:"  # what slots without an expert are called in `experts.names`, with their number (see hub/live.py)


def save(model: nn.Module, path: str | Path, adapter: str = "default") -> Path:
    """Write one adapter to a folder; a kill at any moment leaves the old adapter whole, or the new one.

    Other files in the folder stay, and so does the text of its model card. With several processes, call it on one.

    Args:
        model: a wrapped model, also inside DDP or torch.compile.
        path: the folder.
        adapter: which of the model's adapters.

    Returns:
        The folder.

    Raises:
        ConfigError: the model has no such adapter, `path` is a file, or the adapter holds NaN or Inf.
    """
    peft_model = peft_model_of(model, adapter)
    tensors = get_peft_model_state_dict(peft_model, adapter_name=adapter, save_embedding_layers=False)
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ConfigError(
            f"adapter '{adapter}' holds NaN or Inf in {len(broken)} tensors (first: '{broken[0]}'), so it could not "
            f"be loaded again; nothing was written to '{path}'"
        )
    folder = Path(path)
    with replacing(folder) as draft:
        if (folder / CARD).is_file():
            shutil.copy(folder / CARD, draft / CARD)  # PEFT updates a card that it finds
        peft_model.save_pretrained(str(draft), selected_adapters=[adapter])
        if adapter != "default":  # PEFT gives other adapters a folder of their own
            for file in (draft / adapter).iterdir():
                os.replace(file, draft / file.name)
            (draft / adapter).rmdir()
        mention_molora(draft / CARD)
    return folder


def peft_model_of(model: nn.Module, adapter: str) -> PeftModel:
    """Return the PeftModel inside a model; raise ConfigError when it has no molora adapter of that name."""
    found = next((module for module in model.modules() if isinstance(module, PeftModel)), None)
    if found is None or not isinstance(found.base_model, MoloraModel):
        raise ConfigError(f"{type(model).__name__} holds no molora adapter; call molora.wrap(model, recipe) first")
    if adapter not in found.peft_config:
        raise ConfigError(f"adapter '{adapter}' is unknown; the model has: {', '.join(found.peft_config)}")
    return found


def load(
    model: nn.Module,
    path: str | Path,
    adapter_name: str = "default",
    is_trainable: bool = False,
    *,
    revision: str | None = None,
) -> PeftModel:
    """Load a saved adapter into a base model, or as one more adapter into a wrapped model.

    Nothing is half done: when anything does not fit, one error lists all of it and the model is as it was before.

    Args:
        model: the base model the adapter was trained on, or a PeftModel that molora made from it. In the latter the
            new adapter is not active until `model.set_adapter(adapter_name)`.
        path: the folder of an adapter, or the id of a Hub repository.
        adapter_name: what PEFT will call it.
        is_trainable: go on training; otherwise it is frozen and the model is put into eval mode.
        revision: of the Hub repository.

    Returns:
        The PeftModel: a new one around a base model, or the one that was given.

    Raises:
        LoadError: the folder is damaged or holds something else, or the adapter does not fit this model.
        ConfigError: the adapter name cannot be used in this model.
    """
    base = _base_for(model, adapter_name)
    contents = look(local_folder(path, revision))
    head = f"adapter '{path}' cannot be loaded"
    config = _config_of(contents)
    if config is not None:
        config.inference_mode = not is_trainable
        mine, weights = of_model(base, linear_sizes, config.modules_to_save)
        brought = {name.removeprefix("base_model.model.") for name in contents.tensors}  # such as resized embeddings
        weights = {name: weight for name, weight in weights.items() if name not in brought}
        if config.fingerprint is not None:
            contents.problems += differences(config.fingerprint, mine, weights)
        if contents.tensors:
            contents.problems += contents.not_finite()
    if config is None or not contents.tensors:
        raise_all(contents.problems or ["its weights hold no tensor"], LoadError, head)
    assert config is not None
    try:
        with undone_on_error(model):
            peft_model = _insert(model, contents, config, adapter_name, is_trainable, head)
    except BaseException:
        if isinstance(model, PeftModel):
            model.base_model._forget(adapter_name)  # what is not part of any module
        raise
    free = sum(name.startswith(FREE) for name in config.experts["names"] or ())
    if free:
        warnings.warn(
            f"adapter '{path}' has {free} slots for experts to come, which its router would weigh as if they were "
            "experts; molora.live(model) closes them",
            stacklevel=2,
        )
    return peft_model


def _base_for(model: nn.Module, adapter_name: str) -> nn.Module:
    """Return the base model an adapter is to be put into; raise ConfigError when it cannot take one of that name."""
    if isinstance(model, PeftModel):
        if not isinstance(model.base_model, MoloraModel):
            raise ConfigError(
                f"the model holds adapters of type {model.peft_type}, which PEFT does not combine with others; load "
                "into the base model, or merge them first with model.merge_and_unload()"
            )
        if adapter_name in model.peft_config:
            raise ConfigError(
                f"the model has an adapter '{adapter_name}' already; choose another adapter_name, or call "
                f"model.delete_adapter('{adapter_name}') first"
            )
        base = model.get_base_model()
    elif any(isinstance(module, RoutedLayer) for module in model.modules()):
        raise ConfigError("this is the inside of a wrapped model; give the PeftModel around it, or a fresh base model")
    else:
        base = model
    check_adapter_name(base, adapter_name)
    return base


def _config_of(contents: Contents) -> MoloraConfig | None:
    """Build the config of a folder; what is wrong with it is added to the folder's problems."""
    if contents.config is None:
        return None
    kind = contents.config.get("peft_type")
    if kind != MOLORA:
        what = (
            "a plain LoRA: make an expert of it with molora.import_peft(model, [path])"
            if kind == "LORA"
            else (f"an adapter of type {kind!r}: load it with peft.PeftModel.from_pretrained")
        )
        contents.problems.append(f"it is no molora adapter but {what}")
        return None
    try:
        return MoloraConfig.from_peft_type(**contents.config)
    except MoloraError as error:
        contents.problems.append(str(error))
        return None


def _insert(
    model: nn.Module, contents: Contents, config: MoloraConfig, adapter_name: str, is_trainable: bool, head: str
) -> PeftModel:
    """Put the adapter into the model and fill it; the caller undoes it when this raises."""
    problems, saved = contents.problems, (config.fingerprint, config.base_model_name_or_path)
    config.fingerprint = None  # compared already, so that a wrong base and wrong tensors are told together
    try:
        if isinstance(model, PeftModel):
            peft_model = model
            peft_model.add_adapter(adapter_name, config)
        else:
            with warnings.catch_warnings():
                warnings.filterwarnings(
                    "ignore", message=".*(was renamed from|tie_word_embeddings|is_gradient_checkpointing).*"
                )
                peft_model = get_peft_model(model, config, adapter_name=adapter_name)
    except (MoloraError, ValueError) as error:  # PEFT's own refusals are ValueErrors
        raise_all([*problems, str(error)], LoadError, head)
    raise_all(problems + misfits(peft_model, adapter_name, contents.tensors), LoadError, head)
    config.fingerprint, config.base_model_name_or_path = saved[0] or config.fingerprint, saved[1]
    if is_trainable and isinstance(model, PeftModel):
        peft_model.set_requires_grad(adapter_name)
    result = peft_model.load_adapter(str(contents.folder), adapter_name, is_trainable=is_trainable)
    left = [f"tensor '{name}' was not filled" for name in result.missing_keys]
    left += [f"tensor '{name}' found no place" for name in result.unexpected_keys]
    raise_all(left, LoadError, head)
    accept_own_arguments(peft_model)
    return peft_model


def misfits(peft_model: PeftModel, adapter_name: str, tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Return how the tensors of a file differ from those that saving this adapter would write."""
    expected = get_peft_model_state_dict(peft_model, adapter_name=adapter_name, save_embedding_layers=False)
    # PEFT also saves the embeddings of a base whose vocabulary was resized; they replace the base's own.
    embeddings = embeddings_of(peft_model)
    expected.update({key: embeddings[key] for key in tensors.keys() & embeddings.keys()})
    found = [f"tensor '{key}' is missing" for key in sorted(expected.keys() - tensors.keys())]
    found += [f"tensor '{key}' is unexpected" for key in sorted(tensors.keys() - expected.keys())]
    for key in sorted(expected.keys() & tensors.keys()):
        want, have = expected[key], tensors[key]
        if have.shape != tuple(want.shape):
            found.append(f"tensor '{key}' has shape {have.shape}, the model needs {tuple(want.shape)}")
        elif have.is_floating != want.is_floating_point():
            found.append(f"tensor '{key}' has dtype {have.dtype}, the model needs {want.dtype}")
    return found
