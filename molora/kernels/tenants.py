"""Rows that each have their own experts, as in serving many tenants at once: gather per row, then one batched product.

Gates are (B, 1, E) with few entries other than zero in each row: one for a tenant with one adapter, several for a
tenant's fixed mixture, none for a row that wants the base model. The cost follows the experts of a row, not how many
are loaded or how many different ones share a batch. While the gates and the experts stay as they are, as they do from
one decoding step to the next, the gathered copies are kept.

Shape letters: B rows, S positions, d_in, d_out, E experts, r ranks per expert, K experts per row at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .fused import full_precision
from .layout import Layout


@dataclass
class Gathered:
    """The experts of each row: A (B, K * r, d_in), B (B, K * r, d_out) times gate and scale."""

    gates: Tensor
    versions: tuple[int, int]
    A: Tensor
    B: Tensor


# The latest gather of each bank, by its A. Held weakly: it goes when the bank goes.
_kept: WeakIdKeyDictionary = WeakIdKeyDictionary()


def why_not(y: Tensor, x: Tensor, A: Tensor, B: Tensor, layout: Layout) -> str | None:
    """Return why this kernel cannot take a call, or None when it can."""
    if layout.shared or layout.rank is None:
        return "it needs experts with their own A and equal ranks"
    return None if x.dim() == 3 else f"it needs x (B, S, d_in), got {tuple(x.shape)}"


def tenants(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, gates: Tensor, layout: Layout, in_place: bool = False
) -> Tensor:
    """Return y plus the delta of the experts of each row, without gradient.

    Arguments as in `fused.fused`, with x (B, S, d_in) and gates (B, 1, E), or (B, S, E) at S = 1.
    """
    with full_precision(x.device):
        found = gather(A, B, gates.expand(x.shape[0], *gates.shape[1:]), layout, keep=x.shape[1] == 1)
        if found is None:
            return y
        hidden = torch.bmm(x.to(A.dtype), found.A.transpose(1, 2))
        if in_place and y.dtype == A.dtype:
            return y.baddbmm_(hidden, found.B)
        if y.dtype == A.dtype:
            return torch.baddbmm(y, hidden, found.B)
        delta = torch.bmm(hidden, found.B)
        return y.add_(delta) if in_place else (y + delta).to(y.dtype)


def gather(A: Tensor, B: Tensor, gates: Tensor, layout: Layout, keep: bool) -> Gathered | None:
    """Return the experts of each row, from the last call if nothing has changed; None when no row has any."""
    last = _kept.get(A)
    versions = None if A.is_inference() or B.is_inference() else (A._version, B._version)
    if last is not None and last.versions == versions and torch.equal(last.gates, gates):
        return last
    rows = gates.reshape(gates.shape[0], -1)
    most = int(rows.ne(0).sum(1).max()) if rows.numel() else 0
    if most == 0:
        return None
    # rows with fewer experts than others are filled up with experts of gate 0
    chosen = rows.ne(0).to(torch.uint8).topk(most, dim=1).indices
    weights = rows.gather(1, chosen).to(A.dtype) * layout.scale
    rank = layout.rank or 1
    some_A = A.unflatten(0, (layout.num_experts, rank))[chosen].flatten(1, 2)
    some_B = B.t().unflatten(0, (layout.num_experts, rank))[chosen] * weights[:, :, None, None]
    found = Gathered(gates.clone(), versions or (0, 0), some_A, some_B.flatten(1, 2))
    if keep and versions is not None:
        _kept[A] = found
    return found
