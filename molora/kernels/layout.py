"""Layout: how the ranks of a bank belong to its experts, and the two small steps that need to know it.

Shape letters: N tokens in any leading layout, E experts, r ranks of one expert, R ranks of all experts together.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How stacked ranks belong to experts.

    Attributes:
        ranks: the rank of each expert.
        shared: whether all experts read one A (r, d_in), each with its own columns of B (d_out, E * r).
        scale: multiplies the whole delta.
        num_experts: E.
        total: R, the ranks of all experts together, which is the number of columns of B.
        rank: the rank r that all experts have, or None when they differ.
    """

    ranks: tuple[int, ...]
    shared: bool = False
    scale: float = 1.0

    # worked out once, since every call of a layer reads them
    num_experts: int = field(init=False)
    total: int = field(init=False)
    rank: int | None = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_experts", len(self.ranks))
        object.__setattr__(self, "total", sum(self.ranks))
        object.__setattr__(self, "rank", self.ranks[0] if len(set(self.ranks)) == 1 else None)

    def owner(self, device: torch.device) -> Tensor:
        """Return (R,) long: the expert of each rank."""
        ranks = torch.tensor(self.ranks, device=device)
        experts = torch.arange(self.num_experts, device=device)
        return experts.repeat_interleave(ranks, output_size=self.total)

    def spread(self, gates: Tensor) -> Tensor:
        """Repeat gates (..., E) over the ranks of each expert -> (..., R)."""
        if self.rank == 1:
            return gates
        if self.rank is not None:
            return gates[..., None].expand(*gates.shape, self.rank).flatten(-2)
        return gates.index_select(-1, self.owner(gates.device))

    def gather(self, per_rank: Tensor) -> Tensor:
        """Sum (..., R) over the ranks of each expert -> (..., E), the transpose of `spread`."""
        if self.rank == 1:
            return per_rank
        if self.rank is not None:
            return per_rank.unflatten(-1, (self.num_experts, self.rank)).sum(-1)
        out = per_rank.new_zeros(*per_rank.shape[:-1], self.num_experts)
        return out.index_add(-1, self.owner(per_rank.device), per_rank)

    def gated(self, hidden: Tensor, gates: Tensor) -> Tensor:
        """Weigh hidden (..., R), or (..., r) when shared, by gates (..., E) -> (..., R)."""
        if self.shared:
            return (gates[..., :, None] * hidden[..., None, :]).flatten(-2)
        if self.rank is not None and self.rank > 1:
            weighted = hidden.unflatten(-1, (self.num_experts, self.rank)) * gates[..., None]
            return weighted.flatten(-2)
        return hidden * self.spread(gates)


def leading(gates: Tensor, x: Tensor) -> Tensor:
    """Lay gates (..., E) out along every leading axis of x (..., d) -> (N, E)."""
    return gates.expand(*x.shape[:-1], gates.shape[-1]).reshape(-1, gates.shape[-1])
