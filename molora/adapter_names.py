"""Which names an adapter may have: PEFT tells adapters apart by looking for `.name.` in the paths of parameters."""

from __future__ import annotations

from torch import nn

from .compat.registration import PREFIX
from .errors import ConfigError
from .layers import RoutedLayer


def check_adapter_name(model: nn.Module, name: str) -> None:
    """Raise ConfigError for an adapter name that could be mistaken for a part of a module path.

    PEFT tells adapters apart by looking for `.name.` in parameter paths, so an adapter called `0` or `mlp` would make
    it drop tensors of other adapters when saving.
    """
    segments = {segment for path, _ in model.named_modules() for segment in path.split(".")}
    segments -= {n for m in model.modules() if isinstance(m, RoutedLayer) for n in m.molora_bank}
    segments |= {*RoutedLayer.adapter_layer_names, "base_layer", "original_module", "modules_to_save", "base_model"}
    segments |= {"model", "A", "Bt", "weight", "bias", "scorer", "value"}  # and see check_part_names
    if not name or "." in name or name in segments or name.startswith(PREFIX):
        raise _unsafe(name)


def check_part_names(model: nn.Module) -> None:
    """Raise ConfigError when an adapter is called like a part of a router or of a bank of any adapter."""
    layers = [module for module in model.modules() if isinstance(module, RoutedLayer)]
    adapters = {name for layer in layers for name in layer.molora_bank}
    for layer in layers:
        for container in RoutedLayer.adapter_layer_names:
            for part in getattr(layer, container).values():
                for path in part.state_dict():
                    if taken := adapters & set(path.split(".")):
                        raise _unsafe(min(taken))


def _unsafe(name: str) -> ConfigError:
    return ConfigError(
        f"adapter name '{name}' is not safe: it is empty, holds a dot, or equals a part of this model's module "
        f"paths, and PEFT would drop tensors of other adapters when saving; choose another, such as 'my_{name}'"
    )
