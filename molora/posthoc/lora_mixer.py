"""LoRA-Mixer over frozen experts (arXiv 2507.00029): a router per layer is trained on about 2000 joint samples.

The configuration is that of the recipe `lora_mixer_router`: all experts with their probabilities in training, the best
three at inference, and the routing specialisation loss. The paper's formula for that loss contradicts its text; the
recipe says which sign it takes, and `sign` changes it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..config import read_recipe
from ..control import routed_layers
from ..errors import ConfigError
from .rerouting import PLAIN, posthoc_routers, reroute

RECIPE = "lora_mixer_router"


@posthoc_routers.register("lora_mixer")
def build(
    model: nn.Module,
    adapter: str = "default",
    *,
    k: int | None = None,
    weight: float | None = None,
    entropy: float | None = None,
    sign: str | None = None,
    train_experts: bool = False,
) -> nn.Module:
    """Route a mixture as LoRA-Mixer does; the routers are to be trained.

    Args:
        model: a mixture, as `molora.import_peft` makes it.
        adapter: the name of the mixture.
        k: experts at inference, and in the loss.
        weight: of the loss, alpha.
        entropy: lambda of its entropy term.
        sign: `specialise` (peaked decisions, as the text of the paper argues) or `spread` (as its formula is printed).
        train_experts: train the experts, too; `Anchor` then keeps them near where they were.

    Returns:
        The model. Its optimizer must be made anew.

    Raises:
        ConfigError: options that cannot work; nothing is changed.
    """
    keys: dict[str, Any] = {key: value for key, value in read_recipe(RECIPE).items() if key in PLAIN}
    given = {"weight": weight, "entropy": entropy, "sign": sign, "k": k}
    loss = {**keys["losses"][0], **{name: value for name, value in given.items() if value is not None}}
    if k is not None:
        keys["selector"] = {**keys["selector"], "k": k}
    reroute(model, adapter, **{**keys, "losses": [loss]}, experts={"frozen": [] if train_experts else "all"})
    return model


class Anchor:
    """Where the experts of a mixture are now, and how far they have moved: `sum_i ||theta_i - theta_i^0||^2`.

    The paper's third loss, for experts that are trained beside the router: `loss + beta * anchor()`. Its beta is not
    known to us. Experts that stay frozen cost nothing.

    Args:
        model: a wrapped model.
        adapter: the name of the mixture.
    """

    def __init__(self, model: nn.Module, adapter: str = "default") -> None:
        banks = [layer.molora_bank[adapter] for layer in routed_layers(model, adapter).values()]
        unique = {id(p): p for bank in banks for p in bank.parameters() if p.requires_grad}
        self._pairs = [(parameter, parameter.detach().clone()) for parameter in unique.values()]
        if not self._pairs:
            raise ConfigError(f"all experts of adapter '{adapter}' are frozen, so nothing can move; use train_experts")

    def __call__(self) -> Tensor:
        """Return the scalar, with its gradient."""
        return sum(((now - before) ** 2).sum() for now, before in self._pairs)  # type: ignore[return-value]
