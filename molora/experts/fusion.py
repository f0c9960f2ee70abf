"""Experts whose mixture a learned map turns before it is added: the values of AdapterFusion (arXiv 2005.00247).

    y += V ( s * sum_e g_e B_e A_e x )          V (d_out, d_out), the identity at the start

Since V is linear, it is applied once to the mixture instead of to each expert. The gates are those of any router; with
the scorer `fusion` they are the attention of the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .bank import ExpertBank
from .base import GIVEN, Experts, forms


@forms.register("fusion", given=GIVEN)
class Fusion(ExpertBank):
    """LoRAs whose mixture one learned map V turns before it is added (AdapterFusion, arXiv 2005.00247).

    With `frozen: all` the LoRAs are frozen and V is trained. The authors start V at the identity plus 1e-6 everywhere;
    here it is the identity, so that a fresh V changes nothing.
    """

    in_kernels = False

    def __init__(self, d_in: int, d_out: int, ranks: Sequence[int], **given: Any) -> None:
        super().__init__(d_in, d_out, ranks, **given)
        self.value = nn.Parameter(torch.eye(d_out))

    def freeze(self) -> None:
        """Make sure that frozen LoRAs are not trainable; V is."""
        if self.all_frozen:
            self.A.requires_grad_(False)
            self.Bt.requires_grad_(False)
        if self.frozen_A is not None and self.frozen_Bt is not None:
            self.frozen_A.requires_grad_(False)
            self.frozen_Bt.requires_grad_(False)

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        """Return the delta (..., d_out) for x (..., d_in) and gates (..., E) that broadcast to x."""
        mixed = super().forward(x, gates)
        return F.linear(mixed, self.value.to(mixed.dtype))

    add_to = Experts.add_to

    def pair(self, expert: int) -> tuple[Tensor, Tensor]:
        """Return copies of A (r, d_in) and V B (d_out, r) of one expert, without the bank's scaling."""
        A, B = super().pair(expert)
        return A, self.value.detach().to(B) @ B

    def delta_weight(self, gates: Tensor) -> Tensor:
        """Return the weight change (d_out, d_in) of constant gates (E,)."""
        return self.value @ super().delta_weight(gates)
