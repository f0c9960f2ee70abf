"""A few tokens, many experts, no gradient: the dense product over the experts that some token uses.

At one token these are its k experts; at a handful of tokens their union, which is often far from all. One index
instead of a sort: for few tokens every extra operator costs more than the arithmetic that it saves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .fused import add_product, full_precision
from .layout import Layout


def why_not(y: Tensor, x: Tensor, A: Tensor, B: Tensor, layout: Layout) -> str | None:
    """Return why this kernel cannot take a call, or None when it can."""
    if layout.shared or layout.rank is None:
        return "it needs experts with their own A and equal ranks"
    return None


def union(y: Tensor, x: Tensor, A: Tensor, B: Tensor, gates: Tensor, layout: Layout, in_place: bool = False) -> Tensor:
    """Return y plus the delta of the experts; arguments as in `fused.fused`."""
    experts, rank = layout.num_experts, layout.rank or 1
    used = gates.reshape(-1, experts).ne(0).any(0).nonzero().flatten()
    if used.numel() == 0:
        return y
    with full_precision(x.device):
        some_A = A.unflatten(0, (experts, rank)).index_select(0, used).flatten(0, 1)
        some_Bt = B.t().unflatten(0, (experts, rank)).index_select(0, used).flatten(0, 1)
        some_gates = gates.index_select(-1, used).to(A.dtype) * layout.scale
        ranks = some_gates if rank == 1 else some_gates[..., None].expand(*some_gates.shape, rank).flatten(-2)
        hidden = torch.nn.functional.linear(x.to(A.dtype), some_A) * ranks
        return add_product(y, hidden, some_Bt, in_place)
