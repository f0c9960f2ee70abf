"""The dense product as one autograd node: what every bank uses unless something faster fits.

    y + scale * B ((A x) * spread(gates))

Three thin matrix products forward, five backward, whatever the number of experts. Against plain autograd over
`dense` it keeps only x and the gates for backward (and the hidden ranks, when recomputing them costs more than they
weigh), adds into the output of the base layer in place, and never makes a gated copy or a delta of full width.

Shape letters: N tokens in any leading layout, d_in, d_out, E experts, R ranks of all experts together.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .layout import Layout

# Hidden ranks (N, R) are kept for backward when R is at most this part of d_in. Recomputing them repeats one of the
# six thin products of a step (3 to 4 % of a layer's time at R / d_in = 1/9), keeping them costs R / d_in of x.
KEEP_BELOW = 0.06


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which autocast leaves products alone: thin ones stay in the dtype of the bank."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def fused(y: Tensor, x: Tensor, A: Tensor, B: Tensor, gates: Tensor, layout: Layout, in_place: bool = False) -> Tensor:
    """Return y plus the delta of the experts.

    Args:
        y: (..., d_out), the output of the base layer.
        x: (..., d_in) in any floating dtype.
        A: (R, d_in), or (r, d_in) when shared.
        B: (d_out, R), best as the transpose of a contiguous (R, d_out), as banks store it.
        gates: (..., E), broadcastable to the leading axes of x.
        layout: which ranks belong to which expert, and the scale.
        in_place: allow to write into y. Only for a fresh y that nobody else holds and whose producer does not need
            it for its own backward, such as the output of a frozen linear layer.

    Returns:
        (..., d_out) in the dtype of y.
    """
    wanted = (y, x, A, B, gates)
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in wanted)):
        with full_precision(x.device):
            return _forward(y, x, A, B, gates, layout, in_place)[0]
    return _Fused.apply(y, x, A, B, gates, layout, in_place)


def _forward(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, gates: Tensor, layout: Layout, in_place: bool
) -> tuple[Tensor, Tensor]:
    """Return y with the delta (in place or not) and the hidden ranks (..., R)."""
    hidden = (_rows(x).to(A.dtype) @ A.t()).view(*x.shape[:-1], A.shape[0])
    ranks = layout.gated(hidden, gates.to(A.dtype) * layout.scale)
    return add_product(y, ranks, B.t(), in_place), hidden


def add_product(y: Tensor, h: Tensor, Bt: Tensor, in_place: bool) -> Tensor:
    """Return y (..., d_out) + h (..., R) Bt (R, d_out), written into y when allowed and possible."""
    h2 = h.reshape(-1, h.shape[-1])
    if y.dtype != h2.dtype:
        delta = (h2 @ Bt).view(y.shape)
        return y.add_(delta) if in_place else (y + delta).to(y.dtype)
    if in_place and y.is_contiguous():
        y.view(-1, y.shape[-1]).addmm_(h2, Bt)
        return y
    # not .view: some models add into the output of a layer (Falcon), and autograd forbids that on a Function's views
    return torch.ops.aten._unsafe_view(torch.addmm(_rows(y), h2, Bt), y.shape)


def writable(y: Tensor, in_place: bool) -> Tensor:
    """Return the tensor that a Function may write its result to: y's own memory without its history, or a copy.

    Autograd is told through the version counter, so a producer that did keep y for its backward raises an error
    there. `mark_dirty` would do the same, but on views (nn.Linear with a bias returns one for 3-D inputs) it copies
    the whole gradient in backward.
    """
    if not in_place:
        return y.clone(memory_format=torch.contiguous_format)
    torch.autograd.graph.increment_version(y)
    return y.data


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, gates: Tensor, layout: Layout, in_place: bool
    ) -> Tensor:
        if in_place:
            y = writable(y, True)
        with full_precision(x.device):
            out, hidden = _forward(y, x, A, B, gates, layout, in_place)
        keep = any(ctx.needs_input_grad[3:5]) and A.shape[0] <= KEEP_BELOW * x.shape[-1]
        ctx.save_for_backward(x, A, B, gates, hidden if keep else None)
        ctx.layout = layout
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        # Differentiable products only (nothing in place on saved tensors), so that second derivatives work too.
        x, A, B, gates, hidden = ctx.saved_tensors
        layout: Layout = ctx.layout
        need_y, need_x, need_A, need_B, need_gates = ctx.needs_input_grad[:5]
        dx = dA = dB = dgates = None
        with full_precision(x.device):
            lead = x.shape[:-1]
            x2 = _rows(x).to(A.dtype) if need_A or ((need_B or need_gates) and hidden is None) else None
            if hidden is None and x2 is not None and (need_B or need_gates):
                hidden = (x2 @ A.t()).view(*lead, A.shape[0])
            dy2 = _rows(dy).to(A.dtype)
            scaled = gates.to(A.dtype) * layout.scale
            if need_B:
                dB = (_rows(layout.gated(hidden, scaled)).t() @ dy2).t()  # laid out as B is
            if need_x or need_A or need_gates:
                dranks = (dy2 @ B).view(*lead, B.shape[1])
                if need_gates:
                    dgates = _gate_gradient(dranks, hidden, layout).sum_to_size(gates.shape).to(gates.dtype)
                if need_x or need_A:
                    dhidden = _rows(_hidden_gradient(dranks, scaled, layout))
                    if need_A:
                        dA = dhidden.t() @ x2
                    if need_x:
                        dx = (dhidden @ A).view(x.shape).to(x.dtype)
        return dy if need_y else None, dx, dA, dB, dgates, None, None


def _gate_gradient(dranks: Tensor, hidden: Tensor, layout: Layout) -> Tensor:
    """Return (..., E): the gradient of each token's gates."""
    if layout.shared:
        by_expert = dranks.unflatten(-1, (layout.num_experts, -1))
        return (by_expert @ hidden[..., None]).squeeze(-1) * layout.scale
    return layout.gather(dranks * hidden) * layout.scale


def _hidden_gradient(dranks: Tensor, scaled: Tensor, layout: Layout) -> Tensor:
    """Return the gradient of the hidden ranks, in their shape."""
    if layout.shared:
        return (scaled[..., None] * dranks.unflatten(-1, (layout.num_experts, -1))).sum(-2)
    return layout.gated(dranks, scaled)
