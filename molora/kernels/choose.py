"""Which kernel a bank uses: one rule over shapes, device, dtype and mode.

All kernels compute the same function; law tests hold each to `dense`. The crossing points were measured on two AVX2
cores with float32 experts (d = 576 to 2048, E = 4 to 64, r = 4 to 16, k = 1 to 4); the rule was not tuned on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..errors import ConfigError, did_you_mean
from . import grouped as _grouped
from . import native as _native
from . import tenants as _tenants
from . import triton as _triton
from . import union as _union
from .dense import dense, dense_shared
from .fused import full_precision, fused
from .layout import Layout

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Layout, bool], Tensor]

# Ranks of all experts per active expert, beyond which skipping the others repays a sort and two gathers. Flat between
# 70 and 100; the cause is that dense costs 4 N d R operations and grouped about 7 passes over k N d numbers.
DENSE_RANKS_PER_ACTIVE = 80
# The C operator against the matrix library's dense products: it runs at about their speed (0.97 to 1.1 of their time
# with all experts active, in proportion with fewer), so it wins unless nearly all experts are active, and for few
# tokens always, where the library itself is far from its peak.
NATIVE_ACTIVE_SHARE = 0.9
FEW_TOKENS = 64
NATIVE_RANK = 4  # below this its inner loops are too short for more than a few tokens
# For so few tokens the union of their experts is worth looking up, when it is expected to be at most this part of all.
UNION_TOKENS = 32
UNION_SHARE = 0.6
# One token over few ranks: two whole products are cheaper than finding out which experts are used.
SMALL_STACK = 140_000  # R * (d_in + d_out)


def definition(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, gates: Tensor, layout: Layout, in_place: bool = False
) -> Tensor:
    """Return y plus the delta by the definition in dense.py, under plain autograd; never in place."""
    with full_precision(x.device):
        scaled = gates.to(A.dtype) * layout.scale
        if layout.shared:
            delta = dense_shared(x.to(A.dtype), A, B, scaled)
        else:
            delta = dense(x.to(A.dtype), A, B, layout.spread(scaled))
        return (y + delta).to(y.dtype)


KERNELS: dict[str, Kernel] = {
    "dense": definition,
    "fused": fused,
    "native": _native.native,
    "grouped": _grouped.grouped,
    "union": _union.union,
    "tenants": _tenants.tenants,
    "triton": _triton.triton,
}
_LIMITS = {
    "native": _native.why_not,
    "grouped": _grouped.why_not,
    "union": _union.why_not,
    "tenants": _tenants.why_not,
    "triton": _triton.why_not,
}
# these compute no gradient at all
_INFERENCE_ONLY = ("union", "tenants", "triton")

_forced: str | None = None


def check_name(name: str) -> str:
    """Return the name of a kernel; raise ConfigError with the nearest known name when it is unknown."""
    if name not in KERNELS:
        raise ConfigError(f"kernel '{name}' is unknown{did_you_mean(name, KERNELS)}")
    return name


@contextmanager
def kernel(name: str) -> Iterator[None]:
    """Use one kernel, by name, for every bank inside the block; keep backward inside the block too.

    The environment variable MOLORA_KERNEL does the same for a whole process.

    Raises:
        ConfigError: the name is unknown. A forward raises it when the kernel cannot do what is asked of it.
    """
    global _forced
    before, _forced = _forced, check_name(name)
    try:
        yield
    finally:
        _forced = before


def is_forced() -> bool:
    """Tell whether a kernel was asked for by name."""
    return _forced is not None


if os.environ.get("MOLORA_KERNEL"):
    _forced = check_name(os.environ["MOLORA_KERNEL"])


def add_delta(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    gates: Tensor,
    layout: Layout,
    in_place: bool = False,
    sparse: bool = False,
    training: bool = False,
) -> Tensor:
    """Return y plus the delta of the experts, by the kernel that fits.

    Args:
        y: (..., d_out), the output of the base layer.
        x: (..., d_in).
        A, B: (R, d_in) and (d_out, R); A is (r, d_in) when the layout is shared.
        gates: (..., E), broadcastable to the leading axes of x.
        layout: which ranks belong to which expert, and the scale.
        in_place: allow to write into y (see fused.py).
        sparse: whether the gradient of a gate that is zero does not matter, so that it need not be computed.
        training: choose as if gradients were on: reentrant checkpointing runs a layer first without them, and the
            recompute must round alike.
    """
    name = choose(y, x, A, B, gates, layout, sparse, training)
    return KERNELS[name](y, x, A, B, gates, layout, in_place)


def choose(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    gates: Tensor,
    layout: Layout,
    sparse: bool = False,
    training: bool = False,
) -> str:
    """Return the name of the kernel for these arguments (see `add_delta`)."""
    if torch.compiler.is_compiling():
        return "dense"  # the compiler fuses it, keeps what is cheapest, and traces it without a break
    graded = (training or torch.is_grad_enabled()) and any(t.requires_grad for t in (y, x, A, B, gates))
    if _forced is not None:
        return _checked(_forced, graded, y, x, A, B, layout)
    tokens, experts = x.numel() // x.shape[-1], layout.num_experts
    # Elsewhere than on a CPU, finding out what is active makes the device wait for the host, and dense costs it next
    # to nothing for R up to a thousand (inferred, not measured).
    if x.device.type != "cpu" or tokens == 0 or (graded and not sparse) or experts == 1 or layout.rank is None:
        return "fused"
    few = not graded and tokens <= FEW_TOKENS
    has_native = _native.why_not(y, x, A, B, layout) is None
    if has_native and few:
        return "native"
    active = _mean_active(gates)
    if has_native and layout.rank >= NATIVE_RANK and active <= NATIVE_ACTIVE_SHARE * experts:
        return "native"
    if graded or tokens > UNION_TOKENS:
        worth = layout.total > DENSE_RANKS_PER_ACTIVE * active and _grouped.why_not(y, x, A, B, layout) is None
        return "grouped" if worth else "fused"
    if layout.shared:
        return "fused"
    if _row_wise(gates, x):
        return "tenants"
    if tokens == 1 and layout.total * (A.shape[1] + B.shape[0]) <= SMALL_STACK:
        return "fused"
    return "union" if min(experts, tokens * active) <= UNION_SHARE * experts else "fused"


def _checked(name: str, graded: bool, y: Tensor, x: Tensor, A: Tensor, B: Tensor, layout: Layout) -> str:
    reason = "it computes no gradient" if graded and name in _INFERENCE_ONLY else None
    if reason is None and name in _LIMITS:
        reason = _LIMITS[name](y, x, A, B, layout)
    if reason is not None:
        raise ConfigError(
            f"kernel '{name}' was asked for, but {reason}; use kernel 'fused' or leave the choice to the rule"
        )
    return name


def _mean_active(gates: Tensor) -> float:
    """Return the mean number of gates other than zero per decision."""
    return int(torch.count_nonzero(gates)) * gates.shape[-1] / max(gates.numel(), 1)


def _row_wise(gates: Tensor, x: Tensor) -> bool:
    """Tell whether each of several rows has gates of its own for all its positions."""
    return x.dim() == 3 and x.shape[0] > 1 and gates.dim() == 3 and gates.shape[:2] == (x.shape[0], 1)
