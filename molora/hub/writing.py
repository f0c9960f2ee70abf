"""Writing one expert into the slot of all banks at once: what `ExpertBank.write` does, with one call for many layers.

On a CPU most of the time of a swap goes into hundreds of small calls, and into turning B (d_out, r) around, since banks
keep the ranks of an expert together. So views of each slot are kept, A is copied for all layers in one call, and B by
NumPy, which turns small matrices twice as fast as torch does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..experts.bank import ExpertBank
from ..lora_files import Pair


class _View(NamedTuple):
    """One slot of one bank: A (r, d_in), Bt (r, d_out), and Bt as an array where NumPy can write to it."""

    A: Tensor
    Bt: Tensor
    array: Any


class SlotWriter:
    """Writes experts into the slots of the banks of one mixture.

    Args:
        banks: by the path of the layer; all of form `lora`.
    """

    def __init__(self, banks: Mapping[str, ExpertBank]) -> None:
        self.banks = dict(banks)
        self._views: dict[int, tuple[list[int], dict[str, _View]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the views out: a copy has banks of its own."""
        return {"banks": self.banks, "_views": {}}

    @torch.no_grad()
    def write(self, slot: int, pairs: Mapping[str, Pair], tensors: Mapping[str, Tensor], before: set[str]) -> None:
        """Write the pairs of one LoRA into a slot; layers of `before` that it leaves alone become zero there.

        Everything must have been checked to fit.
        """
        views = self._views_of(slot)
        own, given = [], []
        for path, pair in pairs.items():
            view, A, B = views[path], tensors[pair.A], tensors[pair.B]
            filled, whole = A.shape[0], view.A.shape[0]
            own.append(view.A if filled == whole else view.A[:filled])
            given.append(A)
            up = view.Bt if filled == whole else view.Bt[:filled]
            if view.array is not None and B.dtype == torch.float32 and B.device.type == "cpu":
                view.array[:filled] = B.numpy().T
            else:
                up.copy_(B.t())
            scaling = self.banks[path].scaling
            if pair.scale != scaling:
                up.mul_(pair.scale / scaling)
            if filled < whole:
                view.A[filled:].zero_()
                view.Bt[filled:].zero_()
        if own:
            torch._foreach_copy_(own, given)
        for path in before - pairs.keys():
            views[path].A.zero_()
            views[path].Bt.zero_()
        # NumPy's writes are no news to autograd, which must refuse to go backward through what they have changed
        torch.autograd.graph.increment_version([views[path].Bt for path in pairs])

    def _views_of(self, slot: int) -> dict[str, _View]:
        """Return the views of a slot, made anew when parameters were moved since."""
        places = [bank._parameters[name].data_ptr() for bank in self.banks.values() for name in ("A", "Bt")]
        kept = self._views.get(slot)
        if kept is not None and kept[0] == places:
            return kept[1]
        views = {}
        for path, bank in self.banks.items():
            A, Bt = (part.detach() for part in bank._slot(slot))
            is_plain = Bt.device.type == "cpu" and Bt.dtype == torch.float32
            views[path] = _View(A, Bt, Bt.numpy() if is_plain else None)
        self._views[slot] = places, views
        return views
