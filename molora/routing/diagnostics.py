"""Diagnostics of single recordings: how much routing changed between two, and how strongly crowded experts are avoided.

What adds up over a whole run is in metrics.py, what concerns a stream of tokens in locality.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import ConfigError
from .types import Context, Routing


def change_rate(
    before: Mapping[str, Routing],
    after: Mapping[str, Routing],
    valid: Tensor | None = None,
    *,
    by: str = "selected",
) -> dict[str, float]:
    """Return, per site, how much of the routing changed between two recordings of the same batch.

    For one token with the selected sets A and B it is `1 - |A and B| / max(|A|, |B|)`, averaged over tokens: 0 when
    nothing changed, 1 when no choice survived. For top-1 routing this is the share of tokens that moved to another
    expert (routing fluctuation, StableMoE, arXiv 2204.08396), for top-k one minus the router saturation of OLMoE
    (arXiv 2409.02060).

    Args:
        before, after: what `molora.record` collected, site -> Routing of (B, S, E).
        valid: (B, S) bool, False at padding; decisions per prompt (B, 1, E) do not need it.
        by: `selected`, or `top` to compare only the expert of the largest gate (soft mixtures select all experts).

    Raises:
        ConfigError: the recordings do not belong together, or `by` is unknown.
    """
    if by not in ("selected", "top"):
        raise ConfigError(f"change_rate by={by!r} is unknown; known: selected, top")
    if set(before) != set(after):
        differing = ", ".join(sorted(set(before) ^ set(after)))
        raise ConfigError(f"only one of the two recordings holds: {differing}; record the same model twice")
    rates = {}
    for name in before:
        a, b = before[name], after[name]
        if a.gates.shape != b.gates.shape:
            raise ConfigError(
                f"site '{name}' was recorded with gates {tuple(a.gates.shape)} and {tuple(b.gates.shape)}; "
                "record the same batch twice"
            )
        first, second = (_top(r) if by == "top" else r.selected for r in (a, b))
        both = (first & second).sum(-1).double()
        most = torch.maximum(first.sum(-1), second.sum(-1)).double()
        changed = torch.where(most > 0, 1 - both / most.clamp_min(1), torch.zeros_like(both))
        weights = Context(valid=valid).weights(a.gates).double()
        rates[name] = float((changed * weights).sum() / weights.sum().clamp_min(1))
    return rates


def _top(routing: Routing) -> Tensor:
    best = routing.gates.argmax(-1, keepdim=True)
    return torch.zeros_like(routing.selected).scatter(-1, best, True)


def congestion_coefficient(quality: Tensor, load: Tensor) -> float:
    """Return the slope gamma of quality against load over the experts in use: how much a crowded expert is avoided.

    Tokens are players with payoff `Q_e - gamma * load_e`; where all used experts are equally worth choosing, that
    payoff is constant, so gamma is the least-squares slope of Q on load. The estimator is our reading (inferred) of
    the "three phases" study of routing; log it, do not optimise it.

    Args:
        quality: (E,) mean score of each expert over tokens.
        load: (E,) share of choices of each expert.

    Raises:
        ConfigError: fewer than two experts in use, or all with the same load.
    """
    used = load > 0
    q, x = quality[used].double(), load[used].double()
    spread = x - x.mean() if len(x) else x
    if len(x) < 2 or float((spread**2).sum()) == 0.0:
        raise ConfigError("the congestion coefficient needs at least two experts in use with different loads")
    return float((spread * (q - q.mean())).sum() / (spread**2).sum())
