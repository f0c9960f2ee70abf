"""Experts with a gate of their own on the input, and a norm on their ranks: the form `gated`.

u_e = U_e x                                             U_e: (q, d_in)
y  += s * sum_e g_e B_e N( A_e (x * 2 sigmoid(V_e^T u_e)) )   V_e: (q, d_in)   N: the RMS norm over r, or nothing
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


@forms.register("gated", given=GIVEN)
class Gated(Experts):
    """LoRA experts that each rescale their input by `2 sigmoid(x U V)` (the feature gates of HoME, arXiv 2408.05430).

    V starts at 0, so that every gate starts at 1 and the experts are plain LoRAs. With `norm` the ranks of an expert
    are divided by their root mean square, so that no expert outgrows the others (HoME's Swish(BatchNorm(.)) for
    experts that are linear; inferred). Costs E d_in numbers per token.

    Options:
        gate_rank: q, the rank of the gate on the input.
        norm: divide A_e x by its root mean square.
    """

    _because = "they rescale their input by what it is"

    def __init__(
        self,
        d_in: int,
        d_out: int,
        ranks: Sequence[int],
        *,
        gate_rank: int = 4,
        norm: bool = False,
        init: str | float = "kaiming",
        **given: Any,
    ) -> None:
        super().__init__(d_in, d_out, ranks, **given)
        if isinstance(gate_rank, bool) or not isinstance(gate_rank, int) or gate_rank < 1:
            raise ConfigError(f"gate_rank of form 'gated' must be a whole number >= 1, got {gate_rank!r}")
        if self.frozen:
            raise ConfigError("form 'gated' cannot freeze single experts; write frozen: all")
        self.rank, self.gate_rank, self.norm = equal_rank(self.form, self.ranks), gate_rank, norm
        experts = self.num_experts
        self.A = nn.Parameter(torch.empty(experts * self.rank, d_in))
        self.Bt = nn.Parameter(torch.zeros(experts * self.rank, d_out))
        self.U = nn.Parameter(torch.empty(experts * gate_rank, d_in))
        self.V = nn.Parameter(torch.zeros(experts * gate_rank, d_in))
        init_down(self.A, init)
        init_down(self.U, init)
        self.freeze()

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        """Return the delta (..., d_out) in A's dtype, for x (..., d_in) and gates (..., E) that broadcast to x."""
        x = x.to(self.A.dtype)
        if self.dropout is not None:
            x = self.dropout(x)
        by_expert = (self.num_experts, -1)
        with full_precision(x.device):
            inner = F.linear(x, self.U).unflatten(-1, by_expert)  # (..., E, q)
            scale = 2 * torch.sigmoid(torch.einsum("...eq,eqi->...ei", inner, self.V.unflatten(0, by_expert)))
            hidden = torch.einsum("...ei,eri->...er", x[..., None, :] * scale, self.A.unflatten(0, by_expert))
            if self.norm:
                hidden = F.rms_norm(hidden, (self.rank,))
            hidden = hidden * (gates.to(x.dtype) * self.scaling)[..., None]
            return hidden.flatten(-2) @ self.Bt

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Put the experts in another order."""
        for parameter in (self.A, self.Bt, self.U, self.V):
            rows = parameter.unflatten(0, (self.num_experts, -1))
            parameter.copy_(rows[order].flatten(0, 1))
