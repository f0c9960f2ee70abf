"""Entropies of distributions over experts, normalised to [0, 1]: 0 at one-hot, 1 at uniform.

Each takes probs (..., E) that sum to 1 over the last axis and returns (...). Safe at p = 0, at q = 1, and in gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import ConfigError
from ..registry import Registry

entropies = Registry("entropy")

_NEAR_ONE = 1e-4  # closer to order 1 than this, the Shannon limit is more exact than the quotient in float32


def _check_order(q: float) -> None:
    # At q <= 0 an expert of probability 0 counts as much as any other, or infinitely more.
    if not 0 < q < math.inf:
        raise ConfigError(f"the order q of an entropy must be a positive number, got {q}; 1 is Shannon, 2 is Gini")


def _log(probs: Tensor) -> Tensor:
    # p log p is 0 at p = 0, so the clamp changes no value; it keeps the gradient finite.
    return probs.clamp_min(torch.finfo(probs.dtype).tiny).log()


@entropies.register("shannon")
def shannon(probs: Tensor) -> Tensor:
    """Shannon entropy `-sum p ln p`, divided by `ln E`."""
    experts = probs.shape[-1]
    if experts == 1:
        return torch.zeros_like(probs[..., 0])
    return -(probs * _log(probs)).sum(-1) / math.log(experts)


@entropies.register("tsallis")
def tsallis(probs: Tensor, *, q: float = 1.1) -> Tensor:
    """Tsallis entropy `(1 - sum p^q) / (q - 1)`, divided by its value at uniform; q = 1 is Shannon, q = 2 is Gini.

    DynMoLE (arXiv 2504.00661) switches on it with q = 1.1.
    """
    _check_order(q)
    experts = probs.shape[-1]
    if experts == 1 or abs(q - 1) < _NEAR_ONE:
        return shannon(probs)
    # expm1 keeps the digits that `1 - sum p^q` would cancel when q is near 1
    value = -(probs * torch.expm1((q - 1) * _log(probs))).sum(-1) / (q - 1)
    return value / (-math.expm1((1 - q) * math.log(experts)) / (q - 1))


@entropies.register("renyi")
def renyi(probs: Tensor, *, q: float = 2.0) -> Tensor:
    """Rényi entropy `ln(sum p^q) / (1 - q)`, divided by `ln E`; q = 1 is Shannon."""
    _check_order(q)
    experts = probs.shape[-1]
    if experts == 1 or abs(q - 1) < _NEAR_ONE:
        return shannon(probs)
    if abs(q - 1) < 0.1:  # dividing by a small 1 - q would blow up the rounding of a sum near 1
        log_sum = torch.log1p((probs * torch.expm1((q - 1) * _log(probs))).sum(-1))
    else:
        log_sum = torch.logsumexp(q * _log(probs), dim=-1)
    return log_sum / ((1 - q) * math.log(experts))
