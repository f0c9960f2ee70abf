"""The definition of a routed low-rank product; every other kernel is tested against this one.

Shape letters: N tokens in any leading layout, d_in, d_out, R ranks of all experts together.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def dense(x: Tensor, A: Tensor, B: Tensor, rank_gates: Tensor) -> Tensor:
    """Return `B ((A x) * rank_gates)`.

    Args:
        x: (..., d_in).
        A: (R, d_in), the stacked down-projections.
        B: (d_out, R), the stacked up-projections.
        rank_gates: (..., R), broadcastable to the leading axes of x: the gate of each rank's expert, scale included.

    Returns:
        (..., d_out) in the dtype of x.
    """
    return F.linear(F.linear(x, A) * rank_gates, B)


def dense_shared(x: Tensor, A: Tensor, B: Tensor, gates: Tensor) -> Tensor:
    """Return `sum_e g_e B_e A x` for one A shared by all experts.

    Args:
        x: (..., d_in).
        A: (r, d_in).
        B: (d_out, E * r), the up-projections side by side.
        gates: (..., E), broadcastable to the leading axes of x, scale included.

    Returns:
        (..., d_out) in the dtype of x.
    """
    hidden = F.linear(x, A)
    spread = (gates[..., :, None] * hidden[..., None, :]).flatten(-2)
    return F.linear(spread, B)
