"""One price per expert, subtracted from the probs when experts are selected, never when they are weighed.

A price is state outside of autograd. Forward only reads it and measures, once per forward even when gradient
checkpointing runs the router again; it moves in `settle()`, once per optimizer step, by what all ranks measured. The
choice thus depends on earlier batches only, which makes it causal. Loss-free bias, BIP, Sinkhorn, BASE and Expert
Choice differ only in the rule.

Rules come in two kinds. A function `(price (N,), chosen (N,), *, options) -> new price` gets the counts of choices
since the last step. A class with `measure(...) -> (N,)` and `momentum` says which price one batch asks for; the stored
price is a running mean of these: at the first steps their plain mean, later an exponential one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..registry import Registry
from .balance import balanced_assignment, dual_price, sinkhorn_plan, threshold_price

prices = Registry("price")


@prices.register("sign")
def sign(price: Tensor, chosen: Tensor, *, rate: float = 1e-3) -> Tensor:
    """Raise the price of experts chosen more than the mean by `rate`, lower the others (loss-free balancing).

    Auxiliary-loss-free load balancing (arXiv 2408.15664, rate 1e-3 in DeepSeek-V3), and SMoRA's bias (arXiv
    2501.15103, rate 1e-5), which is minus this price.
    """
    return price - rate * torch.sign(chosen.mean() - chosen)


@prices.register("proportional")
def proportional(price: Tensor, chosen: Tensor, *, rate: float = 0.02) -> Tensor:
    """Move the price by `rate` times the load's deviation from its mean, in units of that mean.

    The variant of loss-free balancing (arXiv 2408.15664) whose step shrinks as the load evens out, so that short runs
    can take large steps; the default rate is ours.
    """
    mean = chosen.mean()
    return price + rate * (chosen - mean) / torch.where(mean > 0, mean, torch.ones_like(mean))


class _Rule:
    """A rule that measures the price of a batch.

    Options:
        momentum: weight of the past in the running mean; 0 keeps the price of the latest step alone.
    """

    def __init__(self, *, momentum: float = 0.9) -> None:
        if not 0 <= momentum < 1:
            raise ConfigError(f"price momentum must be in [0, 1), got {momentum}")
        self.momentum = momentum

    def measure(self, values: Tensor, selected: Tensor, real: Tensor, price: Tensor) -> Tensor:
        """Return the price (N,) that a batch asks for.

        Args:
            values: (T, N) what the selector subtracts prices from.
            selected: (T, N) bool, what was chosen.
            real: (T,) bool, False at padding.
            price: (N,) the stored price.
        """
        raise NotImplementedError


@prices.register("dual")
class Dual(_Rule):
    """BIP: dual variables of the balanced assignment, by coordinate descent from the stored price (arXiv 2502.15451).

    The authors' code was not available: the update is derived from the linear program. They route a batch with the
    price of that same batch; here the price of earlier batches decides, which is causal.

    Options:
        steps: rounds of descent per batch (the authors use 2 to 14).
        momentum: weight of the past; 0 continues from batch to batch as the authors do.
    """

    def __init__(self, *, steps: int = 4, momentum: float = 0.0) -> None:
        super().__init__(momentum=momentum)
        if steps < 1:
            raise ConfigError(f"price 'dual' needs steps >= 1, got {steps}")
        self.steps = steps

    def measure(self, values: Tensor, selected: Tensor, real: Tensor, price: Tensor) -> Tensor:
        """Return the dual variables of this batch; as many experts per token as were chosen."""
        return dual_price(values, real, selected.sum(-1), price, self.steps, floor=True)


@prices.register("quantile")
class Quantile(_Rule):
    """Quantile balancing: one round of the dual descent per batch, averaged over batches, without a floor at 0.

    As in Megatron's "quantile balancing", read in third-party notes; the default momentum is ours.
    """

    def measure(self, values: Tensor, selected: Tensor, real: Tensor, price: Tensor) -> Tensor:
        """Return the quantile of each expert that gives it an even share of this batch."""
        return dual_price(values, real, selected.sum(-1), price, 1, floor=False)


@prices.register("sinkhorn")
class Sinkhorn(_Rule):
    """The column potential of Sinkhorn's plan (Selective Sinkhorn Routing, arXiv 2511.08972).

    Papers drop it at inference, where a plan's loads then shift; a running mean of it keeps them, and is causal. For
    selectors that price scores (`sinkhorn`), or `top_k` with link: identity.

    Options:
        temperature, iterations, tolerance: of the plan; unused when the selector has computed a plan itself.
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        iterations: int = 50,
        tolerance: float = 1e-4,
        momentum: float = 0.9,
    ) -> None:
        super().__init__(momentum=momentum)
        if not temperature > 0:
            raise ConfigError(f"price 'sinkhorn' needs temperature > 0, got {temperature}")
        self.temperature, self.iterations, self.tolerance = temperature, iterations, tolerance

    def measure(self, values: Tensor, selected: Tensor, real: Tensor, price: Tensor) -> Tensor:
        """Return the potential of the plan of this batch."""
        return sinkhorn_plan(values.detach(), real, self.temperature, self.iterations, self.tolerance)[1]


@prices.register("assignment")
class Assignment(_Rule):
    """The price at which every token's favourite is its expert in the balanced assignment (BASE, arXiv 2103.16716).

    For one expert per token. Its mean is 0; where a range of prices fits, it is the middle.
    """

    def measure(self, values: Tensor, selected: Tensor, real: Tensor, price: Tensor) -> Tensor:
        """Return the price of the best balanced assignment of this batch."""
        return balanced_assignment(values[real])[1]


@prices.register("threshold")
class Threshold(_Rule):
    """The value above which each expert finds its even share of tokens (Expert Choice, arXiv 2202.09368).

    With the selector `expert_choice` a token then takes every expert whose price its prob exceeds.
    """

    def measure(self, values: Tensor, selected: Tensor, real: Tensor, price: Tensor) -> Tensor:
        """Return the thresholds of this batch, for as many choices as were made."""
        count = torch.round((selected & real[:, None]).sum() / values.shape[1])
        return threshold_price(values, real, count)


class Price(nn.Module):
    """The price of each expert at one router.

    Args:
        num_experts: N, null experts included.
        rule: a built rule from `prices`.
    """

    value: Tensor
    settled: Tensor

    def __init__(self, num_experts: int, rule: Any) -> None:
        super().__init__()
        self.rule = rule
        self.register_buffer("value", torch.zeros(num_experts, dtype=torch.float32))
        self.averages = hasattr(rule, "measure")
        if self.averages:  # how often the price has moved, for the mean of the first steps
            self.register_buffer("settled", torch.zeros((), dtype=torch.float32))
        # What was observed since the last step: counts (N,), or the sum of the measured prices and how many (N + 1,).
        # Not a buffer: DDP would overwrite that of every rank with that of rank 0 at each forward.
        self.chosen: Tensor | None = None

    @torch.no_grad()
    def observe(
        self, selected: Tensor, weights: Tensor, values: Tensor | None = None, found: Tensor | None = None
    ) -> None:
        """Take one training forward into account.

        Args:
            selected: (B, S, N) bool, what was chosen.
            weights: (B, S), 0 at padding.
            values: (B, S, N) what prices are subtracted from; only rules that measure need them.
            found: (1, 1, N) the price of this batch, from a selector that has computed it already.
        """
        if not self.averages:
            seen = (selected.detach() * weights[..., None]).flatten(0, -2).sum(0)
        else:
            real = weights.flatten() > 0
            if found is None:
                if values is None:
                    raise ConfigError("this price measures what it is subtracted from: pass values (B, S, N)")
                price = self.value.to(values.device)
                found = self.rule.measure(values.detach().flatten(0, 1), selected.flatten(0, 1), real, price)
            any_real = real.any().to(torch.float32)  # a batch of padding only says nothing
            seen = torch.cat([found.detach().flatten() * any_real, any_real[None]])
        self.chosen = seen if self.chosen is None else self.chosen + seen

    @torch.no_grad()
    def settle(self) -> None:
        """Move the price by what was observed since the last call; does nothing when nothing was."""
        if self.chosen is None:
            return
        chosen, self.chosen = self.chosen.to(self.value.device), None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(chosen)
        if not self.averages:
            self.value.copy_(self.rule(self.value, chosen))
        elif chosen[-1] > 0:
            self.settled += 1
            rate = torch.clamp(1 / self.settled, min=1 - self.rule.momentum)
            self.value.lerp_(chosen[:-1] / chosen[-1], rate)

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
        problems = prices.problems(spec)  # type: ignore[arg-type]
        if not problems:
            prices.build(spec)  # type: ignore[arg-type]  (options out of their range)
        return problems
    except ConfigError as error:
        return [str(error)]
