"""One price per expert, subtracted from the probs when experts are selected, never when they are weighed.

A price is state outside of autograd. Forward only reads it and counts choices, once per forward even when gradient
checkpointing runs the router again; it moves in `settle()`, once per optimizer step, from the choices of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..registry import Registry

prices = Registry("price")  # rule: (price (E,), chosen (E,) counts, *, options) -> new price (E,)


@prices.register("sign")
def sign(price: Tensor, chosen: Tensor, *, rate: float = 1e-3) -> Tensor:
    """Raise the price of experts chosen more than the mean by `rate`, lower the others (loss-free balancing).

    Auxiliary-loss-free load balancing (arXiv 2408.15664, rate 1e-3 in DeepSeek-V3), and SMoRA's bias (arXiv
    2501.15103, rate 1e-5), which is minus this price.
    """
    return price - rate * torch.sign(chosen.mean() - chosen)


class Price(nn.Module):
    """The price of each expert at one router.

    Args:
        num_experts: E.
        rule: a built rule from `prices`.
    """

    value: Tensor

    def __init__(self, num_experts: int, rule: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.rule = rule
        self.register_buffer("value", torch.zeros(num_experts, dtype=torch.float32))
        # Not a buffer: DDP would overwrite the counts of every rank with those of rank 0 at each forward.
        self.chosen: Tensor | None = None

    def observe(self, selected: Tensor, weights: Tensor) -> None:
        """Count the choices of one training forward: selected (B, S, E) bool, weights (B, S), 0 at padding."""
        counts = (selected.detach() * weights[..., None]).flatten(0, -2).sum(0)
        self.chosen = counts if self.chosen is None else self.chosen + counts

    @torch.no_grad()
    def settle(self) -> None:
        """Move the price by what was observed since the last call; does nothing when nothing was."""
        if self.chosen is None:
            return
        chosen, self.chosen = self.chosen.to(self.value.device), None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(chosen)
        self.value.copy_(self.rule(self.value, chosen))

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Put the experts in another order."""
        self.value.copy_(self.value[order])

    def __getstate__(self) -> dict:
        """Leave pending counts out of copies and pickles."""
        return self.__dict__ | {"chosen": None}


def check_price(spec: object) -> list[str]:
    """Return what is wrong with a price spec; None means no price."""
    if spec is None:
        return []
    try:
        return prices.problems(spec)  # type: ignore[arg-type]
    except ConfigError as error:
        return [str(error)]
