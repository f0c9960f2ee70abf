"""Two passes (X-LoRA, arXiv 2402.07148): routers that read the last states of the model without its adapters.

The feature `first_pass` stands for those states; molora/first_pass.py runs the model for them before each forward. The
scorer `xlora` is the small head of the paper over them.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from ..errors import ConfigError, RoutingError
from .features import features
from .scorers import scorers
from .types import Context

STATES = "first_pass:states"  # their name in Memory.now
CACHE = "first_pass:cache"  # in Memory.past: the key-value cache of the first pass


@features.register("first_pass", first_pass=True, remembers=True)
class FirstPass(nn.Module):
    """The last states of the model alone, without any adapter, at each token (X-LoRA, arXiv 2402.07148).

    They have no gradient and no dropout. With `share: model` one decision, taken before the first layer, serves all.
    A router that stands outside of any model reads what it is given.

    Options:
        size: how many numbers such a state has; null where it is as many as the first routed layer reads.
    """

    def __init__(self, dim: int, *, size: int | None = None) -> None:
        super().__init__()
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ConfigError(f"feature 'first_pass' needs a whole number size >= 1, or null, got {size!r}")
        self.dim = size or dim

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """Return the states (B, S, size) of the tokens of x (B, S, d)."""
        if ctx.memory is None:
            raise RoutingError(
                "a layer was called outside of the forward of its model, where no first pass has run; call the model"
            )
        states = ctx.memory.now.get(STATES, x)
        if states.shape[:2] != x.shape[:2] or states.shape[-1] != self.dim:
            raise RoutingError(
                f"the first pass gave states {tuple(states.shape)}, but this router decides for {tuple(x.shape)} and "
                f"reads {self.dim} numbers; only layers that see every token can follow them: leave pooled heads out, "
                "and set the feature's size to the hidden size of the model"
            )
        return states.to(x.device).float()


@scorers.register("xlora")
class XLoraHead(nn.Module):
    """The head of X-LoRA (arXiv 2402.07148): `depth` linear maps with biases, ReLU and dropout between them.

    Options:
        depth: 1 is one linear map from the states to the experts.
        width: of the layers between, for depth > 1.
        dropout: after each ReLU, in training.
    """

    def __init__(self, dim: int, num_experts: int, *, depth: int = 1, width: int = 2048, dropout: float = 0.2) -> None:
        super().__init__()
        if depth < 1 or width < 1 or not 0 <= dropout < 1:
            raise ConfigError(
                "scorer 'xlora' needs depth >= 1, width >= 1 and 0 <= dropout < 1, got "
                f"depth={depth}, width={width}, dropout={dropout}"
            )
        sizes = [dim, *[width] * (depth - 1), num_experts]
        self.maps = nn.ModuleList(nn.Linear(before, after) for before, after in itertools.pairwise(sizes))
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """Score x (B, S, d) -> (B, S, E)."""
        for inner in self.maps[:-1]:
            x = self.dropout(torch.relu(inner(x)))
        return self.maps[-1](x)

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Put the experts in another order."""
        last = self.maps[-1]
        last.weight.copy_(last.weight[order])
        last.bias.copy_(last.bias[order])
