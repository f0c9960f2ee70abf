"""Mixing features: a router reads a weighted mean of the states of the tokens up to its own, `x'_t = sum_s a_ts x_s`.

Similarity-aware and attention-aware mixtures of experts (Improving Routing in Sparse Mixture of Experts with Graph of
Tokens, arXiv 2505.00792) let tokens that belong together choose together. We know only the idea: the formulas below
are inferred, not the authors'. With a linear scorer, mixing the states is mixing the scores, since the rows of a sum
to 1. The paper claims a lower entropy of the choice; mixing probabilities instead would raise it, by Jensen.

a is lower triangular, except where the model itself reads the whole input at once, so nothing sees the future;
padding has weight 0. Cached decoding needs the states of the tokens in the cache: they are kept with it (Memory.past),
d numbers per token and router.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError, RoutingError
from .features import Place, features
from .types import Context

MEASURES = ("cosine", "dot")


class _Mixing(nn.Module):
    """What both features share: the states of this forward after those in the cache."""

    def __init__(self, dim: int, place: Place) -> None:
        super().__init__()
        self.dim, self.place = dim, place

    def seen(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Return all states (B, P + S, d), those of the P tokens in the cache first, and which of them are real."""
        valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if ctx.valid is None else ctx.valid
        valid = valid.to(x.device)
        memory, key = ctx.memory, f"{self.place.name}:states"
        if memory is None or ctx.training:
            return x, valid
        past = memory.past.get(key)
        if key in memory.now:  # a second call in one forward: a layer that the model uses more than once
            if memory.now[key]:
                raise RoutingError(
                    f"the router '{self.place.name}' runs more than once per forward, so what it remembers of the "
                    "tokens in a key-value cache would be mixed up; generate with use_cache=False"
                )
            return x, valid
        memory.now[key] = past is not None
        if past is not None:
            x, valid = torch.cat([past["states"], x], 1), torch.cat([past["valid"], valid], 1)
        memory.past[key] = {"states": x.detach(), "valid": valid}
        return x, valid


@features.register("similarity", given=("place",), remembers=True)
class Similarity(_Mixing):
    """Similar tokens choose together: a = row softmax of similarity, in a decoder up to the token itself (inferred).

    `a_ts = softmax_s(sim(x_t, x_s) / temperature)` (Similarity-aware SMoE, arXiv 2505.00792). The smaller the
    temperature, the closer a comes to the identity, which is the router without this feature.

    Options:
        measure: `cosine`, or `dot` for x_t . x_s / sqrt(d).
        temperature: divides the similarities; the paper's scale is not known to us.
    """

    def __init__(self, dim: int, *, measure: str = "cosine", temperature: float = 0.1, place: Place) -> None:
        super().__init__(dim, place)
        if measure not in MEASURES:
            raise ConfigError(f"similarity measure {measure!r} is unknown; known: {', '.join(MEASURES)}")
        if not temperature > 0:
            raise ConfigError(f"similarity needs a positive temperature, got {temperature}")
        self.measure, self.temperature = measure, float(temperature)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """Return the mixed states (B, S, d)."""
        states, valid = self.seen(x, ctx)
        return self.weights(x, states, valid, ctx.causal) @ states

    def weights(self, x: Tensor, states: Tensor, valid: Tensor, causal: bool = True) -> Tensor:
        """Return a (B, S, P + S) for x (B, S, d), states (B, P + S, d) and valid (B, P + S)."""
        if self.measure == "cosine":
            alike = F.normalize(x, dim=-1) @ F.normalize(states, dim=-1).mT
        else:
            alike = x @ states.mT / x.shape[-1] ** 0.5
        tokens, total = x.shape[1], states.shape[1]
        at = torch.arange(total, device=x.device)
        distance = at[total - tokens :, None] - at  # how far s lies before t
        allowed = (valid[:, None] & (distance > 0 if causal else distance == distance)) | (distance == 0)
        return torch.softmax((alike / self.temperature).masked_fill(~allowed, torch.finfo(x.dtype).min), -1)


@features.register("attention", given=("place",), remembers=True, attends=True)
class Attention(_Mixing):
    """Tokens choose with those they attend to: a = mean over heads of the block's self-attention (inferred).

    Attention-aware SMoE (arXiv 2505.00792). The weights are those of the attention of the same block, so the feature
    acts on what runs after it (the MLP); the projections of that attention (q, k, v, o), and layers outside of blocks,
    read their own state, a = I. Only eager attention gives its weights away, so wrapping switches the model to it; a
    model whose attention gives none is refused.
    """

    def __init__(self, dim: int, *, place: Place) -> None:
        super().__init__(dim, place)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """Return the mixed states (B, S, d)."""
        if ctx.memory is None:
            return x
        now, mark = ctx.memory.now, f"{self.place.name}:attended"
        attention = now.get(attention_key(self.place.block))
        # noted once per forward: when a checkpoint runs this again, the attention of the block is there already
        if not now.setdefault(mark, attention is not None and attention.shape[:2] == x.shape[:2]):
            return x
        states, _ = self.seen(x, ctx)
        attention = attention.to(x.device, x.dtype)
        # a static cache attends to slots that are still empty, one with a window only to its last tokens
        attention = attention[..., : states.shape[1]]
        return attention @ states[:, -attention.shape[-1] :]


def attention_key(block: str) -> str:
    """Return under which name the attention weights (B, S, P + S) of a block are kept in Memory.now."""
    return f"attention:{block}"
