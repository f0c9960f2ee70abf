"""Router and experts of one layer in a single C call, without gradient: what decoding and prefill run on a CPU.

With one token per sequence a layer's arithmetic takes a few microseconds, and every operator of torch as much again, so
the call is prepared once per layer and repeated with three numbers. It stands in for `Trace.decide` and the bank only
where both would do nothing else: a decision per token by a linear scorer that nobody records, pins or shares.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from .choose import FEW_TOKENS, NATIVE_ACTIVE_SHARE, NATIVE_RANK, is_forced
from .layout import Layout
from .native import Layer, library, threads_for


class Routed:
    """The prepared call of one bank and its router.

    Args:
        bank: holds the parameters A (R, d_in) and B (d_out, R).
        scorer: holds the parameters `weight` (E, d_in) and `bias` (E,) or None.
        price: holds the buffer `value` (E,), or None.
        layout: which ranks belong to which expert, and the scale.
        form: how the router selects, as fields of `native.Layer`.
    """

    def __init__(
        self, bank: nn.Module, scorer: nn.Module, price: nn.Module | None, layout: Layout, form: dict[str, Any]
    ) -> None:
        self._sources = (bank._parameters, scorer._parameters, price._buffers if price is not None else {"value": None})
        self._layout, self._form = layout, form
        # where most experts act, the matrix library is faster on many tokens
        self._is_sparse = form["select"] == 1 and form["k"] <= NATIVE_ACTIVE_SHARE * layout.num_experts
        self._is_sparse = self._is_sparse and (layout.rank or 0) >= NATIVE_RANK
        self._addresses: tuple[Any, ...] | None = None
        self._call: Any = None

    def add_to(self, y: Tensor, x: Tensor) -> bool:
        """Add the delta into y (..., d_out), float32 and contiguous like x (..., d_in); False when it cannot."""
        if (
            x.dtype is not torch.float32
            or y.dtype is not torch.float32
            or not (x.is_contiguous() and y.is_contiguous())
        ):
            return False
        experts, scorer, price = self._sources
        try:
            now = (experts["A"], experts["B"], scorer["weight"], scorer.get("bias"), price["value"])
        except KeyError:  # sharded or reparametrised
            return False
        addresses = tuple([None if t is None else t.data_ptr() for t in now])
        if addresses != self._addresses and not self._prepare(now, addresses):
            return False
        tokens = x.numel() // self._d_in
        if tokens > FEW_TOKENS and not self._is_sparse:
            return False
        threads = 1 if tokens < 64 else threads_for(tokens)
        return self._call(self._layer, x.data_ptr(), y.data_ptr(), tokens, threads) == 0

    def _prepare(self, now: tuple[Tensor | None, ...], addresses: tuple[Any, ...]) -> bool:
        loaded, given = library(), [t for t in now if t is not None]
        fits = all(t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous() for t in given)
        if loaded is None or not fits:
            return False
        A, B = given[0], given[1]
        self._struct = Layer(
            d_in=A.shape[1],
            d_out=B.shape[0],
            E=self._layout.num_experts,
            r=self._layout.rank,
            b_out=B.stride(0),
            b_rank=B.stride(1),
            scale=self._layout.scale,
            **dict(zip(("A", "B", "W", "bias", "price"), addresses, strict=True)),
            **self._form,
        )
        self._d_in, self._layer = A.shape[1], ctypes.byref(self._struct)
        self._call, self._addresses = loaded.molora_routed, addresses
        return True


class Calls:
    """The prepared calls of one layer, by adapter. Copies and pickles of it are empty: a call holds addresses."""

    def __init__(self) -> None:
        self._made: dict[str, tuple[Any, Any, Routed | None]] = {}

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Calls, ()

    def add_to(self, adapter: str, bank: Any, router: Any, y: Tensor, x: Tensor) -> bool:
        """Decide and add the delta into y in one call; False when that is not possible, and then y is as it was.

        Args:
            adapter: the name of the adapter.
            bank, router: its ExpertBank and Router.
            y: (..., d_out), fresh; x: (..., d_in).
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.device.type != "cpu" or is_forced():
            return False
        made = self._made.get(adapter)
        if made is None or made[0] is not bank or made[1] is not router:
            self._made[adapter] = made = (bank, router, _prepared(bank, router))
        return made[2] is not None and made[2].add_to(y, x)


def _prepared(bank: Any, router: Any) -> Routed | None:
    layout, form = bank.layout, router.plain_form()
    if form is None or layout.shared or layout.rank is None or bank.frozen_A is not None or library() is None:
        return None
    if router.num_experts != layout.num_experts:
        return None
    return Routed(bank, router.scorer, router.price, layout, form)
