"""RoutedExperts: LoRAs on the 3-D expert parameters of native mixtures (Mixtral, Qwen-MoE, DeepSeek, ...).

A native mixture keeps its experts stacked in parameters (n, d_out, d_in), inside one module that is called with the
choice of its own router. Here each of the n experts gets m LoRAs on each of its matrices:

    y_e = W_e x + s sum_j g_j B_(e,j) A_(e,j) x

With m = 1 that is one LoRA per native expert, as with PEFT's `target_parameters`, but without ever forming the sum
W + s B A (n d_out d_in numbers per forward). With more, a molora router gives each token the gates g, and all native
experts that it visits use their own LoRAs under these gates.

The n * m LoRAs are one bank; a row that goes to native expert e sees the gates of its m LoRAs, zero elsewhere.

Shape letters: N tokens, k native experts per token, M = N k rows, n native experts, m LoRAs for each of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .compat.native import native_experts, run_native_experts
from .errors import ConfigError
from .experts.bank import ExpertBank
from .experts.base import Experts
from .kernels.layout import leading
from .layers import RoutedLayer
from .routing.trace import Trace


class NativeBank(Experts):
    """The LoRAs of all native experts at one site: an ExpertBank of n * m per 3-D parameter.

    As `Experts` it has the m experts that a router chooses among.

    Args:
        native: n.
        sizes: (d_in, d_out) by name of the parameter.
        ranks: of the m LoRAs of one native expert.
        init: as in ExpertBank.
        given: form, scaling, dropout and frozen, as in Experts.

    Raises:
        ConfigError: a form whose experts share an A.
    """

    is_lora = True

    def __init__(
        self,
        native: int,
        sizes: Mapping[str, tuple[int, int]],
        ranks: Sequence[int],
        *,
        init: str | float = "kaiming",
        **given: Any,
    ) -> None:
        if given["form"] not in ("lora", "rank"):
            raise ConfigError(f"experts.form '{given['form']}' cannot adapt native experts; use form: lora there")
        first, *_, last = sizes.values()
        super().__init__(first[0], last[1], ranks, **given)
        self.native = native
        frozen = given["frozen"]
        if frozen != "all":
            frozen = [e * len(ranks) + f for e in range(native) for f in frozen]
        options = {**given, "frozen": frozen, "init": init}
        self.banks = nn.ModuleDict(
            {name: ExpertBank(*size, list(ranks) * native, **options) for name, size in sizes.items()}
        )
        self.freeze()

    _because = "they come in stacks, one for each native expert; leave 'experts' out of target_modules to export"

    def freeze(self) -> None:
        """Make sure that frozen experts are not trainable."""
        for bank in self.banks.values():
            bank.freeze()

    def gates(self, gates: Tensor, expert: Tensor, token: Tensor) -> Tensor:
        """Return (M, n * m) for gates (N, m) and the native expert and token of each row."""
        own = F.one_hot(expert, self.native).to(gates.dtype)
        return (own[:, :, None] * gates.index_select(0, token)[:, None, :]).flatten(1)

    def gradients(self) -> dict[str, list[nn.Parameter]]:
        """Return the trainable parameters that learn at once (`B`) and those that wait for them (`A`), for checks."""
        parts = [bank.gradients() for bank in self.banks.values()]
        found = {key: [p for part in parts for p in part.get(key, [])] for key in ("A", "B")}
        return {key: parameters for key, parameters in found.items() if parameters}

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Put the m LoRAs of every native expert in another order."""
        for bank in self.banks.values():
            starts = torch.arange(self.native, device=order.device) * self.num_experts
            bank.permute((starts[:, None] + order).flatten())


def native_bank(module: nn.Module, ranks: Sequence[int], **given: Any) -> NativeBank:
    """Return fresh LoRAs for a module of native experts, wrapped or not (see compat/native.py)."""
    sizes = native_experts(module) or {}
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return NativeBank(module.num_experts, sizes, ranks, **given)


class RoutedExperts(RoutedLayer):
    """A module of stacked native experts with LoRAs on each.

    Args:
        base_layer: the module.
        trace: the trace of the model.
    """

    def __init__(self, base_layer: nn.Module, trace: Trace) -> None:
        sizes = list((native_experts(base_layer) or {}).values())
        super().__init__(base_layer, sizes[0][0], sizes[-1][1], trace)

    def _device(self) -> torch.device | None:
        return next(self.get_base_layer().parameters()).device

    def forward(self, x: Tensor, index: Tensor, weights: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the native experts for x (N, d) and the native choice index, weights (N, k) -> (N, d)."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [adapter for adapter in self.active_adapters if adapter in self.molora_bank]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(x, index, weights, *args, **kwargs)
        routers = self.molora_router._modules
        gates = {a: leading(self.trace.decide(self.sites[a], routers.get(a), x), x) for a in active}

        def add(name: str, y: Tensor, rows: Tensor, expert: Tensor, token: Tensor) -> Tensor:
            for adapter in active:
                bank, site = self.molora_bank[adapter], self.sites[adapter]
                own = bank.gates(gates[adapter], expert, token)
                sparse = site.sparse or not own.requires_grad
                y = bank.banks[name].add_to(y, rows, own, sparse=sparse)
            return y

        return run_native_experts(self.base_layer, x, index, weights, add)

    def why_not_merge(self, model: nn.Module) -> str | None:
        """Return None: the parameters are plain floats."""
        return None

    def get_delta_weights(self, adapter: str) -> dict[str, Tensor]:
        """Return the change of each 3-D parameter under a constant mixture, in the layout of the parameter."""
        bank, gates, found = self.molora_bank[adapter], self.constant_gates(adapter), {}
        for name, own in bank.banks.items():
            A, B = own.stack()
            weighted = B * (own.spread(gates.repeat(bank.native).to(B)) * own.scaling)
            delta = torch.einsum(
                "onr,nri->noi", weighted.unflatten(1, (bank.native, -1)), A.unflatten(0, (bank.native, -1))
            )
            found[name] = delta.transpose(1, 2) if self.get_base_layer().is_transposed else delta
        return found

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add constant mixtures to the 3-D parameters; the tuner has already refused what cannot be merged."""
        for adapter in adapter_names or self.active_adapters:
            if adapter not in self.molora_bank or adapter in self.merged_adapters:
                continue
            deltas = self.get_delta_weights(adapter)
            if safe_merge and not all(torch.isfinite(delta).all() for delta in deltas.values()):
                raise ValueError(f"adapter '{adapter}' holds NaN or Inf; it was not merged")
            for name, delta in deltas.items():
                weight = getattr(self.get_base_layer(), name)
                weight.data = weight.data + delta.to(weight)
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Take merged mixtures out of the 3-D parameters again."""
        while self.merged_adapters:
            for name, delta in self.get_delta_weights(self.merged_adapters.pop()).items():
                weight = getattr(self.get_base_layer(), name)
                weight.data = weight.data - delta.to(weight)
