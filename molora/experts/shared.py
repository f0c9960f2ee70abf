"""Experts that share one low-rank pair and differ in what they do to its ranks: `film` and `chain`.

film     y += s * B ( (A x) * sum_e g_e v_e )                                 v_e: (r,)
chain    h^0 = A x;   h^{i+1} = h^i + sum_e g^i_e C_e h^i;   y += s * B h^n   C_e: (r, r)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from ..kernels.fused import full_precision
from .base import GIVEN, Experts, equal_rank, forms, init_down


class _OnePair(Experts):
    """One pair A (r, d_in), Bt (r, d_out) for all experts of a site."""

    one_pair = True
    is_lora = True

    def __init__(
        self, d_in: int, d_out: int, ranks: Sequence[int], *, init: str | float = "kaiming", **given: Any
    ) -> None:
        super().__init__(d_in, d_out, ranks, **given)
        self.rank = equal_rank(self.form, self.ranks)
        self.A = nn.Parameter(torch.empty(self.rank, d_in))
        self.Bt = nn.Parameter(torch.zeros(self.rank, d_out))
        init_down(self.A, init)

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        """Return the delta (..., d_out) in A's dtype, for x (..., d_in) and gates that broadcast to x."""
        x = x.to(self.A.dtype)
        if self.dropout is not None:
            x = self.dropout(x)
        with full_precision(x.device):
            hidden = self._ranks(F.linear(x, self.A), self.by_split(gates).to(x.dtype))
            return (hidden * self.scaling) @ self.Bt

    def _ranks(self, hidden: Tensor, gates: Tensor) -> Tensor:
        """Return what the experts make of hidden (..., r) under gates (..., h, E)."""
        raise NotImplementedError

    def mixed(self, gates: Tensor) -> tuple[Tensor, Tensor]:
        """Return A (r, d_in) and B (d_out, r) of constant gates (E,) or (h * E,): exact, unscaled."""
        weights = self.by_split(gates.flatten()).to(self.A)
        return self._ranks(self.A.t(), weights).t().detach(), self.Bt.t().detach().clone()


@forms.register("film", given=GIVEN)
class Film(_OnePair):
    """One A and one B for all experts; each expert scales the ranks between (MoFME, arXiv 2312.16610).

    Scales start near 1 (deviation 0.1), so that experts differ and the gates have a gradient as soon as B has one.
    MoFME itself modulates one shared block with scales and shifts; this analogue for LoRA, without shifts, follows our
    notes of the paper and not its code.
    """

    def __init__(self, d_in: int, d_out: int, ranks: Sequence[int], **given: Any) -> None:
        super().__init__(d_in, d_out, ranks, **given)
        self.scales = nn.Parameter(1 + 0.1 * torch.randn(self.num_experts, self.rank))
        self.freeze()

    def _ranks(self, hidden: Tensor, gates: Tensor) -> Tensor:
        return hidden * (gates @ self.scales).squeeze(-2)

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Put the experts in another order."""
        self.scales.copy_(self.scales[order])


@forms.register("chain", given=GIVEN)
class Chain(_OnePair):
    """Experts that act one after another, with gates of their own at every step (Chain-of-Experts, arXiv 2506.18945).

    The paper iterates whole blocks, x^{i+1} = x^i + MoE_i(x^i), with the same experts and another gate each time. A
    single linear layer has d_in != d_out and cannot be iterated, so this is done in the space of the ranks: a
    reconstruction of ours, not the paper's form, and so is that all gates read the layer's input (the paper's gate of
    step i reads x^i). With one step it is plainly a shared B beside experts B C_e: for C = 0 it is one LoRA.

    Options:
        steps: n. Gates are then (..., n * E), step first.
    """

    rests_at_zero = False  # h^0 = A x passes on

    def __init__(self, d_in: int, d_out: int, ranks: Sequence[int], *, steps: int = 2, **given: Any) -> None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ConfigError(f"steps of form 'chain' must be a whole number >= 1, got {steps!r}")
        super().__init__(d_in, d_out, ranks, **given)
        self.splits = steps
        self.C = nn.Parameter(torch.empty(self.num_experts, self.rank, self.rank))
        # not zero: the gates would get no gradient before both B and C have moved
        init_down(self.C.data.flatten(0, 1), "kaiming")
        self.freeze()

    def _ranks(self, hidden: Tensor, gates: Tensor) -> Tensor:
        experts = self.C.transpose(1, 2).flatten(0, 1)  # (E * r, r): rows of expert e take h to C_e h
        for step in range(self.splits):
            weighted = (gates[..., step, :, None] * hidden[..., None, :]).flatten(-2)
            hidden = hidden + weighted @ experts
        return hidden

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Put the experts in another order."""
        self.C.copy_(self.C[order])
