"""LiveMixture: a mixture whose experts are swapped, added and removed while requests run.

Every expert is in a slot of the banks; a table says which (leases.py). A new expert is written into a slot that no
request can see (requests.py), and its router rows with it; then one step makes it current. Nothing is allocated and no
shape changes, so compiled code stays valid.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from torch import Tensor

from ..checkpoint import FREE
from ..compat.layers import linear_sizes_of
from ..control import routed_layers, tuner_of
from ..errors import ConfigError, LoadError, raise_all
from ..lora_files import Lora, read_lora
from ..plan import form_of
from .ingredients import Ingredient, Reader, contents_of
from .requests import Closed, Requests, slot_of
from .rows import copy_rows, rows_of
from .writing import SlotWriter


class LiveMixture(Requests):
    """The experts of one adapter of a model, by name. Made by `molora.compose`, or by `molora.live(model)`.

    Args:
        model: a wrapped model; its experts have form lora and one number of slots in all layers.
        adapter: which of its adapters.
        hub: the library that names of adapters are looked up in.

    Raises:
        ConfigError: the adapter has no slots that could be written one by one.
    """

    def __init__(self, model: PeftModel, adapter: str = "default", hub: Any = None) -> None:
        self.hub = hub
        self._routed = layers = routed_layers(model, adapter)
        tuner = tuner_of(model)
        experts = tuner.peft_config[adapter].experts
        banks = {path: layer.molora_bank[adapter] for path, layer in layers.items()}
        counts = {bank.num_experts for bank in banks.values()}
        form = form_of(experts)
        problems = [f"its layers have {sorted(counts)} experts"] if len(counts) > 1 else []
        problems += [f"its experts have form '{form}', which has no slots; form lora has"] if form != "lora" else []
        problems += ["it has shared experts"] if experts["shared"] else []
        problems += ["its layers draw their experts from one pool"] if experts["pool"] != "none" else []
        raise_all(problems, ConfigError, f"the experts of adapter '{adapter}' cannot be changed while it runs")
        slots = counts.pop()
        names = experts["names"] or [f"expert_{slot}" for slot in range(slots)]
        closed = Closed(slots, experts["null"], {next(bank.parameters()).device for bank in banks.values()})
        taken = {name: slot for slot, name in enumerate(names) if not name.startswith(FREE)}
        super().__init__(tuner, adapter, slots, taken, closed)
        self._filled = {slot: set(layers) for slot in range(slots)}  # layers that may hold something of a slot
        self._sizes = linear_sizes_of(self._base)
        self._writer = SlotWriter(banks)

    def _start(self) -> None:
        super()._start()
        self._writes, self._reader = threading.Lock(), Reader()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to running changes, too."""
        return {k: v for k, v in super().__getstate__().items() if k not in ("_writes", "_reader")}

    @property
    def _config(self) -> Any:
        return self._tuner.peft_config[self.adapter]

    @property
    def is_current(self) -> bool:
        """Whether the model still has the banks that this object knows; growing or deleting an adapter changes them."""
        banks = (
            [layer.molora_bank._modules.get(self.adapter) for layer in self._routed.values()]
            if self._alive()
            else [None]
        )
        return all(bank is not None and bank.num_experts == self.slots for bank in banks)

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
            old = None if like is None else slot_of(table, like)
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
        problems = read_lora(lora, self._sizes, values=False, base=self._base)
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


def why_not_name(name: Any) -> None:
    """Raise ConfigError when an expert cannot have this name."""
    if not isinstance(name, str) or not name or name.startswith(FREE):
        raise ConfigError(f"an expert's name is a text that does not begin with '{FREE}', got {name!r}")
