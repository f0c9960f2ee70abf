"""What the routers without joint training have in common: frozen vectors to score with, and experts by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..control import routed_layers, tuner_of
from ..errors import ConfigError, did_you_mean, raise_all
from ..experts.bank import FORMS
from ..layers import RoutedLinear
from ..routing.router import Router
from .rerouting import expert_names, reroute


def install(model: nn.Module, adapter: str, **parts: Any) -> list[Router]:
    """Give a mixture routers that nobody trains, over experts that nobody trains; see `reroute`.

    Raises:
        ConfigError: the mixture cannot be routed so; nothing is changed.
    """
    refuse_shared(model, adapter)
    layers = routed_layers(model, adapter)
    others = [path for path, layer in layers.items() if not isinstance(layer, RoutedLinear) or layer.roles]
    problems = [f"layer '{others[0]}' is no linear layer with experts of its own"] if others else []
    forms = sorted({layer.molora_bank[adapter].form for layer in layers.values()} - set(FORMS))
    problems += [f"experts of form '{form}' are no LoRAs whose outputs gates weigh" for form in forms]
    raise_all(problems, ConfigError, f"adapter '{adapter}' is no library of LoRAs")
    frozen = {"frozen": "all", "null": 0}
    return reroute(model, adapter, **{"weights": "frozen", **parts}, experts=frozen)


@torch.no_grad()
def fill(router: Router, vectors: Sequence[Tensor | None]) -> None:
    """Give a `prototypes` or `glider` scorer its vectors (d,), one per expert; None: the expert is never chosen.

    Raises:
        ConfigError: a vector has another size than what the router reads.
    """
    scorer = router.scorer
    size = scorer.weight.shape[1]
    wrong = [tuple(v.shape) for v in vectors if v is not None and tuple(v.shape) != (size,)]
    if wrong or len(vectors) != len(scorer.weight):
        raise ConfigError(
            f"router '{router.place.name}' needs {len(scorer.weight)} vectors of size {size}, got {len(vectors)}"
            + (f", one of shape {wrong[0]}" if wrong else "")
        )
    for slot, vector in enumerate(vectors):
        put(router, slot, vector)


@torch.no_grad()
def put(router: Router, slot: int, vector: Tensor | None) -> None:
    """Give a `prototypes` or `glider` scorer the vector (d,) of one expert; None: it is never chosen."""
    router.scorer.weight[slot] = 0.0 if vector is None else vector.to(router.scorer.weight)
    router.scorer.present[slot] = vector is not None


def slot_of(names: Sequence[str], expert: int | str) -> int:
    """Return the slot of an expert by its number or its name."""
    if isinstance(expert, str):
        if expert not in names:
            raise ConfigError(f"expert '{expert}' is unknown{did_you_mean(expert, names)}")
        return list(names).index(expert)
    if isinstance(expert, bool) or not isinstance(expert, int) or not 0 <= expert < len(names):
        raise ConfigError(f"expert {expert!r} does not exist; there are experts 0 to {len(names) - 1}")
    return expert


def slots_of(names: Sequence[str], experts: Sequence[int | str]) -> list[int]:
    """Return the slots of several experts; all that are unknown are told at once."""
    found, problems = [], []
    for expert in experts:
        try:
            found.append(slot_of(names, expert))
        except ConfigError as error:
            problems.append(str(error))
    raise_all(problems, ConfigError, "not all of these are experts")
    return found


def one_hot(model: nn.Module, expert: int | str, adapter: str = "default") -> Tensor:
    """Return gates (E,) that let one expert act alone, for `molora.pin`."""
    names = expert_names(model, adapter)
    refuse_shared(model, adapter)
    return torch.nn.functional.one_hot(torch.tensor(slot_of(names, expert)), len(names)).float()


def refuse_shared(model: nn.Module, adapter: str) -> None:
    """Raise ConfigError when an adapter is unknown, or has shared experts, which are no part of a library."""
    configs = tuner_of(model).peft_config
    if adapter not in configs:
        raise ConfigError(f"adapter '{adapter}' is unknown; the model has: {', '.join(configs)}")
    if configs[adapter].experts["shared"]:
        raise ConfigError(
            f"adapter '{adapter}' has shared experts, which no post-hoc router knows; import LoRAs instead"
        )
