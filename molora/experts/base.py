"""Experts: what every form of experts answers to, and the registry of forms.

A form is a Module built with `(d_in, d_out, ranks, **options)`, where molora itself passes the options of GIVEN. It
gets gates (..., E), or (..., h * E) when it takes h gates per expert (blocks of a factor, steps of a chain), and adds
what the experts do to the output of the base layer. A form where gates weigh the outputs of low-rank pairs is an
ExpertBank and runs in the kernels; every other one has its own explicit path here in this folder, and says what it
cannot be: written slot by slot, merged into a weight, exported as a LoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..registry import Registry

forms = Registry("form")

# What molora passes to a form itself, from the keys of `experts`; the other keyword arguments are the form's options.
GIVEN = ("form", "scaling", "dropout", "frozen", "init")


class Experts(nn.Module):
    """The experts of one site, in any form.

    Args:
        d_in, d_out: sizes of the base layer.
        ranks: rank of each expert.
        form: the name of the form.
        scaling: multiplies the whole delta (alpha / r in LoRA's terms).
        dropout: on the input of the experts, in training.
        frozen: expert indices that get no gradient and no weight decay, or "all"; most forms know only "all".

    Attributes:
        splits: h, how many gates each expert takes.
        in_kernels: whether the kernels compute this form (see ExpertBank).
        on_input: whether it changes the input of the base layer instead of its output (see `before`).
        is_lora: whether constant gates make one LoRA of the experts (see `mixed`).
        rests_at_zero: whether nothing acts while all gates are 0.

    Raises:
        ConfigError: the arguments contradict each other.
    """

    splits: int = 1
    in_kernels: bool = False
    on_input: bool = False
    is_lora: bool = False
    rests_at_zero: bool = True
    one_pair = False  # whether all experts share what a single frozen expert would freeze

    def __init__(
        self,
        d_in: int,
        d_out: int,
        ranks: Sequence[int],
        *,
        form: str,
        scaling: float = 1.0,
        dropout: float = 0.0,
        frozen: Sequence[int] | Literal["all"] = (),
    ) -> None:
        super().__init__()
        self.d_in, self.d_out, self.form, self.scaling = d_in, d_out, form, float(scaling)
        self.ranks = tuple(int(rank) for rank in ranks)
        self.all_frozen = frozen == "all"
        self.frozen = () if frozen == "all" else tuple(sorted(set(frozen)))
        _check(self.ranks, dropout, self.frozen)
        if self.scaling == 0:
            raise ConfigError("experts.scaling must not be 0: the experts would never act")
        if self.frozen and self.one_pair:
            raise ConfigError(f"form '{form}' cannot freeze single experts, since they share A; write frozen: all")
        self.dropout = nn.Dropout(dropout) if dropout > 0 else None

    @property
    def num_experts(self) -> int:
        """The number of experts E."""
        return len(self.ranks)

    @property
    def num_gates(self) -> int:
        """How many gates there are: h * E, ordered by block (or step) first and expert second."""
        return self.splits * self.num_experts

    @property
    def drops(self) -> bool:
        """Whether dropout acts on the input of the experts now."""
        return self.dropout is not None and self.training

    def freeze(self) -> None:
        """Make sure that frozen experts are not trainable; PEFT switches all parameters on with its adapters."""
        if self.all_frozen:
            self.requires_grad_(False)

    def by_split(self, gates: Tensor) -> Tensor:
        """Lay gates (..., h * E) out as (..., h, E); gates (..., E) count for every block alike."""
        if gates.shape[-1] == self.num_experts:
            return gates[..., None, :].expand(*gates.shape[:-1], self.splits, self.num_experts)
        return gates.unflatten(-1, (self.splits, self.num_experts))

    def before(self, x: Tensor, gates: Tensor) -> Tensor:
        """Return what the base layer shall read instead of x; only called when `on_input`."""
        return x

    def add_to(self, y: Tensor, x: Tensor, gates: Tensor, *, in_place: bool = False, sparse: bool = False) -> Tensor:
        """Return y + delta in the dtype of y.

        Args:
            y: (..., d_out), the output of the base layer.
            x: (..., d_in).
            gates: (..., E) or (..., h * E) that broadcast to x.
            in_place, sparse: as in ExpertBank; hints that this form has no use for.
        """
        return (y + self(x, gates)).to(y.dtype)

    # --- what only some forms can do ------------------------------------------------------------------------------

    def pair(self, expert: int) -> tuple[Tensor, Tensor]:
        """Return copies of A (r, d_in) and B (d_out, r) of what one expert alone does, without the scaling."""
        one_hot = torch.zeros(self.num_experts).index_fill(0, torch.tensor(expert), 1.0)
        return self.mixed(one_hot)

    def mixed(self, gates: Tensor) -> tuple[Tensor, Tensor]:
        """Return A (R', d_in) and B (d_out, R') of the LoRA that the experts are under constant gates, unscaled.

        Raises:
            ConfigError: the form is no LoRA under constant gates.
        """
        raise ConfigError(f"experts of form '{self.form}' are no LoRA, even under constant gates: {self._because}")

    _because = "keep serving the adapter as it is"

    def delta_weight(self, gates: Tensor) -> Tensor:
        """Return the weight change (d_out, d_in) of constant gates; raise ConfigError where there is none."""
        A, B = self.mixed(gates)
        return self.scaling * B @ A

    def why_not_write(self, slot: int, A: Tensor | None = None, B: Tensor | None = None) -> str | None:
        """Return why `write` would refuse these tensors (or any at all, without them), or None when it would not."""
        return f"experts of form '{self.form}' have no slots for LoRAs; use form: lora"

    def write(self, slot: int, A: Tensor, B: Tensor, scale: float = 1.0) -> None:
        """Write one expert in place, where the form has slots; raise ConfigError elsewhere."""
        raise ConfigError(self.why_not_write(slot, A, B) or "")

    def clear(self, slot: int) -> None:
        """Make one expert zero, in place, where the form has slots; raise ConfigError elsewhere."""
        raise ConfigError(self.why_not_write(slot) or "")

    def permute(self, order: Tensor) -> None:
        """Put the experts in another order."""
        raise NotImplementedError

    def gradients(self) -> dict[str, list[nn.Parameter]]:
        """Return the trainable parameters that learn at once (`B`) and those that wait for them (`A`), for checks."""
        early = ("Bt", "vectors", "up_bias")
        named = [(name, p) for name, p in self.named_parameters(recurse=False) if p.requires_grad]
        found = {
            "A": [p for name, p in named if not name.endswith(early)],
            "B": [p for name, p in named if name.endswith(early)],
        }
        return {part: parameters for part, parameters in found.items() if parameters}


def _check(ranks: tuple[int, ...], dropout: float, frozen: Sequence[int]) -> None:
    if not ranks or min(ranks) < 1:
        raise ConfigError(f"experts need at least one expert of rank >= 1, got ranks {list(ranks)}")
    if not 0 <= dropout < 1:
        raise ConfigError(f"experts.dropout must be in [0, 1), got {dropout}")
    wrong = [e for e in frozen if not 0 <= e < len(ranks)]
    if wrong:
        raise ConfigError(f"experts.frozen names {wrong}, but there are experts 0 to {len(ranks) - 1}")
    if frozen and len(set(frozen)) == len(ranks):
        raise ConfigError("experts.frozen names every expert; write frozen: all")


def equal_rank(form: str, ranks: Sequence[int]) -> int:
    """Return the one rank of all experts; raise ConfigError when they differ."""
    if len(set(ranks)) > 1:
        raise ConfigError(f"form '{form}' needs one rank for all experts, got {sorted(set(ranks))}")
    return int(ranks[0])


def init_down(weight: Tensor, init: Any) -> None:
    """Fill a down-projection (R, d_in), each row alone, so that one call over a stack equals one per expert."""
    if init == "kaiming":
        nn.init.kaiming_uniform_(weight, a=5**0.5)
    elif isinstance(init, (int, float)) and not isinstance(init, bool) and init > 0:
        nn.init.normal_(weight, std=float(init))
    else:
        raise ConfigError(f"experts.init {init!r} is unknown; write 'kaiming' or a standard deviation like 0.02")
