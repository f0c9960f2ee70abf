"""Local routing consistency: how far a cache of few experts would carry a stream of tokens.

All functions take one stream as a 0/1 matrix of activations (T, E): `routing.selected[row]` of a recording, padding
removed. SRP and SCH follow arXiv 2505.16056 and its code; SCH as coded there is not an upper bound (on block traces LRU
beats it), so Belady's optimal cache stands beside it. `routing_vectors` are MoEE's embeddings (arXiv 2410.10814).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from .types import Context, Routing


@dataclass(frozen=True)
class SegmentConsistency:
    """SRP of one window length.

    Attributes:
        value: the best F1 of predicting a window's activations by "on for the whole window, or off", in [0, 1].
        threshold: the c at which it is reached: an expert used at least c times in a window counts as on.
        cache_multiple: predicted over actual activations at that c.
    """

    value: float
    threshold: int
    cache_multiple: float


def segment_routing_performance(active: Tensor, window: int) -> SegmentConsistency:
    """Return SRP(m) of activations (T, E): `max_c 2 sum_{n>=c} n / (m #{n>=c} + sum n)` over sliding windows.

    n is how often an expert is used in a window of m tokens. 1 for m = 1 and for constant routing; never below
    2p / (1 + p) with p the share of active entries.

    Raises:
        ConfigError: the stream is shorter than the window.
    """
    tokens = _checked(active)
    if not 1 <= window <= len(tokens):
        raise ConfigError(f"window must be from 1 to the {len(tokens)} tokens of the stream, got {window}")
    total = torch.cat([torch.zeros(1, tokens.shape[1]), tokens.cumsum(0)])
    counts = (total[window:] - total[:-window]).long().flatten()
    histogram = torch.bincount(counts, minlength=window + 1).double()  # how many (window, expert) pairs have n uses
    uses = histogram * torch.arange(len(histogram), dtype=torch.float64)
    on = histogram.flip(0).cumsum(0).flip(0)  # pairs with n >= c
    kept = uses.flip(0).cumsum(0).flip(0)
    everything = uses.sum()
    if everything == 0:
        return SegmentConsistency(0.0, 1, 0.0)
    f1 = (2 * kept / (window * on + everything))[1:]
    best = int(f1.argmax())
    return SegmentConsistency(float(f1[best]), best + 1, float(window * on[best + 1] / everything))


def cache_hits(active: Tensor, capacity: int, *, policy: str = "belady", window: int = 16) -> float:
    """Return the share of expert uses that a cache of `capacity` experts would hold already.

    Hits are judged per token at its start, as in the authors' code; so is the first use of an expert while fewer than
    `capacity` different ones have been seen, which counts as a hit.

    Args:
        active: (T, E) 0/1.
        capacity: experts in the cache.
        policy: `lru`; `sch` (experts of a token arrive in order; evict the fewest uses within `window` tokens from
            here, ties the least recent, never the arriving one); or `belady`, the bound of every policy: after each
            token, keep those whose next use is nearest.
        window: m of `sch`.

    Raises:
        ConfigError: unknown policy, or no capacity.
    """
    if policy not in ("sch", "belady", "lru"):
        raise ConfigError(f"policy {policy!r} is unknown; known: sch, belady, lru")
    if capacity < 1:
        raise ConfigError(f"capacity must be at least 1, got {capacity}")
    stream = [row.nonzero()[:, 0].tolist() for row in _checked(active)]
    following = _next_uses(stream) if policy == "belady" else []
    held: dict[int, int] = {}  # expert -> when it was last used, counted in uses
    seen: set[int] = set()
    hits = uses = 0
    for token, experts in enumerate(stream):
        at_start = set(held)
        for position, expert in enumerate(experts):
            uses += 1
            hits += expert in at_start or (expert not in seen and len(seen) < capacity)
            seen.add(expert)
            if policy == "sch" and expert not in held and len(held) >= capacity:
                del held[_least_used(held, [experts[position + 1 :], *stream[token + 1 : token + window]])]
            elif policy == "lru" and expert not in held and len(held) >= capacity:
                del held[min(held, key=held.__getitem__)]
            held[expert] = uses
        if policy == "belady":
            nearest = sorted(held, key=lambda e, next_use=following[token]: next_use.get(e, len(stream)))
            held = {e: held[e] for e in nearest[:capacity]}
    return hits / uses if uses else 1.0


def _least_used(held: Mapping[int, int], coming: list[list[int]]) -> int:
    counts = dict.fromkeys(held, 0)
    for experts in coming:
        for expert in experts:
            if expert in counts:
                counts[expert] += 1
    return min(held, key=lambda e: (counts[e], held[e]))


def _next_uses(stream: list[list[int]]) -> list[dict[int, int]]:
    """Return, for each token, the next token after it that uses each expert."""
    after: list[dict[int, int]] = []
    following: dict[int, int] = {}
    for token in range(len(stream) - 1, -1, -1):
        after.append(following)
        following = following | dict.fromkeys(stream[token], token)
    return after[::-1]


def _checked(active: Tensor) -> Tensor:
    if active.dim() != 2:
        raise ConfigError(f"activations must be (tokens, experts), got shape {tuple(active.shape)}")
    return (active != 0).float().cpu()


# --- routing as an embedding ------------------------------------------------------------------------------------------


def routing_vectors(log: Mapping[str, Routing], valid: Tensor | None = None) -> Tensor:
    """Return (B, sites * E): the probs of each row's last real token at every site, side by side (MoEE).

    Args:
        log: what `molora.record` collected.
        valid: (B, S) bool, False at padding.
    """
    parts = []
    for routing in log.values():
        probs = routing.probs
        weights = Context(valid=valid).weights(probs)
        positions = torch.arange(probs.shape[1], device=probs.device).expand(probs.shape[:2])
        last = torch.where(weights > 0, positions, torch.zeros_like(positions)).amax(1)
        parts.append(probs.gather(1, last[:, None, None].expand(-1, 1, probs.shape[-1]))[:, 0])
    return torch.cat(parts, -1)


class RoutingEmbedder:
    """MoEE's two ways of joining hidden states and routing vectors, with statistics that are fitted once.

    The authors standardise over each batch, which makes an embedding depend on its neighbours; here the mean and
    spread are fitted on one set and frozen.

    Args:
        alpha: weight of the routing similarity in `similarity`.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = alpha
        self._fitted: list[tuple[Tensor, Tensor]] | None = None

    def fit(self, hidden: Tensor, routing: Tensor) -> RoutingEmbedder:
        """Fit mean and spread of every dimension on hidden (n, d) and routing vectors (n, m)."""
        self._fitted = [(x.mean(0), x.std(0, correction=0).clamp_min(1e-6)) for x in (hidden, routing)]
        return self

    def concat(self, hidden: Tensor, routing: Tensor) -> Tensor:
        """Return (n, d + m): both, standardised, side by side."""
        if self._fitted is None:
            raise ConfigError("fit the embedder on a set of hidden states and routing vectors first")
        both = zip((hidden, routing), self._fitted, strict=True)
        return torch.cat([(x - mean) / spread for x, (mean, spread) in both], -1)

    def similarity(self, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
        """Return (n, m): cos of hidden states plus alpha times cos of routing vectors (`sum`, which worked better)."""
        cosines = [
            torch.nn.functional.normalize(x, dim=-1) @ torch.nn.functional.normalize(y, dim=-1).T
            for x, y in zip(a, b, strict=True)
        ]
        return cosines[0] + self.alpha * cosines[1]
