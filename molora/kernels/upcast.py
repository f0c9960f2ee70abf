"""A frozen bfloat16 or float16 linear layer on a processor without units for it: multiply in float32.

Such processors run half-precision products 7 times slower than float32 forward and 37 to 82 times slower backward
(1024 x 1024, 16 to 512 tokens, AVX2). Converting the weight for each call costs 6 to 50 % of a float32 product
instead. The weight stays stored in half precision; the float32 copy lives for the length of one product.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Below this many tokens the conversion costs more than the slow product.
FROM_TOKENS = 8


@functools.cache
def is_slow(dtype: torch.dtype) -> bool:
    """Tell whether this processor lacks units for a half-precision dtype."""
    known = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if dtype not in known:
        return False
    probe = getattr(torch.ops.mkldnn, known[dtype], None)
    return probe is not None and not probe()


def upcasts(base: nn.Module, x: Tensor, wanted: bool | None = None) -> bool:
    """Tell whether `frozen_linear` should stand in for the base layer.

    Args:
        base: the base layer; only an exact nn.Linear without hooks and without trainable parameters qualifies.
        x: (..., d_in).
        wanted: True and False decide; None follows the environment variable MOLORA_UPCAST (0 or 1), then the rule:
            a half-precision weight on a processor without units for it, and 8 tokens or more.
    """
    if x.dtype is torch.float32 or x.dtype not in (torch.bfloat16, torch.float16) or x.device.type != "cpu":
        return False
    if type(base) is not nn.Linear or base.weight.dtype != x.dtype or torch.is_autocast_enabled("cpu"):
        return False
    if any(p.requires_grad for p in (base.weight, base.bias) if p is not None) or has_hooks(base):
        return False
    if wanted is None and "MOLORA_UPCAST" in os.environ:
        wanted = os.environ["MOLORA_UPCAST"] != "0"
    if wanted is None:
        wanted = is_slow(x.dtype) and x.numel() >= FROM_TOKENS * x.shape[-1]
    return wanted


def has_hooks(module: nn.Module) -> bool:
    """Tell whether somebody watches the calls of a module."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `x W^T + b` in the dtype of x, multiplied in float32; no gradient reaches weight and bias.

    Args:
        x: (..., d_in) in half precision.
        weight: (d_out, d_in), bias: (d_out,), both frozen.
    """
    if torch.compiler.is_compiling():
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    return _FrozenLinear.apply(x, weight, bias)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)  # as stored: the float32 copy is made again
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None]:
        (weight,) = ctx.saved_tensors
        dx = (dy.float() @ weight.float()).to(dy.dtype) if ctx.needs_input_grad[0] else None
        return dx, None, None
