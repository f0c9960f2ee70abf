"""Selectors that deal the tokens of a training batch out to the experts, each getting an even share.

They look at the other tokens of the batch in training only (fact `is_batch_coupled`). Otherwise a token chooses by its
own scores and the stored price alone, so decoding is causal and does not depend on the batch. Fact `priced`: what the
price is subtracted from, the `scores` here, where other selectors price the probs. `notes["price"]` (1, 1, N) is the
price that the batch asked for, which the price rule of the same name takes over. Padding is dealt to nobody.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError
from .balance import balanced_assignment, sinkhorn_plan, threshold_price
from .choice import largest
from .selectors import check_switches, selectors, weigh
from .types import Context

GATES = ("plan", "prob")


def _own_choice(values: Tensor, price: Tensor | None, k: int) -> Tensor:
    """Return (B, S, N) bool: the k largest of values - price."""
    return largest(values if price is None else values - price, k)


def _real(ctx: Context, like: Tensor) -> Tensor:
    """Return (B * S,) bool: the real tokens of like (B, S, N)."""
    return ctx.weights(like).flatten() > 0


@selectors.register("base", given=("price", "scores", "notes"), sparse=True, is_batch_coupled=True, priced="scores")
def base(
    probs: Tensor,
    ctx: Context,
    *,
    normalise: str = "none",
    grad: str = "soft",
    price: Tensor | None = None,
    scores: Tensor | None = None,
    notes: dict[str, Tensor] | None = None,
) -> Tensor:
    """One expert per token, at most ceil(T / E) tokens per expert, at the largest total score (arXiv 2103.16716).

    In training the best balanced assignment of the micro-batch (of this process); otherwise the largest of
    `score - price`. Without a price that is the paper's own greedy choice, which does not match training;
    `price: assignment` does. With link: sigmoid the gate is the paper's `sigmoid(x c_e)`.
    """
    check_switches(normalise=normalise, grad=grad)
    values = probs if scores is None else scores
    if not ctx.training:
        return weigh(probs, _own_choice(values, price, 1), normalise=normalise, grad=grad)
    real = _real(ctx, probs)
    chosen, found = balanced_assignment(values.flatten(0, 1)[real])
    mask = torch.zeros_like(probs, dtype=torch.bool).flatten(0, 1)
    mask[real] = torch.nn.functional.one_hot(chosen, probs.shape[-1]).bool()
    if notes is not None:
        notes["price"] = found[None, None]
    return weigh(probs, mask.view_as(probs), normalise=normalise, grad=grad)


@selectors.register(
    "sinkhorn",
    given=("price", "scores", "notes", "generator"),
    sparse=True,
    is_batch_coupled=True,
    priced="scores",
)
def sinkhorn(
    probs: Tensor,
    ctx: Context,
    *,
    k: int = 2,
    chance: float = 1.0,
    temperature: float = 1.0,
    iterations: int = 100,
    tolerance: float = 1e-4,
    noise: float = 0.0,
    gates: str = "plan",
    normalise: str = "sum1",
    grad: str = "soft",
    price: Tensor | None = None,
    scores: Tensor | None = None,
    notes: dict[str, Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The k largest of Sinkhorn's balanced plan, now and then (Selective Sinkhorn Routing, arXiv 2511.08972).

    In training, with probability `chance`, a router chooses by the plan of its micro-batch; else by noisy scores. At
    inference by `score - price`, weighed by the probs. Each router draws for itself, from the seed of the forward.

    Options:
        chance: of the plan, per forward and router (the authors use 1e-3 to 1e-2).
        temperature, iterations, tolerance: of the plan (the authors: 0.5 to 1, at most 100, 1e-6 to 1e-4).
        noise: standard deviation of the noise on the scores in training, where the plan is not used (0.1 to 4).
        gates: `plan` (the plan's values, with a gradient through the iterations) or `prob` (the plan only chooses, as
            in Megatron).
    """
    check_switches(normalise=normalise, grad=grad)
    _check_sinkhorn(probs.shape[-1], k, chance, temperature, iterations, noise, gates)
    values = probs if scores is None else scores
    if not ctx.training:
        return weigh(probs, _own_choice(values, price, k), normalise=normalise, grad=grad)
    if chance >= 1 or _draw(generator) < chance:
        plan, found = sinkhorn_plan(values.flatten(0, 1), _real(ctx, probs), temperature, iterations, tolerance)
        plan = plan.view_as(probs)
        if notes is not None:
            notes["price"] = found[None, None]
        return weigh(plan if gates == "plan" else probs, largest(plan, k), normalise=normalise, grad=grad)
    if noise > 0:
        values = values + noise * torch.randn(values.shape, generator=generator, device=values.device)
        probs = torch.softmax(values, -1)
    return weigh(probs, _own_choice(values, price, k), normalise=normalise, grad=grad)


def _draw(generator: torch.Generator | None) -> float:
    """Return a uniform number, drawn on the CPU so that no device has to be waited for."""
    if generator is not None:
        generator = torch.Generator().manual_seed(generator.initial_seed())
    return float(torch.rand((), generator=generator))


def _check_sinkhorn(
    choices: int, k: int, chance: float, temperature: float, iterations: int, noise: float, gates: str
) -> None:
    if not 1 <= k <= choices:
        raise ConfigError(f"sinkhorn needs 1 <= k <= number of experts, got k={k} with {choices}")
    if not 0 <= chance <= 1:
        raise ConfigError(f"sinkhorn needs 0 <= chance <= 1, got {chance}")
    if not temperature > 0 or iterations < 1 or noise < 0:
        raise ConfigError(
            f"sinkhorn needs temperature > 0, iterations >= 1 and noise >= 0, got {temperature}, {iterations}, {noise}"
        )
    if gates not in GATES:
        raise ConfigError(f"sinkhorn option gates={gates!r} is unknown; known: {', '.join(GATES)}")


@selectors.register("expert_choice", given=("price", "notes"), sparse=True, is_batch_coupled=True)
def expert_choice(
    probs: Tensor,
    ctx: Context,
    *,
    capacity: float = 2.0,
    normalise: str = "none",
    grad: str = "soft",
    price: Tensor | None = None,
    notes: dict[str, Tensor] | None = None,
) -> Tensor:
    """Each expert takes its `capacity * T / E` best tokens; a token gets any number of experts (arXiv 2202.09368).

    At inference a token takes the experts whose price its prob exceeds (`price: threshold`: the mean threshold of
    training), as causal decoding needs. Without a price it takes its own round(capacity) best.

    Options:
        capacity: how many experts a token has on average.
    """
    check_switches(normalise=normalise, grad=grad)
    if not 0 < capacity <= probs.shape[-1]:
        raise ConfigError(f"expert_choice needs 0 < capacity <= number of experts, got {capacity}")
    if not ctx.training:
        own = max(1, round(capacity))
        mask = largest(probs, own) if price is None else probs > price
        return weigh(probs, mask, normalise=normalise, grad=grad)
    real, values = _real(ctx, probs), probs.detach().flatten(0, 1)
    count = torch.round(capacity * real.sum() / probs.shape[-1]).clamp_min(1)
    # ranks, not a threshold: ties must not give an expert more than its share
    rank = values.masked_fill(~real[:, None], -torch.inf).argsort(dim=0, descending=True, stable=True).argsort(0)
    mask = (rank < count) & real[:, None]
    if notes is not None:
        notes["price"] = threshold_price(values, real, count)[None, None]
    return weigh(probs, mask.view_as(probs), normalise=normalise, grad=grad)
