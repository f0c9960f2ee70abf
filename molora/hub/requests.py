"""Requests: which experts each forward of a model sees, while those change.

A request reads the table of experts once, at its start: inside of `with live.using():` the whole block is one request;
without it, all forwards on one key-value cache are one (as generate() runs them), and a forward without a cache is one
by itself; an encoder's and its decoder's are two, so give generate() of such models a block. Forwards of several
threads take turns, since a model has one trace. Slots outside of a request's table are closed to its router: they score
as if they were not there, and their gates are 0, so whatever is being written into them is multiplied by 0.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..compat.caches import tokens_in_cache
from ..compat.models import encoder_of
from ..errors import ConfigError, RoutingError, did_you_mean
from ..routing.edit import Edit
from .leases import Lease, Leases, Table

CLOSED = -1e9  # the score of an expert that is not there: its probability is exactly 0 in float32, its logarithm finite

# The requests that this thread, or this asyncio task, is in the middle of: they belong to whoever runs them, and
# forwards have no argument that PEFT and generate() would pass on untouched.
_requests: ContextVar[tuple[Request, ...]] = ContextVar("molora_requests", default=())


class Request:
    """One request: the experts it sees, and perhaps fixed gates over them.

    Attributes:
        experts: name -> slot, the same until the end of the request.
        gates: (1, 1, slots) float32 that replace the router's, or None.
    """

    def __init__(self, live: Requests, lease: Lease, gates: Tensor | None = None) -> None:
        self.live, self.lease, self.gates = live, lease, gates
        self.experts: Mapping[str, int] = dict(lease.table.names)


class Closed(Edit):
    """Closes the slots that the request at work must not see. Its tensors are changed in place, as compiled code needs.

    Args:
        slots: how many slots there are.
        null: how many null experts come behind them, which are never closed.
        devices: where routers are.
    """

    def __init__(self, slots: int, null: int = 0, devices: Iterable[torch.device] = ()) -> None:
        super().__init__(())
        self.slots = slots
        # made here and only ever written to, never inside of a forward that may be traced
        self._masks = {device: torch.zeros(slots + null, dtype=torch.bool, device=device) for device in devices}
        self._masks.setdefault(torch.device("cpu"), torch.zeros(slots + null, dtype=torch.bool))

    def leave_open(self, slots: frozenset[int]) -> None:
        """Close all slots but these."""
        closed = torch.tensor([slot not in slots for slot in range(self.slots)])
        for mask in self._masks.values():
            mask[: self.slots].copy_(closed)

    def at(self, like: Tensor) -> Tensor:
        """Return the mask for the last axis of `like`: with null experts, without, or of several decisions in a row."""
        mask = self._masks.get(like.device)
        if mask is None:  # the model was moved since
            mask = self._masks[torch.device("cpu")].to(like.device)
        if like.shape[-1] == mask.shape[0]:
            return mask
        return mask[: self.slots].repeat(like.shape[-1] // self.slots)

    def scores(self, scores: Tensor, site: str) -> Tensor:
        """Return the scores (B, S, N) with those of closed slots below all others."""
        return scores.masked_fill(self.at(scores), CLOSED)

    def prices(self, prices: Tensor, site: str) -> Tensor:
        """Return the prices (N,) with those of closed slots above all others: a price may be negative."""
        return prices.masked_fill(self.at(prices), -CLOSED)

    def gates(self, gates: Tensor, site: str) -> Tensor:
        """Return the gates (B, S, E) with those of closed slots zero."""
        return gates.masked_fill(self.at(gates), 0.0)


class _Turn(NamedTuple):
    """The forward that is running: whose it is, and what to put back when it ends."""

    thread: int
    module: nn.Module | None  # None: a block that keeps others out
    request: Request
    fresh: bool  # whether the request began with this forward
    pins: Any
    cache: Any = None


class Requests:
    """The requests to one adapter of a model.

    Args:
        tuner: the MoloraModel of the model.
        adapter: which of its adapters.
        slots: how many experts its banks hold.
        names: name -> slot at the start.
        closed: closes slots to its routers.
    """

    def __init__(self, tuner: Any, adapter: str, slots: int, names: Mapping[str, int], closed: Closed) -> None:
        self.adapter, self.slots, self.closed = adapter, slots, closed
        self._tuner, self._base = tuner, tuner.model
        self._leases = Leases(slots, names)
        self._start()
        self._handles = self._watch()

    def _start(self) -> None:
        """Make what belongs to running requests."""
        self._by_cache: weakref.WeakKeyDictionary[Any, Request] = weakref.WeakKeyDictionary()
        self._forwards = threading.Lock()
        self._turn: _Turn | None = None
        self._open: frozenset[int] | None = None  # the slots that are open now

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to running requests: a copy starts without any."""
        gone = ("_forwards", "_turn", "_open", "_by_cache", "_leases")
        return {k: v for k, v in self.__dict__.items() if k not in gone} | {"names": dict(self._leases.table.names)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, without requests."""
        self._leases = Leases(state["slots"], state.pop("names"))
        self.__dict__.update(state)
        self._start()

    # --- what there is ----------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """The names of the experts, in the order of their slots."""
        table = self._leases.table.names
        return sorted(table, key=table.__getitem__)

    @property
    def free(self) -> int:
        """How many slots could be written at this moment."""
        return len(self._leases.free())

    def slot(self, name: str) -> int:
        """Return the slot of an expert, for requests that begin now; raise ConfigError when there is none."""
        return slot_of(self._leases.table, name)

    def gates(self, weights: str | Mapping[str, float], table: Table | None = None) -> Tensor:
        """Return (1, 1, slots): 1 for one expert, or a weight for each that is named; 0 for the others."""
        table = table or self._leases.table
        weights = {weights: 1.0} if isinstance(weights, str) else weights
        gates = torch.zeros(1, 1, self.slots)
        for name, weight in weights.items():
            gates[..., slot_of(table, name)] = float(weight)
        return gates

    # --- requests ---------------------------------------------------------------------------------------------------

    @contextmanager
    def using(self, gates: str | Mapping[str, float] | None = None, *, alone: bool = False) -> Iterator[Request]:
        """Make the block one request of this thread: its forwards see the experts that are there when it begins.

        Args:
            gates: the name of the one expert that acts, or a weight for each that does, instead of the router.
            alone: keep other forwards out for the whole block. Compiled models need this: inside of compiled code
                nobody can take turns.
        """
        turn = self._turn
        if turn is not None and turn.module is None and turn.thread == threading.get_ident():
            raise ConfigError("a block of using(alone=True) is one request already; leave it before another begins")
        lease = self._leases.acquire()
        try:
            fixed = None if gates is None else self.gates(gates, lease.table)
            request = Request(self, lease, fixed)
            token = _requests.set((*_requests.get(), request))
            try:
                if alone:
                    with self._forwards:
                        before = self._tuner.trace.pins
                        self._apply(request)
                        self._turn = _Turn(threading.get_ident(), None, request, False, before)
                        try:
                            yield request
                        finally:
                            self._turn, self._tuner.trace.pins = None, before
                else:
                    yield request
            finally:
                _requests.reset(token)
        finally:
            lease.release()

    def _own(self) -> Request | None:
        """Return the innermost request that the caller is in the middle of."""
        return next((one for one in reversed(_requests.get()) if one.live is self), None)

    def _apply(self, request: Request) -> None:
        """Let the model see the experts of a request; the caller has the turn."""
        trace, table = self._tuner.trace, request.lease.table
        if table.slots != self._open:
            self._open = table.slots
            self.closed.leave_open(table.slots)
        edits = [edit for edit in trace.edits if edit is not self.closed]
        # where nothing is closed, routers stay as quick as they are
        trace.edits = edits if len(table.slots) == self.slots else [*edits, self.closed]
        if request.gates is not None:
            trace.pins = request.gates

    # --- around every forward ---------------------------------------------------------------------------------------

    def _watch(self) -> list[Any]:
        encoder, handles = encoder_of(self._base), []
        for module in [self._base] + ([encoder[1]] if encoder else []):
            # before the hooks that open a pass of the trace, and after those that close it
            handles.append(module.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(self._after, with_kwargs=True, always_call=True))
        return handles

    def detach(self) -> None:
        """Leave the model as it is for good: its experts cannot be changed through this object any more."""
        for handle in self._handles:
            handle.remove()
        self._tuner.trace.edits = [edit for edit in self._tuner.trace.edits if edit is not self.closed]

    def _alive(self) -> bool:
        return self.adapter in self._tuner.peft_config

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling() or not self._alive():
            return
        active = self._tuner.active_adapters
        if self.adapter not in active:
            self._tuner.trace.edits = [edit for edit in self._tuner.trace.edits if edit is not self.closed]
            return
        if len(active) > 1:
            raise RoutingError(
                f"adapters {list(active)} are active together, but the slots of '{self.adapter}' are opened and closed "
                "for all that is active; activate it alone with model.set_adapter"
            )
        turn = self._turn
        if turn is not None and turn.thread == threading.get_ident():
            if turn.module is not module and (turn.module is None or module is not self._base):
                return  # inside of a forward, or of a block, that has the turn already
            self._end(turn, None)  # that forward was interrupted in a way that runs no hooks
        cache = self._tuner.hooks.arguments.get(args, kwargs, "past_key_values", "cache_params")
        request = self._own()
        if request is None and tokens_in_cache(cache) > 0:  # an emptied cache begins another request
            request = self._by_cache.get(cache)
        fresh = request is None
        if request is None:
            request = Request(self, self._leases.acquire())
        self._forwards.acquire()
        before = self._tuner.trace.pins
        self._turn = _Turn(threading.get_ident(), module, request, fresh, before, cache)
        self._apply(request)

    def _after(self, module: nn.Module, args: Any, kwargs: Any, outputs: Any) -> None:
        turn = self._turn
        if turn is not None and turn.module is module and turn.thread == threading.get_ident():
            self._end(turn, outputs)

    def _end(self, turn: _Turn, outputs: Any) -> None:
        """End a forward; a request of its own goes on with the cache that continues it."""
        self._tuner.trace.pins = turn.pins
        if turn.fresh:
            cache = getattr(outputs, "past_key_values", None)
            cache = cache if cache is not None else getattr(outputs, "cache_params", None)
            cache = turn.cache if cache is None and outputs is not None else cache
            try:
                before = self._by_cache.get(cache)
                if before is not None:  # it was emptied since
                    before.lease.release()
                self._by_cache[cache] = turn.request
                weakref.finalize(cache, turn.request.lease.release)
            except TypeError:  # no cache, or one that nothing can be remembered of
                turn.request.lease.release()
        self._turn = None
        self._forwards.release()


def slot_of(table: Table, name: str) -> int:
    """Return the slot of an expert; raise ConfigError when the table has none of that name."""
    if name not in table.names:
        raise ConfigError(f"no expert is called '{name}'{did_you_mean(name, table.names)}")
    return table.names[name]
