"""The dense product as two Triton programs for GPUs, forward only. Never run on a GPU: tested in the interpreter alone.

`hidden_program` computes gated ranks `h = (x A^T) * gate * scale`, `expand_program` adds `h B^T` to the output of the
base layer, both over blocks of tokens, so that nothing of size (tokens, experts, d_out) exists. Against the torch
kernels they save one pass over the hidden ranks and the launches between. Loads are cast to float32 at once: arithmetic
on bfloat16 is wrong in the interpreter, and thin products are meant to be float32 anyway.

The rule in choose.py does not choose it; `with molora.kernel("triton")` does. Triton is imported on first use.

Shape letters: N tokens, d_in, d_out, E experts, r ranks per expert, R = E * r.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from .layout import Layout, leading


def why_not(y: Tensor, x: Tensor, A: Tensor, B: Tensor, layout: Layout) -> str | None:
    """Return why this kernel cannot take a call, or None when it can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if layout.shared or layout.rank is None:
        return "it needs experts with their own A and equal ranks"
    return None


def triton(y: Tensor, x: Tensor, A: Tensor, B: Tensor, gates: Tensor, layout: Layout, in_place: bool = False) -> Tensor:
    """Return y plus the delta of the experts, without gradient; arguments as in `fused.fused`."""
    hidden_program, expand_program, cdiv = _programs()
    rows = x.reshape(-1, x.shape[-1])
    out = y if in_place and y.is_contiguous() else y.clone(memory_format=torch.contiguous_format)
    flat_gates = leading(gates, x).to(torch.float32).contiguous()
    tokens, ranks = rows.shape[0], B.shape[1]
    if tokens == 0:
        return out
    hidden = torch.empty(tokens, ranks, device=x.device, dtype=torch.float32)
    block_n, block_r, block_d = 16, 32, 64
    hidden_program[(cdiv(tokens, block_n), cdiv(ranks, block_r))](
        rows, A, flat_gates, hidden, tokens, A.shape[1], ranks, layout.rank, layout.num_experts, layout.scale,
        rows.stride(0), rows.stride(1), A.stride(0), A.stride(1), block_n, block_r, block_d,
    )  # fmt: skip
    expand_program[(cdiv(tokens, block_n), cdiv(B.shape[0], block_d))](
        hidden, B, out, tokens, B.shape[0], ranks, B.stride(0), B.stride(1), block_n, block_r, block_d
    )
    if in_place and out is not y:
        return y.copy_(out)
    return out


@functools.cache
def _programs() -> tuple[Any, Any, Any]:
    import triton as tr
    import triton.language as tl

    @tr.jit
    def hidden_program(
        x, a, gates, out, tokens, d, ranks, rank, experts, scale, x_n, x_d, a_r, a_d,
        BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
        total = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
        for start in range(0, d, BLOCK_D):
            c = start + tl.arange(0, BLOCK_D)
            x_block = tl.load(x + n[:, None] * x_n + c[None, :] * x_d, (n[:, None] < tokens) & (c[None, :] < d), 0.0)
            a_block = tl.load(a + r[None, :] * a_r + c[:, None] * a_d, (r[None, :] < ranks) & (c[:, None] < d), 0.0)
            total += tl.dot(x_block.to(tl.float32), a_block.to(tl.float32), input_precision="ieee")
        inside = (n[:, None] < tokens) & (r[None, :] < ranks)
        gate = tl.load(gates + n[:, None] * experts + r[None, :] // rank, inside, 0.0)
        tl.store(out + n[:, None] * ranks + r[None, :], total * gate * scale, inside)

    @tr.jit
    def expand_program(
        hidden, b, y, tokens, d, ranks, b_o, b_r,
        BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        o = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        where = (n[:, None] < tokens) & (o[None, :] < d)
        at = y + n[:, None] * d + o[None, :]
        total = tl.load(at, where, 0.0).to(tl.float32)
        for start in range(0, ranks, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            h = tl.load(hidden + n[:, None] * ranks + r[None, :], (n[:, None] < tokens) & (r[None, :] < ranks), 0.0)
            b_block = tl.load(b + o[None, :] * b_o + r[:, None] * b_r, (o[None, :] < d) & (r[:, None] < ranks), 0.0)
            total += tl.dot(h, b_block.to(tl.float32), input_precision="ieee")
        tl.store(at, total.to(y.dtype.element_ty), where)

    return hidden_program, expand_program, tr.cdiv
