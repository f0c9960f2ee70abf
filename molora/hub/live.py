"""LiveMixture: a mixture whose experts are swapped, added and removed while requests run.

Every expert is in a slot of the banks; a table says which (leases.py). A new expert is written into a slot that no
request can see, and its router rows with it; then one step makes it current. Nothing is allocated and no shape
changes, so compiled code stays valid.

A request reads the table once, at its start: inside of `with live.using():` the whole block is one request; without
it, all forwards on one key-value cache are one (as generate() runs them), and a forward without a cache is one by
itself; an encoder's and its decoder's are two, so give generate() of such models a block. Forwards of several threads
take turns, since a model has one trace. Slots outside of a request's table are closed to its router: they score as if
they were not there, and their gates are 0, so whatever is being written into them is multiplied by 0.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from .. import compat
from ..control import routed_layers, tuner_of
from ..errors import ConfigError, LoadError, RoutingError, did_you_mean, raise_all
from ..from_peft import Lora, read_lora
from ..routing.edit import Edit
from .ingredients import Ingredient, Reader, contents_of
from .leases import Lease, Leases, Table
from .rows import copy_rows, rows_of
from .writing import SlotWriter

FREE = "free:"  # what empty slots are called in the config, with their number
CLOSED = -1e9  # the score of an expert that is not there: its probability is exactly 0 in float32, its logarithm finite

# The requests that this thread, or this asyncio task, is in the middle of.
_requests: ContextVar[tuple[Request, ...]] = ContextVar("molora_requests", default=())


class Request:
    """One request: the experts it sees, and perhaps fixed gates over them.

    Attributes:
        experts: name -> slot, the same until the end of the request.
        gates: (1, 1, slots) float32 that replace the router's, or None.
    """

    def __init__(self, live: LiveMixture, lease: Lease, gates: Tensor | None = None) -> None:
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


class LiveMixture:
    """The experts of one adapter of a model, by name. Made by `molora.compose`, or by `molora.live(model)`.

    Args:
        model: a wrapped model; its experts have form lora and one number of slots in all layers.
        adapter: which of its adapters.
        hub: the library that names of adapters are looked up in.

    Raises:
        ConfigError: the adapter has no slots that could be written one by one.
    """

    def __init__(self, model: PeftModel, adapter: str = "default", hub: Any = None) -> None:
        self.adapter, self.hub = adapter, hub
        self._tuner, self._base = tuner_of(model), tuner_of(model).model
        self._routed = layers = routed_layers(model, adapter)
        experts = self._config.experts
        banks = [layer.molora_bank[adapter] for layer in layers.values()]
        counts = {bank.num_experts for bank in banks}
        problems = [f"its layers have {sorted(counts)} experts"] if len(counts) > 1 else []
        problems += [w for bank in banks[:1] if (w := bank.why_not_write(0))]
        problems += ["it has shared experts"] if experts["shared"] else []
        problems += ["its layers draw their experts from one pool"] if experts["pool"] != "none" else []
        raise_all(problems, ConfigError, f"the experts of adapter '{adapter}' cannot be changed while it runs")
        self.slots = counts.pop()
        names = experts["names"] or [f"expert_{slot}" for slot in range(self.slots)]
        self._leases = Leases(self.slots, {n: s for s, n in enumerate(names) if not n.startswith(FREE)})
        self._filled = {slot: set(layers) for slot in range(self.slots)}  # layers that may hold something of a slot
        self._sizes = compat.linear_sizes_of(self._base)
        self._writer = SlotWriter({path: layer.molora_bank[adapter] for path, layer in layers.items()})
        self.closed = Closed(self.slots, experts["null"], {next(bank.parameters()).device for bank in banks})
        self._by_cache: weakref.WeakKeyDictionary[Any, Request] = weakref.WeakKeyDictionary()
        self._make_locks()
        self._handles = self._watch()

    @property
    def _config(self) -> Any:
        return self._tuner.peft_config[self.adapter]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to running requests: a copy starts without any."""
        gone = ("_forwards", "_writes", "_turn", "_open", "_reader", "_by_cache", "_leases")
        return {k: v for k, v in self.__dict__.items() if k not in gone} | {"names": dict(self._leases.table.names)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, without requests."""
        self._leases = Leases(state["slots"], state.pop("names"))
        self.__dict__.update(state)
        self._by_cache = weakref.WeakKeyDictionary()
        self._make_locks()

    def _make_locks(self) -> None:
        self._forwards, self._writes, self._reader = threading.Lock(), threading.Lock(), Reader()
        self._turn: _Turn | None = None
        self._open: frozenset[int] | None = None  # the slots that are open now

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
        return _slot(self._leases.table, name)

    def gates(self, weights: str | Mapping[str, float], table: Table | None = None) -> Tensor:
        """Return (1, 1, slots): 1 for one expert, or a weight for each that is named; 0 for the others."""
        table = table or self._leases.table
        weights = {weights: 1.0} if isinstance(weights, str) else weights
        gates = torch.zeros(1, 1, self.slots)
        for name, weight in weights.items():
            gates[..., _slot(table, name)] = float(weight)
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
        encoder, handles = compat.encoder_of(self._base), []
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

    @property
    def is_current(self) -> bool:
        """Whether the model still has the banks that this object knows; growing or deleting an adapter changes them."""
        banks = (
            [layer.molora_bank._modules.get(self.adapter) for layer in self._routed.values()]
            if self._alive()
            else [None]
        )
        return all(bank is not None and bank.num_experts == self.slots for bank in banks)

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
        if request is None and compat.tokens_in_cache(cache) > 0:  # an emptied cache begins another request
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

    # --- changing experts -------------------------------------------------------------------------------------------

    def swap(self, name: str, adapter: Ingredient, *, timeout: float = 30.0) -> int:
        """Replace an expert by another adapter under the same name; it is routed as the old one was.

        Everything is checked before anything is written. With a free slot no request waits; without one, this waits
        for those that run, and keeps new ones waiting for as long as the copying takes.

        Args:
            name: of the expert.
            adapter: see `molora.compose`.
            timeout: seconds to wait for requests that still read what would be overwritten.

        Returns:
            The slot that it is in.

        Raises:
            ConfigError: no expert has this name, the adapter does not fit the slots, or requests took too long.
            LoadError: the adapter is damaged or cannot be an expert.
        """
        self.slot(name)
        return self._put(name, adapter, like=name, timeout=timeout)

    def add(self, name: str, adapter: Ingredient, *, like: str | None = None, timeout: float = 30.0) -> int:
        """Add an expert in a free slot.

        Args:
            name: of the new expert.
            adapter: see `molora.compose`.
            like: the expert whose routing it takes over at first, where the router has learned something for each.
            timeout: see `swap`.

        Returns:
            The slot that it is in.

        Raises:
            ConfigError, LoadError: as in `swap`; or the name is taken, or there is no slot left.
        """
        if name in self._leases.table.names:
            raise ConfigError(f"there is an expert '{name}' already; swap it, or choose another name")
        why_not_name(name)
        return self._put(name, adapter, like=like, timeout=timeout)

    def remove(self, name: str) -> None:
        """Take an expert away from all requests that begin from now on; its slot is free once none reads it."""
        with self._writes:
            self.slot(name)
            self._flip({n: s for n, s in self._leases.table.names.items() if n != name})

    def _put(self, name: str, adapter: Ingredient, like: str | None, timeout: float) -> int:
        with self._writes:
            layers, table = self._layers(), self._leases.table
            old = None if like is None else _slot(table, like)
            self._check_routing(layers, old)
            in_place = name in table.names and len(table.slots) == self.slots
            lora, tensors = self._read(layers, name, adapter, table.names[name] if in_place else None)
            if in_place:
                slot = table.names[name]
                if self._own() is not None:
                    raise ConfigError(
                        f"expert '{name}' cannot be swapped inside of a request that uses it, without a free slot; "
                        f"leave the block first, or compose the mixture with more slots (slots={self.slots + 1})"
                    )
                with self._leases.drained(slot, timeout):
                    self._fill(layers, slot, lora, tensors, old)
                return slot
            slot = self._leases.take(timeout)
            self._fill(layers, slot, lora, tensors, old)
            self._flip({**table.names, name: slot})
        return slot

    def _read(
        self, layers: Mapping[str, Any], name: str, adapter: Ingredient, slot: int | None
    ) -> tuple[Lora, dict[str, Tensor]]:
        """Return an adapter and its tensors; raises when it is no expert that fits the slot (None: any slot)."""
        lora = Lora(name, contents_of(adapter, self.hub, self._reader.look))
        problems = read_lora(lora, self._sizes, values=False)
        room: list[str] = []
        for path, pair in lora.pairs.items():
            if path not in layers:
                room.append(f"layer '{path}' has no experts; compose the mixture with targets= that name it")
            else:
                ranks = layers[path].molora_bank._modules[self.adapter].ranks
                most = min(ranks) if slot is None else ranks[slot]
                if pair.rank > most:
                    room.append(
                        f"layer '{path}' has rank {pair.rank}, there is room for {most}; compose with max_rank="
                    )
        tensors, wrong = ({}, []) if problems or room else self._reader.read(lora.contents)
        raise_all(problems + wrong, LoadError, f"'{name}' cannot become an expert")
        raise_all(room, ConfigError, f"'{name}' does not fit this mixture")
        return lora, tensors

    def _check_routing(self, layers: Mapping[str, Any], old: int | None) -> None:
        """Raise when the router has learned something of each expert and has nothing to go by for a new one."""
        if old is None and self._refresher() is None and any(r.state_dict() for r in self._routers(layers)):
            raise ConfigError(
                "this router has learned something for each expert and knows nothing of a new one; say which expert it "
                f"is like at first (like=), one of: {', '.join(self.names)}"
            )
        if old is not None and self._refresher() is None:
            for router in self._routers(layers):
                rows_of(router)  # now, not when half is written

    def _layers(self) -> Mapping[str, Any]:
        if not self.is_current:
            raise ConfigError(f"adapter '{self.adapter}' was changed or deleted; call molora.live(model) again")
        return self._routed

    def _routers(self, layers: Mapping[str, Any]) -> list[Any]:
        found = (layer.molora_router._modules.get(self.adapter) for layer in layers.values())
        return [router for router in found if router is not None]

    def _refresher(self) -> Any:
        """Return what makes the router anew from the experts, for routers that were made from them."""
        from ..posthoc.registry import posthoc_routers

        kind, _, name = (self._config.recipe or "").partition("/")
        return posthoc_routers.fact(name, "refresh") if kind == "posthoc" and name in posthoc_routers else None

    def _fill(
        self, layers: Mapping[str, Any], slot: int, lora: Lora, tensors: Mapping[str, Tensor], old: int | None
    ) -> None:
        """Write one expert, and how it is routed; nobody reads this slot."""
        before = self._filled[slot]
        self._filled[slot] = before | lora.pairs.keys()
        self._writer.write(slot, lora.pairs, tensors, before)
        self._filled[slot] = set(lora.pairs)
        refresh = self._refresher()
        if refresh is not None:
            only = {"slot": slot} if "slot" in inspect.signature(refresh).parameters else {}
            refresh(self._tuner, self.adapter, **only)
        elif old is not None and old != slot:
            for router in self._routers(layers):
                if rows_of(router):
                    copy_rows(router, old, slot)

    def _flip(self, names: Mapping[str, int]) -> None:
        self._leases.flip(names)
        told = [f"{FREE}{slot}" for slot in range(self.slots)]
        for name, slot in names.items():
            told[slot] = name
        self._config.experts["names"] = told


class _Turn:
    """The forward that is running: whose it is, and what to put back when it ends."""

    def __init__(
        self, thread: int, module: nn.Module | None, request: Request, fresh: bool, pins: Any, cache: Any = None
    ) -> None:
        self.thread, self.module, self.request, self.fresh, self.pins, self.cache = (
            thread,
            module,
            request,
            fresh,
            pins,
            cache,
        )


def _slot(table: Table, name: str) -> int:
    if name not in table.names:
        raise ConfigError(f"no expert is called '{name}'{did_you_mean(name, table.names)}")
    return table.names[name]


def why_not_name(name: Any) -> None:
    """Raise ConfigError when an expert cannot have this name."""
    if not isinstance(name, str) or not name or name.startswith(FREE):
        raise ConfigError(f"an expert's name is a text that does not begin with '{FREE}', got {name!r}")
