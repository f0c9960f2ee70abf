"""A pool of experts: one bank for several layers, each of which routes into it for itself (UniPool, 2605.06665).

The first layer of a pool owns the bank; every other one holds a PooledBank, which has no parameters and reads those of
the owner. So the experts are trained, counted and saved once, whoever does the saving, and a copy of a model copies
both together.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import ConfigError
from .bank import ExpertBank
from .base import Experts

# Who shares experts inside a stack of blocks: nobody, layers of equal shape, or layers of equal shape and name.
POOLS = ("none", "shape", "name")


class PooledBank(ExpertBank):
    """The bank of another layer, seen from this one.

    Args:
        owner: the bank that holds the parameters.
    """

    def __init__(self, owner: ExpertBank) -> None:
        dropout = 0.0 if owner.dropout is None else owner.dropout.p
        Experts.__init__(
            self, owner.d_in, owner.d_out, owner.ranks, form=owner.form, scaling=owner.scaling, dropout=dropout
        )
        self.all_frozen, self.frozen, self.one_pair = owner.all_frozen, owner.frozen, owner.one_pair
        self.layout, self._live, self._order = owner.layout, owner._live, owner._order
        self._starts = owner._starts
        self._owner = (owner,)  # in a tuple, so that it is not registered as a part of this bank

    @property
    def owner(self) -> ExpertBank:
        """The bank that holds the parameters."""
        return self._owner[0]

    @property
    def A(self) -> nn.Parameter:  # type: ignore[override]
        """The down-projections of the owner."""
        return self.owner.A

    @property
    def Bt(self) -> nn.Parameter:  # type: ignore[override]
        """The up-projections of the owner."""
        return self.owner.Bt

    @property
    def frozen_A(self) -> nn.Parameter | None:  # type: ignore[override]
        """The frozen down-projections of the owner."""
        return self.owner.frozen_A

    @property
    def frozen_Bt(self) -> nn.Parameter | None:  # type: ignore[override]
        """The frozen up-projections of the owner."""
        return self.owner.frozen_Bt

    def freeze(self) -> None:
        """Do nothing: the owner freezes what is frozen."""


class Pools:
    """The pools of one adapter while it is put into a model."""

    def __init__(self) -> None:
        self._owners: dict[tuple[Any, ...], ExpertBank] = {}

    def join(self, bank: Any, kind: str, stack: str, name: str) -> Any:
        """Return the bank of a layer: its own when it is the first of its pool, else a view of the owner's.

        Args:
            bank: a bank made for the layer alone.
            kind: one of POOLS.
            stack: the stack of blocks the layer stands in.
            name: the last part of its path.
        """
        if kind == "none":
            return bank
        if type(bank) is not ExpertBank:
            raise ConfigError(f"experts.pool cannot hold experts of form '{bank.form}' at layer '{name}'")
        key = (stack, name if kind == "name" else None, bank.d_in, bank.d_out, bank.ranks, bank.form)
        owner = self._owners.setdefault(key, bank)
        return bank if owner is bank else PooledBank(owner)
