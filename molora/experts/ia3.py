"""Experts that are one vector each: (IA)^3, mixed per token by MoV (arXiv 2309.05444).

    output    y = (W x + b) * sum_e p_e v_e                        v_e: (d_out,)
    input     y = W (x * sum_e p_e v_e) + b                        v_e: (d_in,)

(IA)^3 rescales activations: the keys and the values of attention, which are outputs of their layers, and what is
between the two layers of an MLP, which is the input of the second. (In a gated MLP that is the output of the layer
without the activation as well.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .base import GIVEN, Experts, forms


@forms.register("ia3", given=GIVEN)
class Ia3(Experts):
    """One vector per expert that rescales the output of the layer, or its input (MoV, arXiv 2309.05444).

    The parameters are the differences v_e - 1, which start at 0: y = (W x + b) * (1 + sum_e p_e (v_e - 1)). Where gates
    sum to 1, as in MoV, this is the same; where they do not, a fresh bank still changes nothing, and an expert that
    is not chosen does nothing. `rank`, `alpha`, `scaling` and `init` mean nothing to this form.

    Options:
        side: `output` or `input`.
    """

    is_lora = False
    _because = "they multiply what the layer computes; keep serving the adapter as it is"

    def __init__(
        self, d_in: int, d_out: int, ranks: Sequence[int], *, side: str = "output", init: Any = None, **given: Any
    ) -> None:
        if side not in ("output", "input"):
            raise ConfigError(f"side {side!r} of form 'ia3' is unknown; known: output, input")
        super().__init__(d_in, d_out, ranks, **given)
        if self.dropout is not None:
            raise ConfigError("form 'ia3' has no dropout, since its experts read no input; set experts.dropout: 0")
        if self.frozen:
            raise ConfigError("form 'ia3' cannot freeze single experts; write frozen: all")
        self.on_input = side == "input"
        self.vectors = nn.Parameter(torch.zeros(self.num_experts, d_in if self.on_input else d_out))
        self.freeze()

    def scale(self, gates: Tensor) -> Tensor:
        """Return the factors (..., d) of gates (..., E)."""
        return 1 + gates.to(self.vectors.dtype) @ self.vectors

    def before(self, x: Tensor, gates: Tensor) -> Tensor:
        """Return the rescaled input of the base layer, in the dtype of x."""
        return (x * self.scale(gates)).to(x.dtype) if self.on_input else x

    def add_to(self, y: Tensor, x: Tensor, gates: Tensor, *, in_place: bool = False, sparse: bool = False) -> Tensor:
        """Return the rescaled output y (..., d_out) in its dtype; x is not read."""
        return y if self.on_input else (y * self.scale(gates)).to(y.dtype)

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Put the experts in another order."""
        self.vectors.copy_(self.vectors[order])
