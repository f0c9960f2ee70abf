"""Shapes: inputs, gates and decisions laid out for each other.

Shape letters: B rows, S positions, T = B S tokens, d hidden size, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import RoutingError
from .passes import Pass, Site
from .types import Routing


def as_gates(pinned: Tensor) -> Tensor:
    """Lay gates (E,), (S, E) or (B|1, S|1, E) out as float32 (B|1, S|1, E)."""
    return pinned.to(torch.float32).reshape((1,) * (3 - pinned.dim()) + pinned.shape)


def fits_rows(told: Tensor, hidden: Tensor) -> bool:
    """Tell whether (B|1, S|1, n) broadcasts to hidden (B, S, d)."""
    return told.shape[0] in (1, hidden.shape[0]) and told.shape[1] in (1, hidden.shape[1])


def by_beam(pinned: Tensor, hidden: Tensor, now: Pass) -> Tensor:
    """Repeat gates (B, S|1, E) pinned per row of a prompt for the beams or samples of that row inside generate()."""
    rows, beams = pinned.shape[0], hidden.shape[0] // max(1, pinned.shape[0])
    if rows == 1 or beams < 2 or rows != now.prompt_rows or rows * beams != hidden.shape[0]:
        return pinned
    return pinned.repeat_interleave(beams, 0)


def as_rows(x: Tensor, tokens: tuple[int, ...] | None) -> Tensor:
    """View x (..., d) as (B, S, d): flattened tokens (B*S, d) get their rows back, (B, d) is one token per row."""
    if x.dim() == 3:
        return x
    if x.dim() > 3:
        return x.flatten(1, -2)
    if x.dim() == 2 and tokens is not None and len(tokens) == 2 and x.shape[0] == tokens[0] * tokens[1]:
        return x.view(*tokens, x.shape[-1])
    if x.dim() == 2 and tokens is not None and x.shape[0] == tokens[0]:
        return x[:, None]
    return x.reshape(1, -1, x.shape[-1])


def as_input(gates: Tensor, hidden: Tensor, x: Tensor) -> Tensor:
    """Lay gates (B|1, S|1, E) out along the leading axes of x."""
    if x.dim() == 3:
        return gates
    gates = gates.expand(hidden.shape[0], hidden.shape[1], gates.shape[-1])
    return gates.reshape(*x.shape[:-1], gates.shape[-1])


def picked_rows(remembered: Any, rows: Tensor) -> Any:
    """Pick rows of what a router remembers: a tensor (B, ...), or a mapping or sequence of them."""
    if isinstance(remembered, Tensor):
        return remembered.index_select(0, rows.to(remembered.device))
    if hasattr(remembered, "reorder_cache"):  # a key-value cache of its own
        remembered.reorder_cache(rows)
        return remembered
    if isinstance(remembered, dict):
        return {name: picked_rows(value, rows) for name, value in remembered.items()}
    if isinstance(remembered, (list, tuple)):
        return type(remembered)(picked_rows(value, rows) for value in remembered)
    return remembered


def picked(routing: Routing, rows: Tensor) -> Routing:
    """Pick rows of a decision."""
    always = None if routing.always is None else picked_rows(routing.always, rows)
    choices = None if routing.choices is None else picked_rows(routing.choices, rows)
    branches = tuple(picked(branch, rows) for branch in routing.branches)
    passes = tuple(
        (None if x is None else picked_rows(x, rows), picked_rows(gates, rows)) for x, gates in routing.passes
    )
    own = [picked_rows(table, rows) for table in (routing.scores, routing.probs, routing.gates)]
    return Routing(*own, always, choices, None, branches, passes)  # notes are for losses


def part_of(routing: Routing, site: Site) -> Routing:
    """Return the decision (B, S, E) of one site out of those of its group (B, S, n E)."""
    if site.part is None:
        return routing
    start, experts = site.part
    own = slice(start * experts, (start + 1) * experts)
    return Routing(routing.scores[..., own], routing.probs[..., own], routing.gates[..., own])


def fitting(routing: Routing, site: Site, hidden: Tensor) -> Routing:
    """Check that a reused decision broadcasts to hidden (B, S, d)."""
    rows, positions = routing.gates.shape[:2]
    if rows not in (1, hidden.shape[0]) or positions not in (1, hidden.shape[1]):
        raise RoutingError(
            f"the decision of group '{site.group}' was taken for {rows} rows and {positions} positions, but layer "
            f"'{site.name}' has {hidden.shape[0]} rows and {hidden.shape[1]} positions; generate each batch from its "
            "own prefill, use share: site, or leave out layers that read something else than tokens (in DeBERTa, "
            "query_proj and key_proj read positions too) with exclude_modules"
        )
    return routing
