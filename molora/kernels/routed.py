"""Prepared C calls of one layer: what decoding, prefill and training run on a CPU.

With one token per sequence a layer's arithmetic takes a few microseconds, and every operator of torch as much again, so
a call is prepared once per layer and repeated with a few numbers. There are two without gradient:

- `Routed`, router and experts in one. It stands in for `Trace.decide` and the bank only where both would do nothing
  else: a decision per token by a linear scorer that nobody records or pins. Layers that share it get it back.
- `Decided`, the experts under gates that are known: pinned ones (tenants), or a decision shared with other layers.

Training has a node of its own, in step.py.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from .choose import FEW_TOKENS, NATIVE_RANK, is_forced
from .layout import Layout
from .native import Layer, layer_of, library, threads_for
from .step import Step, can_run, frozen_plain
from .step import prepared as prepared_step


class Routed:
    """The prepared call of one bank and its router.

    Args:
        bank: holds the parameters A (R, d_in) and Bt (R, d_out).
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
        # even with all experts active it is as fast as the matrix library, and the router is cheaper here
        self._takes_many = (layout.rank or 0) >= NATIVE_RANK
        self._addresses: tuple[Any, ...] | None = None
        self._call: Any = None
        self._call_and_keep: Any = None

    def add_to(self, y: Tensor, x: Tensor, kept: list[Tensor] | None = None) -> bool:
        """Add the delta into y (..., d_out), float32 and contiguous like x (..., d_in); False when it cannot.

        Args:
            y, x: as said.
            kept: gets gates, probs and scores (N, E) of the N tokens, in this order.
        """
        if not _plain(y, x):
            return False
        experts, scorer, price = self._sources
        try:
            now = (experts["A"], experts["Bt"], scorer["weight"], scorer.get("bias"), price["value"])
        except KeyError:  # sharded or reparametrised
            return False
        addresses = tuple([None if t is None else t.data_ptr() for t in now])
        if addresses != self._addresses and not self._prepare(now, addresses):
            return False
        tokens = x.numel() // self._d_in
        if tokens > FEW_TOKENS and not self._takes_many:
            return False
        threads = 1 if tokens < 64 else threads_for(tokens)
        if kept is None:
            return self._call(self._layer, x.data_ptr(), y.data_ptr(), tokens, threads) == 0
        kept += torch.empty(3, tokens, self._layout.num_experts).unbind()
        tables = [table.data_ptr() for table in kept]
        return self._call_and_keep(self._layer, x.data_ptr(), y.data_ptr(), *tables, tokens, threads) == 0

    def _prepare(self, now: tuple[Tensor | None, ...], addresses: tuple[Any, ...]) -> bool:
        loaded, given = library(), [t for t in now if t is not None]
        fits = all(t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous() for t in given)
        if loaded is None or not fits:
            return False
        A, Bt = given[0], given[1]
        self._struct = Layer(
            d_in=A.shape[1],
            d_out=Bt.shape[1],
            E=self._layout.num_experts,
            r=self._layout.rank,
            scale=self._layout.scale,
            **dict(zip(("A", "Bt", "W", "bias", "price"), addresses, strict=True)),
            **self._form,
        )
        self._d_in, self._layer = A.shape[1], ctypes.byref(self._struct)
        self._call, self._call_and_keep, self._addresses = loaded.molora_routed, loaded.molora_decided, addresses
        return True


class Decided:
    """The prepared call of one bank for few tokens, whose gates are known.

    Args:
        bank: holds the parameters A (R, d_in) and Bt (R, d_out), none of them frozen apart from the others.
    """

    def __init__(self, bank: Any) -> None:
        self.bank = bank
        self._addresses: tuple[int, int] | None = None

    def add_to(self, y: Tensor, x: Tensor, gates: Tensor) -> bool:
        """Add the delta into y (..., d_out) as `Routed.add_to` does, for gates (..., E) that broadcast to x."""
        if not _plain(y, x) or gates.dtype is not torch.float32 or not gates.is_contiguous():
            return False
        experts = self.bank._parameters
        A, Bt = experts.get("A"), experts.get("Bt")
        if A is None or Bt is None:  # sharded or reparametrised
            return False
        addresses = (A.data_ptr(), Bt.data_ptr())
        if addresses != self._addresses and not self._prepare(A, Bt, addresses):
            return False
        tokens, rows = x.numel() // self._d_in, gates.numel() // self._experts
        # a row of gates for each token, for each sequence, or one for all
        regular = rows == tokens or rows == 1 or (x.dim() == 3 and gates.shape[:-1] == (x.shape[0], 1))
        if not 0 < tokens <= FEW_TOKENS or not regular:
            return False
        return self._call(self._layer, x.data_ptr(), y.data_ptr(), gates.data_ptr(), tokens // rows, tokens, 1) == 0

    def _prepare(self, A: Tensor, Bt: Tensor, addresses: tuple[int, int]) -> bool:
        loaded = library()
        fits = all(t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous() for t in (A, Bt))
        if loaded is None or not fits:
            return False
        self._struct = layer_of(A, Bt, self.bank.layout)
        self._layer, self._d_in, self._experts = ctypes.byref(self._struct), A.shape[1], self.bank.layout.num_experts
        self._call, self._addresses = loaded.molora_forward, addresses
        return True


def _plain(y: Tensor, x: Tensor) -> bool:
    both_float32 = x.dtype is torch.float32 and y.dtype is torch.float32
    return both_float32 and x.is_contiguous() and y.is_contiguous()


def _can_call(x: Tensor) -> bool:
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or x.device.type != "cpu" or is_forced())


class Calls:
    """The prepared calls of one layer, by adapter. Copies and pickles of it are empty: a call holds addresses."""

    def __init__(self) -> None:
        self._made: dict[str, tuple[Any, Any, Routed | None]] = {}
        self._decided: dict[str, Decided] = {}
        self._steps: dict[str, tuple[Any, Any, Step | None]] = {}

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Calls, ()

    def step(self, adapter: str, bank: Any, router: Any, base: nn.Module, x: Tensor) -> Tensor | None:
        """Return the output (..., d_out) of base, router and experts, in training; None when that is not possible.

        The answer does not depend on whether gradients are on: reentrant checkpointing runs a layer first without them,
        and must round alike both times.

        Args:
            adapter: the name of the adapter.
            bank, router: its ExpertBank and Router.
            base: the base layer.
            x: (..., d_in).
        """
        if not can_run(x) or not frozen_plain(base):
            return None
        made = self._steps.get(adapter)
        if made is None or made[0] is not bank or made[1] is not router:
            self._steps[adapter] = made = (bank, router, prepared_step(bank, router))
        return None if made[2] is None else made[2].run(base, x)

    def decide_and_add(
        self, adapter: str, bank: Any, router: Any, y: Tensor, x: Tensor, kept: list[Tensor] | None = None
    ) -> bool:
        """Decide and add the delta into y in one call; False when that is not possible, and then y is as it was.

        Args:
            adapter: the name of the adapter.
            bank, router: its ExpertBank and Router.
            y: (..., d_out), fresh; x: (..., d_in).
            kept: gets the decision, as in `Routed.add_to`.
        """
        if not _can_call(x):
            return False
        made = self._made.get(adapter)
        if made is None or made[0] is not bank or made[1] is not router:
            self._made[adapter] = made = (bank, router, _prepared(bank, router))
        return made[2] is not None and made[2].add_to(y, x, kept)

    def add(self, adapter: str, bank: Any, gates: Tensor, y: Tensor, x: Tensor) -> bool:
        """Add the delta under known gates into y in one call; False as above.

        Args:
            adapter, bank, y, x: as above.
            gates: (..., E) that broadcast to x.
        """
        # in training, reentrant checkpointing runs a layer without gradients first, and must round alike both times
        if not _can_call(x) or bank.training or bank.frozen_A is not None:
            return False
        made = self._decided.get(adapter)
        if made is None or made.bank is not bank:
            if bank.layout.shared or bank.layout.rank is None:
                return False
            self._decided[adapter] = made = Decided(bank)
        return made.add_to(y, x, gates)


def _prepared(bank: Any, router: Any) -> Routed | None:
    layout, form = bank.layout, router.plain_form()
    if form is None or layout.shared or layout.rank is None or bank.frozen_A is not None or library() is None:
        return None
    if router.num_experts != layout.num_experts:
        return None
    return Routed(bank, router.scorer, router.price, layout, form)
