"""Merging low-rank experts into one: by their products, which is exact, or by their factors, which is another thing.

An expert is a pair A (r, d_in), B (d_out, r) that adds `B A` to a weight. Two ways to make one pair of several:

- `product_merge`: `sum_e w_e B_e A_e`, what the sum of their outputs is (identity I1). Its rank is the sum of theirs.
- `factor_merge`: `(sum_e w_e B_e) (sum_e w_e A_e)`, what Poly, MHR and SMEAR do on purpose and train with. Its rank is
  theirs. Where weights sum to 1 it misses `cross_term`, the weighted covariance of the factors (identity I2), which
  is zero for a shared A, for one expert, and hardly ever else: averaging the factors of LoRAs that were trained apart
  is a mistake.

`compress` brings the first back to a small rank, with the smallest error any rank can have.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ConfigError

Pair = tuple[Tensor, Tensor]  # A (r, d_in), B (d_out, r)


def product_merge(pairs: Sequence[Pair], weights: Sequence[float] | Tensor) -> Pair:
    """Return A (sum of r, d_in) and B (d_out, sum of r) with `B A = sum_e w_e B_e A_e`, exactly."""
    _check(pairs, weights)
    return torch.cat([A for A, _ in pairs]), torch.cat([B * w for (_, B), w in zip(pairs, weights, strict=True)], 1)


def factor_merge(pairs: Sequence[Pair], weights: Sequence[float] | Tensor) -> Pair:
    """Return A (r, d_in) and B (d_out, r), each the weighted sum of the factors: not the sum of the updates.

    Raises:
        ConfigError: the ranks differ.
    """
    _check(pairs, weights, equal=True)
    terms = list(zip(pairs, weights, strict=True))
    return sum(A * w for (A, _), w in terms), sum(B * w for (_, B), w in terms)


def cross_term(pairs: Sequence[Pair], weights: Sequence[float] | Tensor) -> Pair:
    """Return A and B with `B A = sum_e w_e (B_e - B') (A_e - A')`, A' and B' the weighted means of the factors.

    For weights that sum to 1 this is the product merge minus the factor merge (identity I2).
    """
    A_mean, B_mean = factor_merge(pairs, weights)
    return product_merge([(A - A_mean, B - B_mean) for A, B in pairs], weights)


def svd(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the SVD of B A as U (d_out, k), values (k,) in falling order, V (d_in, k), float64, k at most the rank R.

    From QR of the two factors, A (R, d_in) and B (d_out, R), and an SVD of the small product between, so that a stack
    of many experts costs no d_out x d_in matrix.
    """
    Qa, Ra = torch.linalg.qr(A.double().T)
    Qb, Rb = torch.linalg.qr(B.double())
    U, values, Vh = torch.linalg.svd(Rb @ Ra.T)
    kept = len(values)
    return Qb @ U[:, :kept], values, Qa @ Vh[:kept].T


def compress(A: Tensor, B: Tensor, rank: int | None = None, tolerance: float = 0.0) -> tuple[Tensor, Tensor, float]:
    """Return the nearest pair of a lower rank: A (k, d_in), B (d_out, k), and how far it is.

    The singular values are exact (see `svd`); both factors get the square roots of the values.

    Args:
        A, B: (R, d_in) and (d_out, R), such as a product merge.
        rank: the largest k; none: as many as the tolerance needs.
        tolerance: smallest k whose relative error is at most this; 0 keeps all values above rounding.

    Returns:
        A, B in their dtypes, and the relative error `||B A - B' A'|| / ||B A||` in the Frobenius norm, 0 for B A = 0.
    """
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
        raise ConfigError(f"compress needs A (R, d_in) and B (d_out, R), got {tuple(A.shape)} and {tuple(B.shape)}")
    if rank is not None and rank < 1:
        raise ConfigError(f"compress needs rank >= 1, got {rank}")
    if not 0 <= tolerance < 1:
        raise ConfigError(f"compress needs 0 <= tolerance < 1, got {tolerance}")
    U, values, V = svd(A, B)
    total = values.norm()
    # error of keeping the first k: the norm of the rest
    rest = torch.cat([values.flip(0).square().cumsum(0).flip(0), values.new_zeros(1)]).sqrt()
    errors = rest / total.clamp_min(1e-300)
    rounding = max(A.shape[1], B.shape[0]) * torch.finfo(torch.float64).eps
    enough = int((errors > max(tolerance, rounding)).sum()) if total > 0 else 0
    k = max(1, min(enough, len(values) if rank is None else rank))
    root = values[:k].sqrt()
    small_A = (V[:, :k] * root).T
    small_B = U[:, :k] * root
    error = float(errors[min(k, len(values))]) if total > 0 else 0.0
    return small_A.to(A.dtype).contiguous(), small_B.to(B.dtype).contiguous(), error


def _check(pairs: Sequence[Pair], weights: Sequence[float] | Tensor, equal: bool = False) -> None:
    if not pairs or len(pairs) != len(weights):
        raise ConfigError(f"merging needs one weight per expert, got {len(pairs)} experts and {len(weights)} weights")
    shapes = {(A.shape[1], B.shape[0]) for A, B in pairs}
    if len(shapes) > 1 or any(A.shape[0] != B.shape[1] for A, B in pairs):
        raise ConfigError(f"experts of one layer are A (r, d_in), B (d_out, r) of one d_in and d_out; got {shapes}")
    ranks = sorted({A.shape[0] for A, _ in pairs})
    if equal and len(ranks) > 1:
        raise ConfigError(f"factors of different ranks {ranks} have no mean; merge products and compress them instead")
