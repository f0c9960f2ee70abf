"""A layer in training as one autograd node: the frozen linear base, its router and its experts.

    y = W x + scale * sum_e g_e(x) B_e A_e x,  g = some of softmax(R x)

Three nodes of their own (base, router, experts) each make a gradient of x of full width, which autograd then adds up,
and a router of torch's operators takes as long as its experts: thin products with 4 to 16 columns run at a fifth of
the library's speed. Here backward writes one gradient of x, and keeps only x and two small tables, probs and gates.

It stands in for `Trace.decide` and the bank where both would do nothing else: a decision per token by a linear
router that nobody records, pins, shares or adds a loss to. Everything else takes the general way.

Shape letters: N tokens in any leading layout, d_in, d_out, E experts, R ranks of all experts together.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .choose import NATIVE_RANK, is_forced
from .fused import full_precision
from .layout import Layout
from .native import Layer, layer_of, library, threads_for
from .upcast import has_hooks

# From this many experts on, the matrix library computes the two products of the router's backward faster than the C
# operator (1.1 to 1.4 times at 16 experts, 1.6 to 1.9 at 64; 512 tokens, d = 576 and 1024).
WIDE_ROUTER = 16


def frozen_plain(base: nn.Module) -> bool:
    """Tell whether `base` is a float32 nn.Linear on the CPU that nobody trains, watches or has replaced parts of."""
    if type(base) is not nn.Linear or "forward" in base.__dict__ or has_hooks(base):
        return False
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    return _is_plain(weight) and not weight.requires_grad and (bias is None or not bias.requires_grad)


def _is_plain(parameter: Any) -> bool:
    is_float32 = type(parameter) is nn.Parameter and parameter.dtype is torch.float32
    return is_float32 and parameter.device.type == "cpu" and parameter.is_contiguous()


class Step:
    """The call of one bank and its router, with gradients.

    Args:
        bank: holds the parameters A (R, d_in) and Bt (R, d_out).
        router: holds the scorer, whose parameters are `weight` (E, d_in) and `bias` (E,) or None.
        form: how the router selects, as fields of `native.Layer`.
    """

    def __init__(self, bank: Any, router: Any, form: dict[str, Any]) -> None:
        self._bank, self._router, self._layout, self._form = bank, router, bank.layout, form

    def run(self, base: nn.Linear, x: Tensor) -> Tensor | None:
        """Return the output (..., d_out) of base, router and experts for x (..., d_in); None when it cannot.

        Args:
            base: as `frozen_plain` wants it.
            x: (..., d_in).
        """
        if x.dtype is not torch.float32 or type(x) not in (Tensor, nn.Parameter) or not x.is_contiguous():
            return None
        if x.numel() == 0 or has_hooks(self._router) or has_hooks(self._router.scorer):
            return None
        experts, scorer = self._bank._parameters, self._router.scorer._parameters
        A, Bt, W, bias = experts.get("A"), experts.get("Bt"), scorer.get("weight"), scorer.get("bias")
        if not (_is_plain(A) and _is_plain(Bt) and _is_plain(W)) or (bias is not None and not _is_plain(bias)):
            return None  # sharded, reparametrised or cast
        return _Step.apply(x, base.weight, base.bias, A, Bt, W, bias, self._layout, self._form)


def prepared(bank: Any, router: Any) -> Step | None:
    """Return the call of a bank and its router, or None when they are not of the kind that it knows."""
    layout: Layout = bank.layout
    form = router.plain_form()
    if form is None or router.price is not None or router.num_experts != layout.num_experts:
        return None  # a price watches what was selected
    if router.selector.fixed.get("grad", "soft") != "soft" or library() is None:
        return None
    if layout.shared or layout.rank is None or layout.rank < NATIVE_RANK or bank.frozen_A is not None:
        return None
    return Step(bank, router, form)


def can_run(x: Tensor) -> bool:
    """Tell whether nothing around a call asks for another way."""
    compiling = torch.compiler.is_compiling() or torch.nn.modules.module._has_any_global_hook()
    return not (compiling or x.device.type != "cpu" or is_forced() or torch.is_autocast_enabled("cpu"))


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        base_bias: Tensor | None,
        A: Tensor,
        Bt: Tensor,
        W: Tensor,
        bias: Tensor | None,
        layout: Layout,
        form: dict[str, Any],
    ) -> Tensor:
        tokens = x.numel() // x.shape[-1]
        y = F.linear(x, weight, base_bias)
        gates, probs = torch.empty(2, tokens, layout.num_experts).unbind()
        layer = _layer(A, Bt, W, bias, layout, form)
        failed = library().molora_decided(  # type: ignore[union-attr]
            ctypes.byref(layer),
            x.data_ptr(),
            y.data_ptr(),
            gates.data_ptr(),
            probs.data_ptr(),
            None,
            tokens,
            threads_for(tokens),
        )
        if failed:
            raise MemoryError("the C operator ran out of memory")
        ctx.save_for_backward(x, weight, A, Bt, W, bias, gates, probs)
        ctx.layout, ctx.form = layout, form
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, weight, A, Bt, W, bias, gates, probs = ctx.saved_tensors
        need_x, _, _, need_A, need_Bt, need_W, need_bias = ctx.needs_input_grad[:7]
        if ctx.form["constant"]:
            need_W = need_bias = False  # gates that do not depend on the scores
        tokens, dx = x.numel() // x.shape[-1], None
        dy = dy.contiguous()
        if need_x:
            with full_precision(x.device):
                dx = dy.view(tokens, -1) @ weight
        dA, dBt = torch.empty_like(A) if need_A else None, torch.empty_like(Bt) if need_Bt else None
        dscores, thin = torch.zeros_like(gates), W.shape[0] < WIDE_ROUTER
        dW = torch.empty_like(W) if need_W and thin else None
        layer = _layer(A, Bt, W, bias, ctx.layout, ctx.form)
        failed = library().molora_step_backward(  # type: ignore[union-attr]
            ctypes.byref(layer),
            x.data_ptr(),
            dy.data_ptr(),
            gates.data_ptr(),
            probs.data_ptr(),
            tokens,
            *[None if t is None else t.data_ptr() for t in (dx, dA, dBt, dscores, dW)],
            thin,
            threads_for(tokens),
        )
        if failed:
            raise MemoryError("the C operator ran out of memory")
        if not thin:
            with full_precision(x.device):
                dW = dscores.t() @ x.view(tokens, -1) if need_W else None
                dx = None if dx is None else dx.addmm_(dscores, W)
        dbias = dscores.sum(0) if need_bias else None
        return None if dx is None else dx.view(x.shape), None, None, dA, dBt, dW, dbias, None, None


def _layer(A: Tensor, Bt: Tensor, W: Tensor, bias: Tensor | None, layout: Layout, form: dict[str, Any]) -> Layer:
    return layer_of(A, Bt, layout, W=W.data_ptr(), bias=None if bias is None else bias.data_ptr(), **form)
