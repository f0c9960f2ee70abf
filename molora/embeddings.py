"""RoutedEmbedding: experts on an embedding, routed by token.

A lookup is a linear layer that reads one-hot ids, so the equation of the house holds with columns of A in the place
of products:

    y = W[id] + s B (A[:, id] * spread(g))          A: (R, vocabulary)   B: (d, R)

The router reads the frozen embedding W[id], and the ids themselves through the Context: a decision per token is a
decision per token id.

As in PEFT's LoRA, A starts at zero and B at random: a token's column of A then learns from its first occurrence on.
The base is called, not read, so an output layer that is tied to it stays what it was: the experts change what goes
into the model and not what comes out of it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .errors import ConfigError
from .experts.bank import ExpertBank
from .kernels.fused import full_precision
from .layers import RoutedLayer


class EmbeddingBank(ExpertBank):
    """Stacked low-rank experts of an embedding; arguments as for ExpertBank, with the vocabulary as d_in."""

    def __init__(
        self, d_in: int, d_out: int, ranks: list[int], *, init: str | float = "kaiming", **options: Any
    ) -> None:
        if options.get("dropout"):
            raise ConfigError("experts.dropout cannot act on token ids; give embeddings dropout 0.0 in `layers`")
        super().__init__(d_in, d_out, ranks, init=init, **options)

    def _new(self, experts: list[int], init: str | float) -> tuple[nn.Parameter, nn.Parameter]:
        A, Bt = super()._new(experts, init)
        nn.init.zeros_(A)
        nn.init.normal_(Bt)
        return A, Bt

    def look_up(self, ids: Tensor, gates: Tensor, padding_idx: int | None = None) -> Tensor:
        """Return the delta (..., d) for ids (...) and gates (..., E) that broadcast to them."""
        A, B = self.stack()
        gates = (gates * self.scaling).to(A.dtype)
        with full_precision(ids.device):
            hidden = F.embedding(ids, A.t(), padding_idx=padding_idx)
            if self.form == "shared_a":
                return F.linear((gates[..., :, None] * hidden[..., None, :]).flatten(-2), B)
            return F.linear(hidden * self.spread(gates), B)


class RoutedEmbedding(RoutedLayer):
    """An nn.Embedding with routed experts; `base_layer`, `d_in` (the vocabulary), `d_out` and `trace` as elsewhere."""

    @property
    def d_read(self) -> int:
        """Routers read the frozen embedding, not the one-hot ids."""
        return self.d_out

    def forward(self, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Look up ids (...) -> (..., d)."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        y = self.base_layer(ids, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y
        base = self.get_base_layer()
        for adapter in self.active_adapters:
            if adapter not in self.molora_bank:
                continue
            gates = self.trace.decide(self.sites[adapter], self.molora_router._modules.get(adapter), y)
            delta = self.molora_bank[adapter].look_up(ids, gates, base.padding_idx)
            if hasattr(base, "embed_scale"):  # Gemma and others scale what they look up
                delta = delta * base.embed_scale
            y = (y + delta).to(y.dtype)
        return y

    def why_not_merge(self, model: nn.Module) -> str | None:
        """Return why nothing may be added to the table: an output layer may be tied to it."""
        table = self.get_base_layer().weight
        holders = {path for path, parameter in model.named_parameters(remove_duplicate=False) if parameter is table}
        mine = next((path for path, module in model.named_modules() if module is self), "")
        others = sorted(path for path in holders if path != f"{mine}.base_layer.weight")
        if others:
            return f"'{mine}' is tied to '{others[0].removesuffix('.weight')}', which merging would change as well"
        return None

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the change (vocabulary, d) of the table under a constant mixture."""
        return self.molora_bank[adapter].delta_weight(self.constant_gates(adapter)).t()


def embedding_sizes(module: nn.Module) -> tuple[int, int] | None:
    """Return (vocabulary, d) of an nn.Embedding, wrapped or not; None for anything else."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return None
