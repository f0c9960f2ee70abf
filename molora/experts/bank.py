"""ExpertBank: the experts of one site, stacked, so that one product serves all of them.

    delta = scaling * B ((A dropout(x)) * spread(gates))        A: (R, d_in)   B: (d_out, R)

B is stored transposed, as the parameter `Bt` (R, d_out): then the ranks of one expert lie together in both factors, so
that few active experts are read, and one slot is written, without touching the others.

Three forms fill the same stack: `lora` (one low-rank pair per expert; `spread` repeats each gate over its ranks),
`rank` (every rank is an expert; `spread` is the identity) and `shared_a` (one A for all, one B per expert). The forms
of factor.py read it in other ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..kernels.choose import add_delta
from ..kernels.dense import dense, dense_shared
from ..kernels.fused import full_precision
from ..kernels.layout import Layout
from .base import GIVEN, Experts, equal_rank, forms, init_down
from .merge import product_merge

FORMS = ("lora", "rank", "shared_a")  # of this bank; `forms` in base.py knows every form


class ExpertBank(Experts):
    """Stacked low-rank experts of one site, whose outputs the gates weigh.

    Args:
        d_in, d_out: sizes of the base layer.
        ranks: rank of each expert; all 1 for form `rank`, all equal for `shared_a`.
        form: `lora`, `rank` or `shared_a`.
        scaling: multiplies the whole delta (alpha / r in LoRA's terms).
        dropout: on the input of the experts, in training.
        frozen: expert indices whose A and B get no gradient and no weight decay (forms `lora` and `rank` only), or
            "all" for a bank whose router alone is trained.
        init: `kaiming` (uniform with a = sqrt(5), as LoRA) or the standard deviation of a normal, for A; B is zero,
            so that a fresh bank changes nothing.

    Raises:
        ConfigError: the arguments contradict each other.
    """

    in_kernels = True
    is_lora = True

    def __init__(
        self,
        d_in: int,
        d_out: int,
        ranks: Sequence[int],
        *,
        form: str = "lora",
        scaling: float = 1.0,
        dropout: float = 0.0,
        frozen: Sequence[int] | Literal["all"] = (),
        init: str | float = "kaiming",
    ) -> None:
        if self.in_kernels and form not in FORMS:
            raise ConfigError(f"experts.form {form!r} is unknown; known: {', '.join(FORMS)}")
        self.one_pair = form == "shared_a"
        super().__init__(d_in, d_out, ranks, form=form, scaling=scaling, dropout=dropout, frozen=frozen)
        _check(self.ranks, form)
        self.layout = Layout(self.ranks, form == "shared_a", self.scaling)
        self._live = [e for e in range(self.num_experts) if e not in self.frozen]
        self.A, self.Bt = self._new(self._live, init)
        # Frozen experts are parameters of their own: a gradient mask would still let weight decay move them.
        self.frozen_A, self.frozen_Bt = self._new(list(self.frozen), init) if self.frozen else (None, None)
        self._order = self._stack_order()
        self._starts = self._slot_starts()
        self.freeze()

    def _new(self, experts: list[int], init: str | float) -> tuple[nn.Parameter, nn.Parameter]:
        width = sum(self.ranks[e] for e in experts)
        A = nn.Parameter(torch.empty(self.ranks[0] if self.form == "shared_a" else width, self.d_in))
        Bt = nn.Parameter(torch.zeros(width, self.d_out))
        init_down(A, init)
        return A, Bt

    def _stack_order(self) -> list[int] | None:
        """Return where each rank of expert order lies in the stack [trainable, frozen]; None when in order already."""
        stored = self._live + list(self.frozen)
        if stored == sorted(stored):
            return None
        start, at = {}, 0
        for expert in stored:
            start[expert], at = at, at + self.ranks[expert]
        return [start[e] + i for e in range(self.num_experts) for i in range(self.ranks[e])]

    def _slot_starts(self) -> dict[int, tuple[int, bool]]:
        """Return where the ranks of each expert begin in its parameters, and whether those are the frozen ones."""
        starts = {}
        for experts, is_frozen in ((self._live, False), (list(self.frozen), True)):
            for position, expert in enumerate(experts):
                starts[expert] = (sum(self.ranks[e] for e in experts[:position]), is_frozen)
        return starts

    @property
    def B(self) -> Tensor:
        """The trainable up-projections (d_out, R), a view of the parameter `Bt`."""
        return self.Bt.t()

    def freeze(self) -> None:
        """Make sure that frozen experts are not trainable; PEFT switches all parameters on with its adapters."""
        super().freeze()
        if self.frozen_A is not None and self.frozen_Bt is not None:
            self.frozen_A.requires_grad_(False)
            self.frozen_Bt.requires_grad_(False)

    def stack(self) -> tuple[Tensor, Tensor]:
        """Return A (R, d_in) and B (d_out, R) with the ranks of expert 0 first, then expert 1, ..."""
        if self.frozen_A is None or self.frozen_Bt is None:
            return self.A, self.Bt.t()
        A, Bt = torch.cat([self.A, self.frozen_A]), torch.cat([self.Bt, self.frozen_Bt])
        if self._order is not None:
            A, Bt = A[self._order], Bt[self._order]
        return A, Bt.t()

    def spread(self, gates: Tensor) -> Tensor:
        """Repeat gates (..., E) over the ranks of each expert -> (..., R)."""
        if self.form == "rank":
            return gates
        rank = self.ranks[0]
        if all(r == rank for r in self.ranks):
            return gates if rank == 1 else gates[..., None].expand(*gates.shape, rank).flatten(-2)
        repeats = torch.tensor(self.ranks, device=gates.device)
        return gates.repeat_interleave(repeats, dim=-1, output_size=sum(self.ranks))

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        """Return the delta (..., d_out) in A's dtype, for x (..., d_in) and gates (..., E) that broadcast to x."""
        A, B = self.stack()
        x = x.to(A.dtype)
        if self.dropout is not None:
            x = self.dropout(x)
        gates = (gates * self.scaling).to(A.dtype)
        with full_precision(x.device):
            if self.form == "shared_a":
                return dense_shared(x, A, B, gates)
            return dense(x, A, B, self.spread(gates))

    def add_to(self, y: Tensor, x: Tensor, gates: Tensor, *, in_place: bool = False, sparse: bool = False) -> Tensor:
        """Return y + delta in the dtype of y, by the fastest kernel that fits (molora/kernels/choose.py).

        Args:
            y: (..., d_out), the output of the base layer.
            x: (..., d_in).
            gates: (..., E) that broadcast to x.
            in_place: y is fresh and nobody else holds it, so it may be written to.
            sparse: the gradient of a gate that is zero does not matter (see Router.sparse).
        """
        A, B = self.stack()
        if self.dropout is not None and self.drops:
            x = self.dropout(x.to(A.dtype))
        return add_delta(y, x, A, B, gates, self.layout, in_place, sparse, training=self.training)

    def pair(self, expert: int) -> tuple[Tensor, Tensor]:
        """Return copies of A (r, d_in) and B (d_out, r) of one expert, without the bank's scaling."""
        A, B = self.stack()
        start = sum(self.ranks[:expert])
        ranks = slice(start, start + self.ranks[expert])
        A = A if self.form == "shared_a" else A[ranks]
        return A.detach().clone(), B[:, ranks].detach().clone()

    def mixed(self, gates: Tensor) -> tuple[Tensor, Tensor]:
        """Return A (R', d_in) and B (d_out, R') of the LoRA that the experts are under constant gates (E,), unscaled.

        Experts whose gate is 0 are left out; with one shared A the rank stays r.
        """
        values = gates.flatten().tolist()
        used = [(gate, *self.pair(number)) for number, gate in enumerate(values) if gate != 0]
        if not used:
            A, B = self.pair(0)
            return A, B * 0
        if self.form == "shared_a":
            return used[0][1], sum(B * gate for gate, _, B in used)
        return product_merge([(A, B) for _, A, B in used], [gate for gate, _, _ in used])

    @torch.no_grad()
    def write(self, slot: int, A: Tensor, B: Tensor, scale: float = 1.0) -> None:
        """Write one expert in place: A (r', d_in), B (d_out, r') with r' <= the slot's rank; the rest becomes zero.

        `scale` is the expert's own scale; it is folded into B so that `scaling * B A` equals `scale * B A` as given.

        Raises:
            ConfigError: the slot does not exist, or the tensors do not fit it.
        """
        wrong = self.why_not_write(slot, A, B)
        if wrong is not None:
            raise ConfigError(wrong)
        own_A, own_Bt = self._slot(slot)
        filled = A.shape[0]
        own_A[:filled].copy_(A)
        own_Bt[:filled].copy_(B.t())
        if scale != self.scaling:
            own_Bt[:filled].mul_(scale / self.scaling)
        if filled < len(own_A):
            own_A[filled:].zero_()
            own_Bt[filled:].zero_()

    @torch.no_grad()
    def clear(self, slot: int) -> None:
        """Make one expert zero, in place."""
        for own in self._slot(slot):
            own.zero_()

    def why_not_write(self, slot: int, A: Tensor | None = None, B: Tensor | None = None) -> str | None:
        """Return why `write` would refuse these tensors (or any at all, without them), or None when it would not."""
        if not 0 <= slot < self.num_experts:
            return f"slot {slot} does not exist; the bank has {self.num_experts} experts"
        if self.form == "shared_a":
            return "a bank with one shared A has no slots to write; use form: lora"
        if A is None or B is None:
            return None
        fits = A.dim() == B.dim() == 2 and A.shape[1] == self.d_in and B.shape[0] == self.d_out
        if fits and A.shape[0] == B.shape[1] and A.shape[0] <= self.ranks[slot]:
            return None
        return (
            f"expert of A {tuple(A.shape)}, B {tuple(B.shape)} does not fit slot {slot}: "
            f"need A (r, {self.d_in}), B ({self.d_out}, r) with r <= {self.ranks[slot]}"
        )

    def _slot(self, slot: int) -> tuple[Tensor, Tensor]:
        """Return A (r, d_in) and Bt (r, d_out) of one expert as views of the parameters."""
        start, is_frozen = self._starts[slot]
        A, Bt = (self.frozen_A, self.frozen_Bt) if is_frozen else (self.A, self.Bt)
        ranks = slice(start, start + self.ranks[slot])
        return A[ranks], Bt[ranks]

    def delta_weight(self, gates: Tensor) -> Tensor:
        """Return the weight change (d_out, d_in) of constant gates (E,): `scaling * sum_e g_e B_e A_e`."""
        A, B = self.stack()
        weighted = B * (self.spread(gates.to(B)) * self.scaling)
        if self.form == "shared_a":
            weighted = weighted.unflatten(1, (self.num_experts, -1)).sum(1)
        return weighted @ A

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Put the experts in another order; needs equal ranks and no frozen experts."""
        if self.frozen or len(set(self.ranks)) > 1:
            raise ConfigError("experts of different ranks, or partly frozen, cannot be permuted in place")
        rank = self.ranks[0]
        rows = (order[:, None] * rank + torch.arange(rank, device=order.device)).flatten()
        if self.form != "shared_a":
            self.A.copy_(self.A[rows])
        self.Bt.copy_(self.Bt[rows])


def _check(ranks: tuple[int, ...], form: str) -> None:
    if form == "rank" and set(ranks) != {1}:
        raise ConfigError(f"form 'rank' makes every rank an expert: set rank: 1 and num: <total rank>, got {ranks[0]}")
    if form == "shared_a":
        equal_rank(form, ranks)


@forms.register("lora", given=GIVEN)
def lora(*sizes: Any, **given: Any) -> ExpertBank:
    """One low-rank pair per expert; the gates weigh their outputs."""
    return ExpertBank(*sizes, **given)


@forms.register("rank", given=GIVEN)
def rank(*sizes: Any, **given: Any) -> ExpertBank:
    """Every rank of one low-rank pair is an expert (SMoRA, arXiv 2501.15103)."""
    return ExpertBank(*sizes, **given)


@forms.register("shared_a", given=GIVEN)
def shared_a(*sizes: Any, **given: Any) -> ExpertBank:
    """One A for all experts, one B per expert (HydraLoRA, arXiv 2404.19245)."""
    return ExpertBank(*sizes, **given)
