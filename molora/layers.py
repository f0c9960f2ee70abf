"""RoutedLinear: a frozen linear layer plus the routed experts of each active adapter.

    y = W x + sum over active adapters of bank(x, gates)

The base layer is called, never read or subclassed, so quantised and Conv1D bases work as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .blocks import Role, rows_of
from .compat.layers import PLAIN_LINEARS
from .errors import RoutingError
from .experts.base import Experts
from .kernels.routed import Calls
from .kernels.upcast import frozen_linear, has_hooks, upcasts
from .routing.links import softmax
from .routing.rows import Rows
from .routing.scorers import Constant
from .routing.trace import Site, Trace
from .routing.types import Context


class RoutedLayer(nn.Module, BaseTunerLayer):
    """What every routed layer has: an untouched base, and per adapter a bank, perhaps a router, and a site.

    Args:
        base_layer: the untouched layer.
        d_in, d_out: its sizes.
        trace: the trace of the model.
        upcast_base: whether a frozen half-precision base layer multiplies in float32; None: by the rule in
            kernels/upcast.py.
    """

    # PEFT walks these containers, keyed by adapter name, to switch, freeze, cast, save and delete adapters.
    adapter_layer_names: tuple[str, ...] = ("molora_bank", "molora_router")
    other_param_names: tuple[str, ...] = ("sites", "roles")

    def __init__(
        self, base_layer: nn.Module, d_in: int, d_out: int, trace: Trace, upcast_base: bool | None = None
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.d_in, self.d_out = d_in, d_out
        self.trace = trace
        self.molora_bank = nn.ModuleDict()
        self.molora_router = nn.ModuleDict()  # only at the sites that take decisions
        self.sites: dict[str, Site] = {}
        self.roles: dict[str, Role] = {}  # of adapters whose experts are whole blocks
        self._calls = Calls()
        self._on_input = False  # whether experts of any adapter act on the input of the base layer
        self.upcast_base = upcast_base
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    @property
    def d_read(self) -> int:
        """The size of what a router at this layer reads."""
        return self.d_in

    def add(self, adapter: str, bank: Experts) -> None:
        """Give this layer the experts of one adapter; the tuner adds the site and the router once all are known."""
        self.molora_bank[adapter] = bank
        self._on_input = self._on_input or bank.on_input
        self._move_adapter_to_device_of_base_layer(adapter, device=self._device())

    def forget_calls(self) -> None:
        """Prepare calls anew: how a router decides has changed."""
        self._calls = Calls()

    def _device(self) -> torch.device | None:
        device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        return device

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own version also casts adapters to the dtype of the base; ours stay float32.
        device = device or self._device()
        for container in (self.molora_bank, self.molora_router):
            if adapter_name in container and device is not None and device.type != "meta":
                module = container[adapter_name]
                if not any(p.device.type == "meta" for p in module.parameters()):
                    module.to(device)

    def _freeze_non_trainable_peft_weights(self, adapter_names: Any = None) -> None:
        # PEFT calls this after every change of requires_grad.
        for container in (self.molora_bank, self.molora_router):
            for module in container.values():
                module.freeze()

    def constant_gates(self, adapter: str) -> Tensor:
        """Return gates (E,) that do not depend on the input; raise RoutingError when they do."""
        router = self.molora_router[adapter] if adapter in self.molora_router else None
        if self.sites[adapter].fixed:
            return torch.ones(1, device=next(self.molora_bank[adapter].parameters()).device)
        site = self.sites[adapter]
        if router is not None and site.column is None and not site.edits and adapter not in self.roles:
            alone = router.num_experts == 1 and getattr(router.link, "function", None) is softmax
            if alone or isinstance(router.scorer, Constant):
                nothing = torch.zeros(1, 1, self.d_read, device=next(self.molora_bank[adapter].parameters()).device)
                return router(nothing, Context(progress=self.trace.progress)).applied.detach().flatten()
        raise RoutingError("the mixture depends on its input")

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the weight change of a constant mixture, in the layout of the base weight."""
        delta = self.molora_bank[adapter].delta_weight(self.constant_gates(adapter))
        return delta.T if getattr(self.get_base_layer(), "nf", None) is not None else delta

    def why_not_merge(self, model: nn.Module) -> str | None:
        """Return why nothing may be added to the base weight inside `model`, or None when it may."""
        kind = type(self.get_base_layer())
        return None if kind in PLAIN_LINEARS else f"the base layers are {kind.__name__}: merging would round twice"

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add constant mixtures to the base weight; the tuner has already refused what cannot be merged."""
        for adapter in adapter_names or self.active_adapters:
            if adapter not in self.molora_bank or adapter in self.merged_adapters:
                continue
            weight = self.get_base_layer().weight
            merged = weight.data + self.get_delta_weight(adapter).to(weight)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"adapter '{adapter}' holds NaN or Inf; it was not merged")
            weight.data = merged
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Take merged mixtures out of the base weight again."""
        while self.merged_adapters:
            weight = self.get_base_layer().weight
            weight.data = weight.data - self.get_delta_weight(self.merged_adapters.pop()).to(weight)

    def __repr__(self) -> str:
        return "molora." + super().__repr__()


class RoutedLinear(RoutedLayer):
    """A linear layer (nn.Linear, Conv1D or any quantised linear) with routed low-rank experts."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the base layer and the routed experts to x (..., d_in) -> (..., d_out)."""
        if self._disable_adapters or self.merged_adapters:
            if self._disable_adapters:
                self.unmerge()  # as PEFT does: disabled means the base as it was
            return self._base(x, *args, **kwargs)
        if self.trace.rows is not None:
            return self._serve(self.trace.rows, x, *args, **kwargs)
        active = self.active_adapters
        if self.roles:
            role = self._role(active)
            if role is not None:
                return self._in_block(role, x, *args, **kwargs)
        if (self.training or torch.is_grad_enabled()) and len(active) == 1 and not args and not kwargs:
            y = self._step(active[0], x)
            if y is not None:
                return y
        rescaled = self._rescale(active, x) if self._on_input else x
        y = self._base(rescaled, *args, **kwargs)
        # read as plain dicts: in decoding, every call of a ModuleDict costs as much as an expert
        parts = self._modules
        base, banks, routers = parts["base_layer"], parts["molora_bank"]._modules, parts["molora_router"]._modules
        # Plain linear layers return a fresh tensor that their backward does not read; 8-bit bases refuse such writes.
        in_place = type(base) in PLAIN_LINEARS and not has_hooks(base)
        for adapter in active:
            bank, router = banks.get(adapter), routers.get(adapter)
            if bank is None or bank.on_input:
                continue
            site = self.sites[adapter]
            if not bank.in_kernels:
                y = bank.add_to(y, x, self.trace.decide(site, router, x))
                continue
            if site.edits:
                sparse = site.sparse and self.trace.pins is None
                for view, gates in self.trace.passes(site, router, x):
                    y = bank.add_to(y, view, gates, in_place=in_place, sparse=sparse)
                continue
            # where nobody else needs the decision, one call may take it and apply it
            alone = in_place and router is not None and self.trace.is_silent(site) and not bank.drops
            kept: list[Tensor] | None = [] if site.shared else None
            if alone and self._calls.decide_and_add(adapter, bank, router, y, x, kept):
                if kept:
                    self.trace.keep(site, x, *kept)
                continue
            gates = self.trace.decide(site, router, x)
            if in_place and not bank.drops and self._calls.add(adapter, bank, gates, y, x):
                continue
            sparse = site.sparse and self.trace.pins is None
            y = bank.add_to(y, x, gates, in_place=in_place, sparse=sparse)
        return y

    def _serve(self, rows: Mapping[str, Rows], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the base layer to a batch of many requests, and to each row the experts that it asked for."""
        y = self._base(x, *args, **kwargs)
        parts = self._modules
        base, banks, routers = parts["base_layer"], parts["molora_bank"]._modules, parts["molora_router"]._modules
        in_place = type(base) in PLAIN_LINEARS and not has_hooks(base)
        for adapter, given in rows.items():
            bank = banks.get(adapter)
            if bank is None:
                continue
            router = routers.get(adapter)
            alone = in_place and given.gates is None and router is not None
            if alone and self._decide_and_serve(adapter, bank, router, y, x, given):
                continue
            gates = self.trace.given(self.sites[adapter], router, x, given)
            if in_place and bank.in_kernels and self._calls.add(adapter, bank, gates, y, x):
                continue
            y = bank.add_to(y, x, gates, in_place=in_place, sparse=True)
        return y

    def _decide_and_serve(self, adapter: str, bank: Any, router: Any, y: Tensor, x: Tensor, rows: Rows) -> bool:
        """Decide and add into y in one call, for the tokens that want it; False, and y as it was, when that cannot be.

        As in `forward`, only where nobody else needs the decision.
        """
        site = self.sites[adapter]
        if site.shared or site.edits or bank.drops or not bank.in_kernels or not self.trace.is_silent(site):
            return False
        chosen = rows.chosen
        if rows.mask is None or (chosen is not None and chosen[1].numel() == rows.mask.numel()):
            done = self._calls.decide_and_add(adapter, bank, router, y, x)
        else:
            lead = (x.shape[0], 1) if rows.mask.shape[0] > 1 else (1, x.shape[1])
            if x.dim() != 3 or chosen is None or rows.mask.shape[:2] != lead:
                return False
            part, out = x.index_select(*chosen), y.index_select(*chosen)
            done = self._calls.decide_and_add(adapter, bank, router, out, part)
            if done:
                y.index_copy_(*chosen, out)
        if done:
            self.trace.notice(site)
        return done

    def _rescale(self, active: list[str], x: Tensor) -> Tensor:
        """Return the input of the base layer, changed by the experts that act on it; routers see x as it came."""
        given = x
        for adapter in active:
            bank = self.molora_bank._modules.get(adapter)
            if bank is not None and bank.on_input:
                router = self.molora_router._modules.get(adapter)
                x = bank.before(x, self.trace.decide(self.sites[adapter], router, given))
        return x

    def _step(self, adapter: str, x: Tensor) -> Tensor | None:
        """Return what `forward` does, as one autograd node, where nobody else needs the decision; else None."""
        bank, router = self.molora_bank._modules.get(adapter), self.molora_router._modules.get(adapter)
        if bank is None or router is None or bank.drops or not bank.in_kernels:
            return None
        if not self.trace.is_private(self.sites[adapter]):
            return None
        y = self._calls.step(adapter, bank, router, self.base_layer, x)
        if y is not None:
            self.trace.notice(self.sites[adapter])
        return y

    def _base(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self._modules["base_layer"]
        if not args and not kwargs and upcasts(base, x, self.upcast_base):
            return frozen_linear(x, base.weight, base.bias)
        return base(x, *args, **kwargs)

    def _role(self, active: list[str]) -> str | None:
        """Return the active adapter whose experts are blocks, if any."""
        mine = [adapter for adapter in active if adapter in self.molora_bank]
        blocks = [adapter for adapter in mine if adapter in self.roles]
        if blocks and len(mine) > 1:
            raise RoutingError(
                f"adapters {mine} are active together, but '{blocks[0]}' has experts that are whole MLP blocks, which "
                "cannot be added to those of another adapter in the same block; activate one of them"
            )
        return blocks[0] if blocks else None

    def _in_block(self, adapter: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Do this layer's part of a RoutedBlock: x and the result are rows of pairs inside of the block."""
        bank, site, role = self.molora_bank[adapter], self.sites[adapter], self.roles[adapter]
        if role.part == "leaves":
            self.trace.notice(site)
            return role.block.leave(bank, x, lambda h: self._base(h, *args, **kwargs))
        y = self._base(x, *args, **kwargs)
        if role.part == "opens":
            gates = self.trace.decide(site, self.molora_router._modules.get(adapter), x)
            every = gates.requires_grad and not site.sparse
            role.block.rows = rows_of(gates, x, every)
        else:
            self.trace.notice(site)
        return role.block.enter(bank, y, x)
