"""Features: what a scorer reads, made from the hidden states: x (B, S, d) -> (B, S, D), float32.

A feature is a Module built with `(dim, **options)`; `dim` on the instance is the size D of what it returns. It is
called with `(x, ctx)` before pooling. `router` (the Router that holds it) is given to those registered with the fact
`given=("place",)`: `place.name` and `place.before` tell where the router stands in the depth of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..registry import Registry, Spec, split_spec
from .types import Context

features = Registry("feature")


@dataclass
class Place:
    """Where a router stands: `name` of its decision, `before` that of the router that runs before it, if any."""

    name: str = ""
    before: str | None = None


@features.register("identity")
class Identity(nn.Module):
    """The hidden states themselves."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """Return x (B, S, d)."""
        return x


def listed(specs: Spec | Sequence[Spec] | None) -> list[Spec]:
    """Return a list of feature specs: none, one, or several that follow one another."""
    if specs is None:
        return []
    return [specs] if isinstance(specs, (str, dict)) else list(specs)


def remember(specs: Spec | Sequence[Spec] | None) -> bool:
    """Tell whether any of these features needs the tokens before the current forward (fact `remembers`)."""
    return any(features.fact(split_spec(spec)[0], "remembers", False) for spec in listed(specs))


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
