"""molora: parameter-efficient mixtures of adapters for Hugging Face models.

`model = molora.wrap(model, "dynmole")` puts routed LoRA experts into a frozen model; then any Trainer trains it.
"""

from __future__ import annotations

from . import _quiet  # noqa: F401  (first, before anything imports bitsandbytes)
from .checkpoint import load, save
from .config import MoloraConfig
from .config import recipe_names as recipes
from .control import add_aux, drop_aux, edit, pin, record, report, set_progress, settle, using, write_expert
from .errors import AuxLossError, ConfigError, DataError, LoadError, MoloraError, RoutingError
from .from_peft import import_peft
from .growth import few_shot, grow
from .hub.card import AdapterCard
from .hub.compose import compose, live, using_experts
from .hub.store import Hub
from .kernels.choose import kernel
from .to_peft import export_peft
from .train.attach import attach
from .train.doctor import doctor
from .train.objectives import objective_loss
from .wrapping import wrap

__version__ = "0.1.0.dev0"

__all__ = [
    "AdapterCard",
    "AuxLossError",
    "ConfigError",
    "DataError",
    "Hub",
    "LoadError",
    "MoloraConfig",
    "MoloraError",
    "RoutingError",
    "add_aux",
    "attach",
    "compose",
    "doctor",
    "drop_aux",
    "edit",
    "export_peft",
    "few_shot",
    "grow",
    "import_peft",
    "kernel",
    "live",
    "load",
    "objective_loss",
    "pin",
    "recipes",
    "record",
    "report",
    "save",
    "set_progress",
    "settle",
    "using",
    "using_experts",
    "wrap",
    "write_expert",
]
