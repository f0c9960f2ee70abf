"""Router: a scorer, a link function, a selector and an optional price, in float32 whatever the model's dtype."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..registry import Registry, Spec, split_spec
from .links import links
from .links import softmax as softmax_link
from .price import Price, prices
from .schedules import Scheduled
from .scorers import Linear, scorers
from .selectors import selectors
from .types import Context, Routing

GRANULARITIES = ("token", "prompt", "task")
pools = Registry("pool")


@pools.register("mean")
class MeanPool(nn.Module):
    """Mean over the prompt."""

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        """Pool x (B, S, d) over inside (B, S) bool -> (B, 1, d)."""
        weights = inside.to(x.dtype)[..., None]
        return (x * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp_min(1.0)


@pools.register("last")
class LastPool(nn.Module):
    """The last prompt token."""

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        """Pool x (B, S, d) over inside (B, S) bool -> (B, 1, d)."""
        positions = torch.arange(x.shape[1], device=x.device).expand(inside.shape)
        last = torch.where(inside, positions, torch.zeros_like(positions)).amax(1)
        return x.gather(1, last[:, None, None].expand(-1, 1, x.shape[-1]))


@pools.register("max")
class MaxPool(nn.Module):
    """Largest value over the prompt, per feature."""

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        """Pool x (B, S, d) over inside (B, S) bool -> (B, 1, d)."""
        lowest = torch.finfo(x.dtype).min
        return x.masked_fill(~inside[..., None], lowest).amax(1, keepdim=True)


@pools.register("attention")
class AttentionPool(nn.Module):
    """Softmax attention of one learned query over the prompt (the self-attention pool of MiLoRA, arXiv 2410.18035)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(dim))  # zero: starts as the mean

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        """Pool x (B, S, d) over inside (B, S) bool -> (B, 1, d)."""
        weights = (x @ self.query / x.shape[-1] ** 0.5).masked_fill(~inside, torch.finfo(x.dtype).min)
        return torch.softmax(weights, -1)[:, None] @ x


class Router(nn.Module):
    """Decides which experts act on which token.

    Args:
        dim: hidden size d of what it reads.
        num_experts: E.
        scorer, link, selector, price, pool: component specs, names or `{name, **options}`.
        granularity: `token` (a decision per token), `prompt` (one per row, from pooled prompt tokens) or `task`
            (one per row, from its task id).

    Raises:
        ConfigError: an option that cannot work with E experts, such as k > E.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        scorer: Spec = "linear",
        link: Spec = "softmax",
        selector: Spec = "softmax",
        price: Spec | None = None,
        granularity: str = "token",
        pool: Spec = "mean",
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.granularity = granularity
        self.scorer = scorers.build(scorer, dim, num_experts)
        link_name, link_options = split_spec(link)
        self.link = Scheduled(links.get(link_name), link_options)
        selector_name, selector_options = split_spec(selector)
        self.selector = Scheduled(selectors.get(selector_name), selector_options)
        self._selects = selectors.fact(selector_name, "sparse", False)
        self.price = None
        if price is not None:
            if "price" not in selectors.fact(selector_name, "given", ()):
                raise ConfigError(f"selector '{selector_name}' cannot use a price; use top_k, or leave price out")
            self.price = Price(num_experts, prices.build(price))
        self.pool = pools.build(pool, dim) if granularity == "prompt" else None
        # Fail now, not in the first forward, when an option cannot work with this many experts.
        for progress in (0.0, 1.0):
            probs = self.link(torch.zeros(1, 1, num_experts), progress=progress)
            self._select(probs, Context(progress=progress))

    @property
    def sparse(self) -> bool:
        """Whether no gradient needs a gate that is zero, so that kernels may skip what is not selected."""
        options = self.selector.fixed
        return self._selects and options.get("grad", "soft") != "straight_through"

    def plain_form(self) -> dict[str, Any] | None:
        """Return how this router decides as plain numbers, for kernels that decide themselves; None when they cannot.

        They know a decision per token by linear scores, softmax, and the selectors softmax, top_k, top_p and
        entropy_switch with constant options. The keys are those of `Layer` in kernels/native.c.
        """
        if self.granularity != "token" or type(self.scorer) is not Linear or self.scorer.activation is not None:
            return None
        if self.link.function is not softmax_link or self.link.moving or self.selector.moving:
            return None
        kinds = {"softmax": 0, "top_k": 1, "top_p": 2, "entropy_switch": 3}
        function = self.selector.function
        name = function.__name__
        if name not in kinds or selectors.get(name) is not function:
            return None
        given = inspect.signature(function).parameters
        options = {key: p.default for key, p in given.items() if p.kind is p.KEYWORD_ONLY} | self.selector.fixed
        if options.get("weight") == "biased" and self.price is not None:
            return None
        return {
            "select": kinds[name],
            "k": min(options.get("k", options.get("min_k", 0)), self.num_experts),
            "normalise": ("none", "sum1", "sumk").index(options.get("normalise", "none")),
            "constant": options.get("weight") == "const",
            "omega": options.get("omega", 1.0),
            "p": options.get("p", 1.0),
            "crossing": options.get("crossing") == "include",
            "entropy": ("shannon", "tsallis", "renyi").index(options.get("entropy", "shannon")),
            "q": options.get("q", 1.0),
            "threshold": options.get("threshold", 0.0),
            "temperature": self.link.fixed.get("temperature", 1.0),
        }

    def _select(self, probs: Tensor, ctx: Context) -> Tensor:
        if self.price is None:
            return self.selector(probs, ctx, progress=ctx.progress)
        return self.selector(probs, ctx, progress=ctx.progress, price=self.price.value.to(probs.device))

    def forward(self, x: Tensor, ctx: Context) -> Routing:
        """Decide for x (B, S, d) -> Routing of (B, S, E), or (B, 1, E) per prompt and per task."""
        with torch.autocast(x.device.type, enabled=False):
            hidden = x.float()
            if self.pool is not None:
                hidden = self.pool(hidden, prompt_tokens(hidden, ctx))
            scores = self.scorer(hidden, ctx)
            probs = self.link(scores, progress=ctx.progress)
            return Routing(scores, probs, self._select(probs, ctx))

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Put the experts in another order."""
        self.scorer.permute(order)
        if self.price is not None:
            self.price.permute(order)


def prompt_tokens(x: Tensor, ctx: Context) -> Tensor:
    """Return (B, S) bool: the tokens that a per-prompt decision may read.

    These are the valid prompt tokens; a row without any (everything in it is supervised) reads its first valid token,
    so that no decision ever looks at an answer. A row of padding only reads its first position, which nothing counts.
    """
    ones = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    valid = ones if ctx.valid is None else ctx.valid.to(x.device)
    inside = valid if ctx.prompt is None else valid & ctx.prompt.to(x.device)
    valid = torch.where(valid.any(1, keepdim=True), valid, ones)
    first = valid & (valid.long().cumsum(1) == 1)
    return torch.where(inside.any(1, keepdim=True), inside, first)
