"""Features: what a scorer reads, made from the hidden states: x (B, S, d) -> (B, S, D), float32.

A feature is a Module built with `(dim, **options)`; `dim` on the instance is the size D of what it returns. It is
called with `(x, ctx)` before pooling. Facts: `given=("place",)` for those that ask where the router stands in the depth
of the model, `remembers` for those that need the tokens in a key-value cache (Memory.past), `attends` for those that
need the attention weights of the model, `first_pass` for those that need the last states of the model alone. A feature
with a method `borrow(owner)` shares what it learns: the tuner calls it for all routers but the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, RoutingError
from ..registry import Registry, Spec, split_spec
from .types import Context

features = Registry("feature")


@dataclass
class Place:
    """Where a router stands: `name` of its decision, `before` that of the router that runs before it, if any.

    `vocab` is how many token ids the model knows, None when it reads no tokens. `block` is the path of the transformer
    block whose tokens it reads, empty outside of blocks. `index` counts the routers of an adapter, of which there are
    `count`. `out` is how many numbers the layer gives out, None where that is not known.
    """

    name: str = ""
    before: str | None = None
    vocab: int | None = None
    block: str = ""
    index: int = 0
    count: int = 1
    out: int | None = None


@features.register("identity")
class Identity(nn.Module):
    """The hidden states themselves."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """Return x (B, S, d)."""
        return x


@features.register("concat")
class Concat(nn.Module):
    """The hidden states followed by what the caller tells: `[x_t ; e_t]` (SpeechMoE, arXiv 2105.03036; SpeechMoE2).

    e comes with the forward, as `router_extra` (B, m) for a whole row or (B, S, m) per token: an embedding of the
    utterance, a domain, an accent. With zero weights for the last m columns the router is the one without it.

    Options:
        size: m.
    """

    def __init__(self, dim: int, *, size: int) -> None:
        super().__init__()
        if size < 1:
            raise ConfigError(f"feature 'concat' needs size >= 1, got {size}")
        self.extra, self.dim = size, dim + size

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """Return (B, S, d + m) for x (B, S, d)."""
        if ctx.extra is None:
            raise RoutingError(
                f"feature 'concat' needs {self.extra} numbers per row, but no router_extra that fits reached the "
                "forward; pass router_extra=(B, m) or (B, S, m) to the model, or set it with `with "
                "molora.using(model, router_extra=...)` around generate(), where it is (B, m)"
            )
        if ctx.extra.shape[-1] != self.extra:
            raise RoutingError(f"feature 'concat' has size {self.extra}, but router_extra holds {ctx.extra.shape[-1]}")
        return torch.cat([x, ctx.extra.to(x).expand(*x.shape[:-1], -1)], -1)


def listed(specs: Spec | Sequence[Spec] | None) -> list[Spec]:
    """Return a list of feature specs: none, one, or several that follow one another."""
    if specs is None:
        return []
    return [specs] if isinstance(specs, (str, dict)) else list(specs)


def remember(specs: Spec | Sequence[Spec] | None) -> bool:
    """Tell whether any of these features needs the tokens before the current forward (fact `remembers`)."""
    return any(features.fact(split_spec(spec)[0], "remembers", False) for spec in listed(specs))


def attend(specs: Spec | Sequence[Spec] | None) -> bool:
    """Tell whether any of these features needs the attention weights of the model (fact `attends`)."""
    return any(features.fact(split_spec(spec)[0], "attends", False) for spec in listed(specs))


def look_ahead(specs: Spec | Sequence[Spec] | None) -> bool:
    """Tell whether any of these features needs a first pass of the model without its adapters (fact `first_pass`)."""
    return any(features.fact(split_spec(spec)[0], "first_pass", False) for spec in listed(specs))


def build_features(specs: Spec | Sequence[Spec] | None, dim: int, place: Place) -> nn.ModuleList:
    """Build features that follow one another, each on the size that the one before returns."""
    built = nn.ModuleList()
    for spec in listed(specs):
        given: dict[str, Any] = {}
        if "place" in features.fact(split_spec(spec)[0], "given", ()):
            given["place"] = place
        feature = features.build(spec, dim, **given)
        dim = feature.dim
        built.append(feature)
    return built
