"""Experts whose weights are averaged before they act (Poly, MHR, SMEAR), and experts with a nonlinearity.

    factor        y += s * act( x (sum_e w_e A_e)^T + sum_e w_e a_e ) (sum_e w_e B_e)^T + s * sum_e w_e b_e
    bottleneck    y += s * sum_e g_e ( B_e act(A_e x + a_e) + b_e )

Both read the same stack as ExpertBank: A (E * r, d_in), Bt (E * r, d_out). `factor` is not a gate on outputs: its delta
is of second degree in the weights and differs from the sum of outputs by their cross term (experts/merge.py).

Shape letters: N tokens, h blocks, E experts, r ranks; i and o run inside the blocks of d_in and d_out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError, did_you_mean
from ..kernels.fused import full_precision
from .bank import ExpertBank
from .base import GIVEN, Experts, equal_rank, forms

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class _Stack(ExpertBank):
    """The stack of an ExpertBank with an optional activation between and optional biases; outside of the kernels."""

    in_kernels = False

    def __init__(
        self, d_in: int, d_out: int, ranks: Sequence[int], *, activation: str | None, bias: bool, **given: Any
    ) -> None:
        if activation is not None and activation not in ACTIVATIONS:
            known = did_you_mean(str(activation), ACTIVATIONS)
            raise ConfigError(f"activation '{activation}' of form '{given['form']}' is unknown{known}")
        super().__init__(d_in, d_out, ranks, **given)
        if self.frozen and bias:
            raise ConfigError(f"form '{self.form}' with bias cannot freeze single experts; write frozen: all")
        rank = equal_rank(self.form, self.ranks)
        self.activation = activation
        self.down_bias = nn.Parameter(torch.zeros(self.num_experts, rank)) if bias else None
        self.up_bias = nn.Parameter(torch.zeros(self.num_experts, d_out)) if bias else None
        self.freeze()

    _because = "they have an activation or biases; keep serving the adapter as it is"

    @property
    def is_lora(self) -> bool:
        """Whether constant gates make a LoRA of them."""
        return self.activation is None and self.down_bias is None

    def why_not_write(self, slot: int, A: Tensor | None = None, B: Tensor | None = None) -> str | None:
        """Refuse LoRAs: in this form they would not act as they were trained."""
        return Experts.why_not_write(self, slot, A, B)

    write, clear, add_to, delta_weight = Experts.write, Experts.clear, Experts.add_to, Experts.delta_weight

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Put the experts in another order."""
        super().permute(order)
        for bias in (self.down_bias, self.up_bias):
            if bias is not None:
                bias.copy_(bias[order])

    def _act(self, hidden: Tensor) -> Tensor:
        return hidden if self.activation is None else ACTIVATIONS[self.activation](hidden)


@forms.register("factor", given=GIVEN)
class Factor(_Stack):
    """Factors averaged with the gates before the product (Poly, MHR, SMEAR).

    Poly (arXiv 2202.13914); MHR (arXiv 2211.03831) cuts the inputs of A and the outputs of B into h blocks with gates
    of their own; SMEAR (arXiv 2306.03745) averages whole nonlinear adapters, biases included.

    Gates per row are merged into one small pair per row; gates per token are applied to the ranks instead, which is
    the same function without a pair per token.

    Options:
        splits: h; must divide d_in and d_out. Gates are then (..., h * E), block first.
        clamp: cut into the most blocks that divide both sizes, at most `splits`, for models with narrow layers.
        activation: between A and B: gelu, relu, silu, tanh or none.
        bias: add a bias after A and one after B, averaged alike; starts at 0. Not with several blocks.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        ranks: Sequence[int],
        *,
        splits: int = 1,
        clamp: bool = False,
        activation: str | None = None,
        bias: bool = False,
        **given: Any,
    ) -> None:
        common = gcd(d_in, d_out)
        if isinstance(splits, bool) or not isinstance(splits, int) or splits < 1:
            raise ConfigError(f"splits of form 'factor' must be a whole number >= 1, got {splits!r}")
        if clamp:
            splits = max(h for h in range(1, min(splits, common) + 1) if common % h == 0)
        if common % splits:
            raise ConfigError(
                f"splits: {splits} of form 'factor' does not divide a layer of {d_in} inputs and {d_out} outputs; "
                f"write a divisor of {common}, or clamp: true"
            )
        if bias and splits > 1:
            raise ConfigError("form 'factor' has biases only with splits: 1, since they belong to no block")
        super().__init__(d_in, d_out, ranks, activation=activation, bias=bias, **given)
        self.splits = splits

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        """Return the delta (..., d_out) in A's dtype, for x (..., d_in) and gates (..., h * E) that broadcast to x."""
        A, B = self.stack()
        x = x.to(A.dtype)
        if self.dropout is not None:
            x = self.dropout(x)
        weights = self.by_split(gates).to(A.dtype)
        by_row = x.dim() == 3 and weights.dim() == 4 and weights.shape[1] == 1 and x.shape[1] > 1
        with full_precision(x.device):
            if by_row:
                return self._merged(x, A, B, weights.squeeze(1), by_row)
            if weights[..., 0, 0].numel() == 1:  # one mixture for all
                return self._merged(x, A, B, weights.reshape(1, *weights.shape[-2:]), by_row)
            return self._spread(x, A, B, weights)

    def _blocks(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """View A (R, d_in) as (E, r, h, i) and B (d_out, R) as (E, r, h, o)."""
        return tuple(t.unflatten(1, (self.splits, -1)).unflatten(0, (self.num_experts, -1)) for t in (A, B.t()))

    def _merged(self, x: Tensor, A: Tensor, B: Tensor, weights: Tensor, by_row: bool) -> Tensor:
        """One pair per row, or one for all: weights (B|1, h, E)."""
        A, B = self._blocks(A, B)
        A, B = (torch.einsum("bqe,erqi->brqi", weights, t).flatten(2) for t in (A, B))  # (B|1, r, d)
        if not by_row:
            A, B, weights = A[0], B[0], weights[0]
        hidden = x @ A.mT
        if self.down_bias is not None:
            hidden = hidden + weights @ self.down_bias  # h = 1: (B, 1, r) or (1, r)
        delta = (self._act(hidden) * self.scaling) @ B
        return delta if self.up_bias is None else delta + weights @ (self.up_bias * self.scaling)

    def _spread(self, x: Tensor, A: Tensor, B: Tensor, weights: Tensor) -> Tensor:
        """The same with weights (..., h, E) that differ between tokens."""
        A, B = self._blocks(A, B)
        responses = torch.einsum("...qi,erqi->...qer", x.unflatten(-1, (self.splits, -1)), A)
        hidden = (responses * weights[..., None]).sum((-3, -2))
        if self.down_bias is not None:
            hidden = hidden + (weights @ self.down_bias).squeeze(-2)
        hidden = self._act(hidden) * self.scaling
        laid_out = (weights[..., None] * hidden[..., None, None, :]).flatten(-2)  # (..., h, E * r)
        delta = torch.einsum("...qk,kqo->...qo", laid_out, B.flatten(0, 1)).flatten(-2)
        return delta if self.up_bias is None else delta + (weights @ (self.up_bias * self.scaling)).squeeze(-2)

    def mixed(self, gates: Tensor) -> tuple[Tensor, Tensor]:
        """Return the averaged A (r, d_in) and B (d_out, r) of constant gates (E,) or (h * E,), unscaled."""
        if not self.is_lora:
            return Experts.mixed(self, gates)
        A, B = self._blocks(*self.stack())
        weights = self.by_split(gates.flatten()).to(A)
        return (
            torch.einsum("qe,erqi->rqi", weights, A).flatten(1).detach(),
            torch.einsum("qe,erqo->rqo", weights, B).flatten(1).detach().t(),
        )


@forms.register("bottleneck", given=GIVEN)
class Bottleneck(_Stack):
    """Small adapters with an activation between A and B, mixed by their outputs (BECoTTA, arXiv 2402.08712).

    Options:
        activation: gelu, relu, silu or tanh.
        bias: add a bias after A and one after B, starting at 0.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        ranks: Sequence[int],
        *,
        activation: str = "gelu",
        bias: bool = False,
        **given: Any,
    ) -> None:
        super().__init__(d_in, d_out, ranks, activation=activation, bias=bias, **given)

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        """Return the delta (..., d_out) in A's dtype, for x (..., d_in) and gates (..., E) that broadcast to x."""
        A, B = self.stack()
        x = x.to(A.dtype)
        if self.dropout is not None:
            x = self.dropout(x)
        gates = (gates * self.scaling).to(A.dtype)
        with full_precision(x.device):
            hidden = F.linear(x, A, None if self.down_bias is None else self.down_bias.flatten())
            delta = F.linear(self._act(hidden) * self.spread(gates), B)
            return delta if self.up_bias is None else delta + gates @ self.up_bias

    mixed = Experts.mixed
