"""Selectors: probs (B, S, E) -> gates (B, S, E), float32.

A selector is a function `(probs, ctx, *, options) -> gates`. Published systems differ in four places, and each is an
explicit option here (names in brackets are the options):

- which experts stay: the top k, or the shortest prefix whose probability reaches p, with the expert that crosses p
  kept or not (`crossing`);
- what weighs them (`weight`): `prob`, a constant `omega`, or the `biased` score that selected them (prob - price);
- how the weights are scaled (`normalise`): `none`, `sum1` (they sum to 1), `sumk` (they sum to how many stay) or
  `real` (those of the real experts sum to 1, whatever the null experts among the chosen hold);
- what gradient the router gets (`grad`): `soft` (through the weights), `straight_through` (the value of the gate, the
  gradient of the prob, to all experts), `policy` (none here: what trains the router is an objective) or `none`.

With k = 1 and `sum1` the gate is the constant 1 and a soft gradient is exactly zero: use `none`, or straight_through.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..registry import Registry
from . import choice
from .entropy import entropies
from .types import Context

# Fact `sparse`: unless `grad` is straight_through, gradients reach the router only through the gates of selected
# experts, so kernels may leave out the gradient of gates that are zero. A selector without it gets every gradient.
selectors = Registry("selector")

_SWITCHES = {
    "normalise": ("none", "sum1", "sumk", "real"),
    "weight": ("prob", "const", "biased"),
    "grad": ("soft", "straight_through", "policy", "none"),
    "crossing": ("include", "exclude"),
    "pin": choice.PINS,
    "second": choice.SECONDS,
}


def check_switches(**values: str) -> None:
    """Raise ConfigError for values that a switch of the module docstring does not have."""
    for name, value in values.items():
        if value not in _SWITCHES[name]:
            raise ConfigError(f"selector option {name}={value!r} is unknown; known: {', '.join(_SWITCHES[name])}")


def weigh(
    probs: Tensor,
    mask: Tensor,
    price: Tensor | None = None,
    *,
    normalise: str = "none",
    weight: str = "prob",
    omega: float = 1.0,
    grad: str = "soft",
    scale: float = 1.0,
    real: int | None = None,
) -> Tensor:
    """Turn a selection into gates.

    Args:
        probs: (B, S, E).
        mask: (B, S, E) bool, the experts that stay.
        price: (E,) what was subtracted from probs to select; read by `weight='biased'`.
        normalise, weight, omega, grad: the switches of the module docstring.
        scale: multiplies the gates after all else.
        real: how many of the E are real experts (they come first); read by `normalise='real'`, none for all.
    """
    if weight == "const":
        values = torch.full_like(probs, omega)
    elif weight == "biased" and price is not None:
        values = probs - price
    else:
        values = probs
    if normalise == "none":
        gates = values * mask
    elif normalise == "real" and real is not None and real < probs.shape[-1]:
        gates = values * mask
        total = gates[..., :real].sum(-1, keepdim=True)
        gates = gates / torch.where(total == 0, torch.ones_like(total), total)  # no real expert: only null ones act
    else:
        gates = _Normalised.apply(values, mask, normalise == "sumk")
    if scale != 1.0:
        gates = gates * scale
    if grad == "straight_through":
        return gates.detach() + (probs - probs.detach())  # the bracket is exactly 0: no rounding of the gates
    return gates if grad == "soft" else gates.detach()


class _Normalised(torch.autograd.Function):
    """Selected values over their sum, times how many they are if asked.

    Keeps the values alone for backward, which for probs their softmax has kept already; plain autograd would keep two
    more tensors of the gates' size for every decision.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, mask: Tensor, times_count: bool) -> Tensor:
        ctx.save_for_backward(values, mask)
        ctx.times_count = times_count
        gates, total, _, count = _parts(values, mask, times_count)
        return gates / total * count

    @staticmethod
    def backward(ctx: Any, dgates: Tensor) -> tuple[Tensor, None, None]:
        # from the inputs again, in differentiable operators, so that second derivatives are right too
        values, mask = ctx.saved_tensors
        gates, total, empty, count = _parts(values, mask, ctx.times_count)
        common = (dgates * gates).sum(-1, keepdim=True) / total * ~empty
        return mask * (dgates - common) / total * count, None, None


def _parts(values: Tensor, mask: Tensor, times_count: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | int]:
    """Return the selected values (B, S, E), their sum and whether it is 0 (B, S, 1), and the factor after division."""
    gates = values * mask
    total = gates.sum(-1, keepdim=True)
    # a sum of 0 means that nothing is selected (or everything selected weighs 0): the gates stay 0
    empty = total == 0
    total = torch.where(empty, torch.ones_like(total), total)
    return gates, total, empty, mask.sum(-1, keepdim=True) if times_count else 1


@selectors.register("softmax")
def softmax(probs: Tensor, ctx: Context, *, normalise: str = "none", grad: str = "soft") -> Tensor:
    """Keep every expert with its probability (soft mixture; MoLoRA, arXiv 2309.05444, HydraLoRA, arXiv 2404.19245).

    Options:
        normalise: `sum1` divides by the sum, for links other than softmax (Poly and MHR: sigmoid); else `none`.
    """
    check_switches(normalise=normalise, grad=grad)
    if normalise not in ("none", "sum1"):
        raise ConfigError(f"selector softmax knows normalise none or sum1, got {normalise!r}")
    if normalise == "sum1":
        return weigh(probs, torch.ones_like(probs, dtype=torch.bool), normalise=normalise, grad=grad)
    return probs if grad in ("soft", "straight_through") else probs.detach()


@selectors.register("top_k", given=("price", "real"), sparse=True)
def top_k(
    probs: Tensor,
    ctx: Context,
    *,
    k: int = 2,
    normalise: str = "sum1",
    weight: str = "prob",
    omega: float = 1.0,
    grad: str = "soft",
    clamp: bool = False,
    scale: float = 1.0,
    n_group: int = 1,
    topk_group: int = 1,
    group_score: str = "max",
    pin: str = "none",
    second: str = "always",
    explore: float = 0.0,
    price: Tensor | None = None,
    real: int | None = None,
) -> Tensor:
    """Keep the k experts of highest `prob - price` (Mixtral-style with `sum1`; MoLA, arXiv 2402.08562).

    Options:
        clamp: allow k > E and keep all E there, for models with fewer experts in some layers; otherwise an error.
        scale: multiplies the gates (route_scale of DeepSeek-V3, arXiv 2412.19437).
        n_group, topk_group, group_score: choose inside the `topk_group` best of `n_group` groups of neighbours, scored
            by their `max`, the sum of their two largest (`top2`) or their `sum`, all of `prob - price`.
        pin: what a label of `expert_ids` does: nothing; `last` (in training, the labelled expert takes the place of
            the last one chosen if it is absent: Post-MoE, arXiv 2410.10626); `hard` (it alone, with weight 1: ProMoE).
        second: `random` keeps the experts after the first by chance in training (GShard, arXiv 2006.16668).
        explore: the share of tokens that choose at random in training, 1 for all of them.
    """
    check_switches(normalise=normalise, weight=weight, grad=grad, pin=pin, second=second)
    experts = probs.shape[-1]
    k = choice.check_count(experts, k, clamp, explore)
    choice.check_groups(experts, k, n_group, topk_group, group_score)
    biased = probs if price is None else probs - price
    if explore and ctx.training:
        biased = choice.explored(biased, explore)
    ranked = biased
    if topk_group < n_group:
        ranked = biased.masked_fill(~choice.best_groups(biased, n_group, topk_group, group_score), -torch.inf)
    mask = choice.largest(ranked, k)
    labels = choice.labels_of(ctx, probs) if pin == "hard" or (pin == "last" and ctx.training) else None
    if labels is not None and pin == "last":
        mask = choice.pin_last(mask, biased, labels)
    gates = weigh(
        probs, mask, price, normalise=normalise, weight=weight, omega=omega, grad=grad, scale=scale, real=real
    )
    if second == "random" and ctx.training:
        gates = choice.thinned(gates, mask, k)
    if labels is not None and pin == "hard":
        alone = torch.zeros_like(gates).scatter(-1, labels.clamp_min(0), 1.0)
        gates = torch.where(labels >= 0, alone, gates)
    return gates


def nucleus(probs: Tensor, p: float, crossing: str, min_k: int) -> Tensor:
    """Return (B, S, E) bool: the most probable experts up to a mass of p, at least `min_k` of them.

    Works on the mass that comes before an expert: a running sum in float32 can pass 1 early and drop the last expert.
    """
    ranked = probs.detach().sort(-1, descending=True)
    before = ranked.values.cumsum(-1) - ranked.values
    if p >= 1:
        kept = torch.ones_like(before, dtype=torch.bool)
    elif crossing == "include":
        kept = before < p
    else:
        kept = before + ranked.values <= p
    kept[..., : min(min_k, probs.shape[-1])] = True
    return torch.zeros_like(kept).scatter(-1, ranked.indices, kept)


@selectors.register("top_p", given=("real",), sparse=True)
def top_p(
    probs: Tensor,
    ctx: Context,
    *,
    p: float = 0.75,
    crossing: str = "include",
    min_k: int = 1,
    normalise: str = "none",
    weight: str = "prob",
    omega: float = 1.0,
    grad: str = "soft",
    real: int | None = None,
) -> Tensor:
    """Keep the most probable experts until their mass reaches p (Dynamic MoE, arXiv 2403.07652).

    Options:
        p: the mass, in [0, 1]; 1 keeps all experts.
        crossing: `include` keeps the expert that crosses p (the usual nucleus), `exclude` drops it.
        min_k: how many to keep at least.
    """
    check_switches(normalise=normalise, weight=weight, grad=grad, crossing=crossing)
    _check_nucleus("top_p", p, min_k)
    mask = nucleus(probs, p, crossing, min_k)
    return weigh(probs, mask, normalise=normalise, weight=weight, omega=omega, grad=grad, real=real)


def _check_nucleus(name: str, p: float, min_k: int) -> None:
    if not 0 <= p <= 1:
        raise ConfigError(f"{name} needs 0 <= p <= 1, got p={p}")
    if min_k < 0:
        raise ConfigError(f"{name} needs min_k >= 0, got {min_k}")


@selectors.register("entropy_switch", given=("real",), sparse=True)
def entropy_switch(
    probs: Tensor,
    ctx: Context,
    *,
    threshold: float = 0.9,
    entropy: str = "tsallis",
    q: float = 1.1,
    p: float = 0.75,
    crossing: str = "exclude",
    min_k: int = 2,
    normalise: str = "none",
    weight: str = "prob",
    omega: float = 1.0,
    grad: str = "soft",
    real: int | None = None,
) -> Tensor:
    """Uncertain tokens use all experts, confident ones their nucleus (DynMoLE, arXiv 2504.00661).

    A token is uncertain when the normalised entropy of its probs exceeds `threshold`. The defaults are the authors'
    code: Tsallis with q = 1.1, the crossing expert dropped, at least 2 experts, gates not renormalised. Whether the
    paper itself renormalises or keeps the crossing expert could not be verified. Probs of links other than softmax
    are divided by their sum for the entropy only.

    Options:
        threshold: in [0, 1]; 1 never switches to all experts, a negative value always does.
        entropy: `tsallis`, `renyi` (both of order q) or `shannon`.
        p, crossing, min_k: the nucleus, as in top_p.
    """
    check_switches(normalise=normalise, weight=weight, grad=grad, crossing=crossing)
    _check_nucleus("entropy_switch", p, min_k)
    measure = entropies.get(entropy)
    shares = probs.detach().clamp_min(0)  # negative probs (identity link) have no entropy
    shares = shares / shares.sum(-1, keepdim=True).clamp_min(torch.finfo(shares.dtype).tiny)
    uncertain = (measure(shares) if entropy == "shannon" else measure(shares, q=q)) > threshold
    mask = nucleus(probs, p, crossing, min_k) | uncertain[..., None]
    return weigh(probs, mask, normalise=normalise, weight=weight, omega=omega, grad=grad, real=real)
