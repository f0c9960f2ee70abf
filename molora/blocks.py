"""RoutedBlock: experts that are whole MLP blocks, which share the frozen products (MixLoRA, arXiv 2404.15159).

Expert e is the frozen block with a LoRA of its own on each of its linear layers, FFN_e. The house equation holds with
blocks in the place of low-rank pairs:

    y = FFN(x) + sum_e g_e (FFN_e(x) - FFN(x)) = sum_e g_e FFN_e(x) + (1 - sum_e g_e) FFN(x)

so gates that sum to 1 give MixLoRA, and a fresh block changes nothing whatever the gates are.

The model's own code of the block runs unchanged; only its linear layers are wrapped. Between the first and the last of
them everything acts on single rows (an activation, a product of two rows, dropout), so the layers that read the input
hand on one row per (token, expert) pair, sorted by expert, and the layer that writes the output takes the pairs
together again:

    entering  u_(n,e) = (W x)_n + s B_e A_e x_n                      W x once per token
    leaving   y_n = W' (sum_e g_e h_(n,e)) + s sum_e B'_e A'_e g_e h_(n,e)    W' once per token, as it is linear

No frozen product is repeated per expert, and the low-rank ones are ordinary routed products over rows whose gates are
one-hot, so every kernel and every quantised base works as it does elsewhere.

Shape letters: N tokens, E experts, M pairs, P = M plus the rows of the plain block, f width inside the block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import RoutingError
from .kernels.layout import leading

# A token whose gates sum to 1 needs no row of the plain block; sums of float32 gates are 1 up to some 1e-7. What
# rounding leaves goes to the token's largest gate. Normalised gates get the same gradient that way, since adding a
# constant to all experts changes no normalised mixture; and where all experts are equal, it is exactly zero.
SUM_TOLERANCE = 4e-6


@dataclass
class Rows:
    """The pairs that are on their way through a block.

    Attributes:
        token: (P,) long, sorted by expert, the plain block last.
        expert: (M, E) float32, one-hot.
        weight: (P, 1) float32, the gates and what is left of 1.
        lead: the leading axes of the input.
    """

    token: Tensor
    expert: Tensor
    weight: Tensor
    lead: torch.Size
    source: Tensor | None = None
    taken: Tensor | None = None

    def inputs(self, x: Tensor) -> Tensor:
        """Return the rows (M, d) of x (..., d); the layers of a block read the same x, so it is taken once."""
        if self.source is not x or self.taken is None:
            flat = x.reshape(-1, x.shape[-1])
            self.source, self.taken = x, flat.index_select(0, self.token[: len(self.expert)])
        return self.taken


def rows_of(gates: Tensor, x: Tensor, every: bool = False) -> Rows:
    """Return the pairs of gates (..., E) that broadcast to x (..., d).

    Args:
        gates: float32.
        x: the input of the block.
        every: take the pairs whose gate is zero, too, because a gradient must reach their gates.
    """
    flat = leading(gates, x)
    tokens, experts = flat.shape
    rest = 1 - flat.sum(-1)
    is_plain = rest.detach().abs() > SUM_TOLERANCE
    largest = F.one_hot(flat.argmax(-1), experts).bool() & ~is_plain[:, None]
    flat = torch.where(largest, flat + rest[:, None], flat)
    rest = torch.where(is_plain, rest, torch.zeros_like(rest))
    if torch.compiler.is_compiling():  # a compiler wants shapes that do not depend on the gates
        token = torch.arange(tokens, device=x.device).repeat(experts + 1)
        expert = torch.arange(experts, device=x.device).repeat_interleave(tokens)
        weight = torch.cat([flat.t().reshape(-1), rest])
    else:
        wanted = torch.ones_like(flat, dtype=torch.bool) if every else flat != 0
        expert, owner = wanted.t().nonzero(as_tuple=True)
        plain = is_plain.nonzero().squeeze(1)
        token = torch.cat([owner, plain])
        weight = torch.cat([flat[owner, expert], rest[plain]])
    return Rows(token, F.one_hot(expert, experts).to(torch.float32), weight[:, None], x.shape[:-1])


class RoutedBlock:
    """What the wrapped linear layers of one MLP share: the pairs between the first layer and the last.

    It holds nothing between forwards; copies and pickles are empty.

    Args:
        name: module path of the block, for messages.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.rows: Rows | None = None

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return RoutedBlock, (self.name,)

    def enter(self, bank: Any, y: Tensor, x: Tensor) -> Tensor:
        """Return (P, f): a row per pair, for y = W x (..., f) and the block's input x (..., d)."""
        rows = self._expected()
        flat = y.reshape(-1, y.shape[-1])
        pairs = len(rows.expert)
        out = flat.index_select(0, rows.token[:pairs])
        if pairs:
            out = bank.add_to(out, rows.inputs(x), rows.expert, in_place=True, sparse=True)
        if pairs < len(rows.token):
            out = torch.cat([out, flat.index_select(0, rows.token[pairs:])])
        return out

    def leave(self, bank: Any, h: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        """Return y (..., d) for the rows h (P, f) inside the block and its frozen last layer."""
        rows, self.rows = self._expected(), None
        if h.dim() != 2 or len(h) != len(rows.token):
            raise RoutingError(
                f"block '{self.name}' was entered with {len(rows.token)} rows, but its last layer got "
                f"{tuple(h.shape)}: this MLP does more than act on single rows, so its experts cannot be blocks; use "
                "experts.form: lora for it (layers: [{match: ..., experts: {form: lora}}])"
            )
        weighted = h.float() * rows.weight
        tokens, pairs = rows.lead.numel(), len(rows.expert)
        mixed = weighted.new_zeros(tokens, h.shape[1]).index_add(0, rows.token, weighted)
        y = base(mixed.to(h.dtype).view(*rows.lead, h.shape[1]))
        if not pairs:
            return y
        start = y.new_zeros(pairs, y.shape[-1], dtype=torch.float32)
        delta = bank.add_to(start, weighted[:pairs], rows.expert, in_place=True, sparse=True)
        total = delta.new_zeros(tokens, y.shape[-1]).index_add(0, rows.token[:pairs], delta)
        return (y + total.view(y.shape)).to(y.dtype)

    def _expected(self) -> Rows:
        if self.rows is None:
            raise RoutingError(
                f"a layer of block '{self.name}' ran before the one that takes the decision, or after the block had "
                "ended; use experts.form: lora for this model"
            )
        return self.rows


@dataclass(frozen=True)
class Role:
    """What one linear layer does in a RoutedBlock: `opens` (first to read the input), `enters` or `leaves`."""

    block: RoutedBlock
    part: str
