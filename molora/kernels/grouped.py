"""Few active experts among many: each expert multiplies only the tokens that use it, in sorted segments.

The (token, expert) pairs with a gate are sorted by expert, and torch's grouped product takes one segment per expert.
Backward gathers the rows of x and dy again instead of keeping them. For E * r beyond 80 times the experts per token
this beats one dense product where the C operator is missing (specs: 149 measured points).

Right only where the gradient of a gate that is zero does not matter: none is computed. Every selector whose gradient
goes through the weights of what it selected is of this kind; `grad: straight_through` is not.

Shape letters: N tokens, d_in, d_out, E experts, r ranks per expert, M pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .fused import full_precision, writable
from .layout import Layout, leading

_grouped_mm = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def why_not(y: Tensor, x: Tensor, A: Tensor, B: Tensor, layout: Layout) -> str | None:
    """Return why this kernel cannot take a call, or None when it can."""
    if _grouped_mm is None:
        return "this torch has no grouped_mm"
    if layout.shared or layout.rank is None:
        return "it needs experts with their own A and equal ranks"
    # the rows of every operand must begin at multiples of 16 bytes
    unit = 16 // A.element_size()
    sizes = {"rank": layout.rank, "d_in": A.shape[1], "d_out": B.shape[0]}
    odd = [f"{name} {size}" for name, size in sizes.items() if size % unit]
    if odd:
        return f"{', '.join(odd)} is not a multiple of {unit}, which grouped_mm needs in {A.dtype}"
    if A.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"grouped_mm does not know {A.dtype}"
    return None


def grouped(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, gates: Tensor, layout: Layout, in_place: bool = False
) -> Tensor:
    """Return y plus the delta of the experts; arguments as in `fused.fused`. No gradient at gates that are zero."""
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in (y, x, A, B, gates))):
        with full_precision(x.device):
            return _forward(y if in_place else writable(y, False), x, A, B, gates, layout)
    return _Grouped.apply(y, x, A, B, gates, layout, in_place)


class _Pairs:
    """The (token, expert) pairs with a gate, sorted by expert.

    Attributes:
        expert, token: (M,) long.
        ends: (E,) int32, where the segment of each expert ends.
        gate: (M, 1), the scale included.
    """

    def __init__(self, gates: Tensor, layout: Layout, dtype: torch.dtype) -> None:
        self.expert, self.token = gates.t().nonzero(as_tuple=True)
        self.ends = (gates != 0).sum(0).cumsum(0).to(torch.int32)
        self.gate = (gates[self.token, self.expert] * layout.scale).to(dtype)[:, None]


def _stacks(A: Tensor, B: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return views A (E, r, d_in) and Bt (E, r, d_out); a copy of B if it does not lie transposed, as in banks."""
    by_expert = (layout.num_experts, layout.rank or 1)
    return A.unflatten(0, by_expert), B.t().contiguous().unflatten(0, by_expert)


def _forward(y: Tensor, x: Tensor, A: Tensor, B: Tensor, gates: Tensor, layout: Layout) -> Tensor:
    """Add the delta into y."""
    pairs = _Pairs(leading(gates, x), layout, A.dtype)
    if pairs.token.numel() == 0:
        return y
    A3, Bt3 = _stacks(A, B, layout)
    rows = x.reshape(-1, x.shape[-1])[pairs.token].to(A.dtype)
    hidden = _grouped_mm(rows, A3.transpose(1, 2), offs=pairs.ends) * pairs.gate
    delta = _grouped_mm(hidden, Bt3, offs=pairs.ends)
    if y.dtype == delta.dtype and y.is_contiguous():
        y.view(-1, y.shape[-1]).index_add_(0, pairs.token, delta)
        return y
    # summed in the bank's dtype, rounded once
    total = delta.new_zeros(y.numel() // y.shape[-1], y.shape[-1]).index_add_(0, pairs.token, delta)
    return y.add_(total.view(y.shape))


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, gates: Tensor, layout: Layout, in_place: bool
    ) -> Tensor:
        ctx.save_for_backward(x, A, B, gates)
        ctx.layout = layout
        with full_precision(x.device):
            return _forward(writable(y, in_place), x, A, B, gates, layout)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, A, B, gates = ctx.saved_tensors
        need_y, need_x, need_A, need_B, need_gates = ctx.needs_input_grad[:5]
        layout: Layout = ctx.layout
        flat = leading(gates, x)
        dx = dA = dB = dgates = None
        with full_precision(x.device):
            pairs = _Pairs(flat, layout, A.dtype)
            A3, Bt3 = _stacks(A, B, layout)
            empty = pairs.token.numel() == 0
            rows = x.reshape(-1, x.shape[-1])[pairs.token].to(A.dtype)
            grads = dy.reshape(-1, dy.shape[-1])[pairs.token].to(A.dtype)
            dranks = (
                grads.new_zeros(0, A3.shape[1]) if empty else _grouped_mm(grads, Bt3.transpose(1, 2), offs=pairs.ends)
            )
            if need_B or need_gates:
                hidden = rows.new_zeros(0, A3.shape[1])
                if not empty:
                    hidden = _grouped_mm(rows, A3.transpose(1, 2), offs=pairs.ends)
            if need_gates:
                dgates = torch.zeros_like(flat, dtype=A.dtype)
                dgates[pairs.token, pairs.expert] = (dranks * hidden).sum(-1) * layout.scale
                dgates = dgates.view(*x.shape[:-1], gates.shape[-1]).sum_to_size(gates.shape).to(gates.dtype)
            dranks = dranks * pairs.gate
            if need_A:
                dA = torch.zeros_like(A) if empty else _grouped_mm(dranks.t(), rows, offs=pairs.ends).view(A.shape)
            if need_B:
                dB = torch.zeros_like(B)
                if not empty:
                    by_expert = _grouped_mm((hidden * pairs.gate).t(), grads, offs=pairs.ends)  # (E, r, d_out)
                    dB = by_expert.flatten(0, 1).t()
            if need_x:
                total = A.new_zeros(flat.shape[0], x.shape[-1])
                if not empty:
                    total.index_add_(0, pairs.token, _grouped_mm(dranks, A3, offs=pairs.ends))
                dx = total.view(x.shape).to(x.dtype)
        return dy if need_y else None, dx, dA, dB, dgates, None, None
