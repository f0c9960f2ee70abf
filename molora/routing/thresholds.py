"""Selectors that keep as many experts as pass a threshold, so that the number of experts depends on the token.

A percentile of one token's own scores would be no threshold: over E experts it always keeps the same number. Here the
threshold is fixed (`positive`, `per_expert`), relative to the token's best expert (`relative`), or a number of experts
that follows how important or how uncertain the token is (`dynamic_k`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .choice import largest
from .losses import losses, mean_over_tokens
from .selectors import check_switches, nucleus, selectors, weigh
from .types import Context, Routing


def bounded(mask: Tensor, probs: Tensor, min_k: int, max_k: int | None) -> Tensor:
    """Return the mask (..., N) with the best `min_k` experts on and everything beyond the best `max_k` off."""
    choices = probs.shape[-1]
    if max_k is not None and max_k < choices:
        mask = mask & largest(probs, max_k)
    return mask | largest(probs, min(min_k, choices)) if min_k else mask


def _check_bounds(name: str, min_k: int, max_k: int | None) -> None:
    if min_k < 0 or (max_k is not None and max_k < max(min_k, 1)):
        raise ConfigError(f"{name} needs 0 <= min_k <= max_k and max_k >= 1, got min_k={min_k}, max_k={max_k}")


@selectors.register("positive", given=("scores", "real"), sparse=True)
def positive(
    probs: Tensor,
    ctx: Context,
    *,
    normalise: str = "none",
    weight: str = "prob",
    omega: float = 1.0,
    grad: str = "soft",
    scores: Tensor | None = None,
    real: int | None = None,
) -> Tensor:
    """Keep the experts of positive score (ReMoE, arXiv 2412.14711, with link relu; BlockFFN with relu_rms).

    A token without a positive score uses no expert: the frozen layer alone.
    """
    check_switches(normalise=normalise, weight=weight, grad=grad)
    mask = (probs if scores is None else scores).detach() > 0
    return weigh(probs, mask, normalise=normalise, weight=weight, omega=omega, grad=grad, real=real)


@selectors.register("relative", given=("real",), sparse=True)
def relative(
    probs: Tensor,
    ctx: Context,
    *,
    rho: float = 0.5,
    min_k: int = 1,
    max_k: int | None = None,
    normalise: str = "none",
    weight: str = "prob",
    omega: float = 1.0,
    grad: str = "soft",
    real: int | None = None,
) -> Tensor:
    """Keep the experts whose prob reaches `rho` times the token's best one (DynaMoE, arXiv 2603.01697; inferred).

    The paper says "percentile-thresholded gate"; a percentile per token would keep a constant number, so this follows
    the reading that gives a number between `min_k` and `max_k`. It reads probs only of the token itself.

    Options:
        rho: in [0, 1]; 0 keeps all experts, 1 the best alone (and its ties).
        min_k, max_k: how many to keep at least and at most; null for no upper bound.
    """
    check_switches(normalise=normalise, weight=weight, grad=grad)
    _check_bounds("relative", min_k, max_k)
    if not 0 <= rho <= 1:
        raise ConfigError(f"relative needs 0 <= rho <= 1, got rho={rho}")
    values = probs.detach()
    mask = bounded(values >= rho * values.amax(-1, keepdim=True), values, min_k, max_k)
    return weigh(probs, mask, normalise=normalise, weight=weight, omega=omega, grad=grad, real=real)


@selectors.register("per_expert", given=("price", "real"), sparse=True)
class PerExpert(nn.Module):
    """Keep the experts whose `prob - price` exceeds the expert's own threshold.

    With weights `const` and a straight-through gradient, sigmoid links and a threshold of 0.5 this is the hard
    on/off gate of Router-Tuning (arXiv 2410.13184).

    Options:
        threshold: one number, or a list of one per expert (null experts included).
        min_k, max_k: how many to keep at least and at most; null for no upper bound.
    """

    threshold: Tensor

    def __init__(
        self,
        dim: int,
        num_choices: int,
        *,
        threshold: float | Sequence[float] = 0.5,
        min_k: int = 0,
        max_k: int | None = None,
        normalise: str = "none",
        weight: str = "prob",
        omega: float = 1.0,
        grad: str = "soft",
    ) -> None:
        super().__init__()
        check_switches(normalise=normalise, weight=weight, grad=grad)
        _check_bounds("per_expert", min_k, max_k)
        listed = list(threshold) if isinstance(threshold, (list, tuple)) else [threshold] * num_choices
        if len(listed) != num_choices or not all(math.isfinite(value) for value in listed):
            raise ConfigError(
                f"per_expert needs one finite threshold, or {num_choices} of them, one per expert; got {threshold!r}"
            )
        self.min_k, self.max_k = min_k, max_k
        self.switches = {"normalise": normalise, "weight": weight, "omega": omega, "grad": grad}
        self.register_buffer("threshold", torch.tensor(listed, dtype=torch.float32))

    def forward(
        self,
        probs: Tensor,
        ctx: Context,
        *,
        progress: float = 0.0,
        price: Tensor | None = None,
        real: int | None = None,
    ) -> Tensor:
        """Select from probs (B, S, N) -> gates (B, S, N)."""
        biased = (probs if price is None else probs - price).detach()
        mask = bounded(biased > self.threshold, biased, self.min_k, self.max_k)
        return weigh(probs, mask, price, real=real, **self.switches)

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Put the experts in another order."""
        self.threshold.copy_(self.threshold[order])


def attention_received(hidden: Tensor, valid: Tensor | None) -> Tensor:
    """Return (B, S): how much attention each token gets from the other tokens of its row, averaged over them.

    Softmax over the other tokens of `x_q . x_t / sqrt(d)`, hidden states x (B, S, d). The attention weights of the
    model itself do not reach routers (fused attention never forms them), so its hidden states stand in for them; a
    token's attention to itself would drown the rest and is left out. Padding neither gives nor gets attention.
    """
    rows, length, dim = hidden.shape
    scores = hidden @ hidden.transpose(1, 2) / dim**0.5
    others = ~torch.eye(length, dtype=torch.bool, device=hidden.device).expand(rows, -1, -1)
    asking = torch.ones(rows, length, dtype=torch.bool, device=hidden.device) if valid is None else valid
    others = others & asking[:, None, :]
    given = torch.softmax(scores.masked_fill(~others, torch.finfo(scores.dtype).min), -1) * others
    given = given * asking[:, :, None]
    return given.sum(1) / asking.sum(1, keepdim=True).clamp_min(1)


@selectors.register("dynamic_k", given=("hidden", "real"), sparse=True)
def dynamic_k(
    probs: Tensor,
    ctx: Context,
    *,
    max_k: int = 4,
    p: float = 0.75,
    by: str = "attention",
    normalise: str = "none",
    weight: str = "prob",
    omega: float = 1.0,
    grad: str = "soft",
    hidden: Tensor | None = None,
    real: int | None = None,
) -> Tensor:
    """Keep K_t of the best experts, more for important tokens (DA-MoE, arXiv 2409.06669; K_t is inferred).

    `K_t = clamp(ceil(max_k * importance_t / max importance), 1, max_k)` with the attention that a token receives as its
    importance: our reading of a formula that we could not verify. Attention received comes from later tokens too, so it
    is used only where the model reads the whole input at once (`ctx.causal` is False: BERT, encoders). A causal model
    falls back, in training and in use alike, to the router's own confidence: the most probable experts up to a mass of
    `p`, at most `max_k`.

    Options:
        max_k: the largest K.
        p: the mass of the fallback.
        by: `attention` with that fallback, or `confidence` everywhere.
    """
    check_switches(normalise=normalise, weight=weight, grad=grad)
    _check_bounds("dynamic_k", 1, max_k)
    if by not in ("attention", "confidence"):
        raise ConfigError(f"dynamic_k option by={by!r} is unknown; known: attention, confidence")
    if not 0 <= p <= 1:
        raise ConfigError(f"dynamic_k needs 0 <= p <= 1, got p={p}")
    limit = min(max_k, probs.shape[-1])
    whole = not ctx.causal and hidden is not None and hidden.shape[1] == probs.shape[1] > 1
    if by == "attention" and whole:
        importance = attention_received(hidden.detach(), ctx.valid)
        # a little above, so that rounding does not turn max_k * 1.0 into one expert more
        share = importance / importance.amax(1, keepdim=True).clamp_min(torch.finfo(importance.dtype).tiny)
        count = torch.ceil(max_k * share - 1e-4).clamp(1, limit)
        ranks = probs.detach().argsort(-1, descending=True).argsort(-1)
        mask = ranks < count[..., None]
    else:
        mask = bounded(nucleus(probs, p, "include", 1), probs.detach(), 1, limit)
    return weigh(probs, mask, normalise=normalise, weight=weight, omega=omega, grad=grad, real=real)


@losses.register("capacity", at_balance=lambda experts: 0.0)
def capacity(routing: Routing, ctx: Context, *, target: float = 0.5) -> Tensor:
    """Return `relu(mean gate - target)`: gates that are on or off may be on for at most a `target` share of tokens.

    Router-Tuning (arXiv 2410.13184). The gradient needs gates that have one: `grad: straight_through` or soft gates.
    """
    mean = mean_over_tokens(routing.gates, ctx.weights(routing.gates)).mean()
    return torch.relu(mean - target)
