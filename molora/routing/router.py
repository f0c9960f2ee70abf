"""Router: a scorer, a link function, a selector and an optional price, in float32 whatever the model's dtype."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..registry import Registry, Spec, split_spec
from .features import Place, build_features
from .float32 import Float32, in_float32
from .links import links
from .links import softmax as softmax_link
from .pools import pools, prompt_tokens
from .price import Price, prices
from .schedules import Scheduled
from .scorers import Linear, scorers
from .selectors import selectors
from .shared import Shared
from .types import Context, Routing

GRANULARITIES = ("token", "prompt", "task")
WEIGHTS = ("own", "frozen", "shared")
# The options of selectors that kernels know; the others must have their defaults (see Router.plain_form).
_PLAIN_OPTIONS = {"k", "min_k", "clamp", "normalise", "weight", "omega", "grad", "p", "crossing"}
_PLAIN_OPTIONS |= {"entropy", "q", "threshold"}


class Router(Float32):
    """Decides which experts act on which token.

    Args:
        dim: hidden size d of what it reads.
        num_experts: E, the experts to choose from.
        scorer, link, selector, price, pool: component specs, names or `{name, **options}`.
        feature: what the scorer reads: none (the hidden states), a feature spec, or a list of them in order.
        granularity: `token` (a decision per token), `prompt` (one per row, from pooled prompt tokens) or `task`
            (one per row, from its task id).
        null: m null experts that take part in the choice and do nothing (AdaMoE, arXiv 2406.13233).
        shared: options of `Shared`, with `num`; none for no shared experts.
        weights: `own`, `frozen` (the scorer is never trained), or `shared` (the tuner gives it to several routers).
        place: where the router stands in the depth of the model.
        splits: h decisions of E gates each, for experts that take h gates (blocks of a factor, steps of a chain): link
            and selector see (B, S, h, E), and the Routing holds (B, S, h * E). Not with null or shared experts.

    Attributes:
        bank: the ExpertBank that the gates multiply, for scorers and losses that read the experts; set by the tuner,
            and not a submodule.

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
        feature: Spec | Sequence[Spec] | None = None,
        null: int = 0,
        shared: Mapping[str, Any] | None = None,
        weights: str = "own",
        place: Place | None = None,
        splits: int = 1,
    ) -> None:
        super().__init__()
        self.num_experts, self.null, self.splits = num_experts, null, splits
        if splits > 1 and (null or shared):
            raise ConfigError(f"experts with {splits} gates each cannot have null or shared experts beside them")
        self.granularity = granularity
        self.place = place or Place()
        choices = num_experts + null
        self.feature = build_features(feature, dim, self.place)
        read = self.feature[-1].dim if self.feature else dim
        self.pool = pools.build(pool, read) if granularity == "prompt" else None
        self.weights = weights
        read = getattr(self.pool, "dim", read)  # pools that do not keep the size say so
        scorer_name = split_spec(scorer)[0]
        takes = scorers.fact(scorer_name, "given", ())
        at = {"place": self.place} if "place" in takes else {}
        self.scorer = scorers.build(scorer, read, choices * splits, **at)
        self._experts: tuple[Any, ...] = ()  # in a tuple, so that the bank is not registered as a part of the router
        self._scores_have_gradient = scorers.fact(scorer_name, "has_gradient", True)
        self._scorer_takes = tuple(name for name in takes if name != "place")  # that one is given when it is built
        self.link = _component(links, link, choices)
        self.selector = _component(selectors, selector, read, choices)
        selector_name = split_spec(selector)[0]
        self._selector_takes = selectors.fact(selector_name, "given", ())
        self._selects = selectors.fact(selector_name, "sparse", False)
        self._priced = selectors.fact(selector_name, "priced", "probs")
        self.price = None
        if price is not None:
            if "price" not in self._selector_takes:
                raise ConfigError(f"selector '{selector_name}' cannot use a price; use top_k, or leave price out")
            self.price = Price(choices * splits, prices.build(price))
        self.shared = Shared(read if self.pool is not None else dim, **shared) if shared else None
        self.freeze()
        # Fail now, not in the first forward, when an option cannot work with this many experts. On the meta device,
        # where saved adapters are rebuilt before their tensors are read, there is nothing to compute with.
        on_meta = any(tensor.is_meta for tensor in (*self.parameters(), *self.buffers()))
        with torch.no_grad():
            for progress in () if on_meta else (0.0, 1.0):
                scores = torch.zeros(1, 1, choices)
                probs = self.link(scores, progress=progress)
                told = Context(progress=progress, task_ids=torch.zeros(1, dtype=torch.long))
                self._select(scores, probs, torch.zeros(1, 1, read), told)

    @property
    def edits_input(self) -> bool:
        """Whether the experts may get another input than that of their layer (see views.py)."""
        return getattr(self.scorer, "edits_input", False)

    @property
    def draws(self) -> bool:
        """Whether a training forward draws at random from the seed of the forward (see Memory.seed)."""
        return "generator" in (*self._selector_takes, *self._scorer_takes)

    @property
    def bank(self) -> Any:
        """The experts that the gates multiply; None when the router stands alone."""
        return self._experts[0] if self._experts else None

    def reads(self, bank: Any) -> None:
        """Tell the router which experts its gates multiply."""
        self._experts = (bank,)

    def add_controller(self, position: int, controller: nn.Module) -> None:
        """Hold the controller of the adapter's loss at `position`, so that it is saved, moved and copied with it."""
        if not hasattr(self, "controllers"):
            self.controllers = nn.ModuleDict()
        device = next(self.parameters(), torch.empty(0)).device
        self.controllers[str(position)] = controller if device.type == "meta" else controller.to(device)

    def borrow(self, scorer: nn.Module) -> None:
        """Score with another router's scorer, which alone holds, trains and saves the weights."""
        del self._modules["scorer"]
        self.__dict__["scorer"] = scorer  # not through nn.Module, which would register it a second time

    def freeze(self) -> None:
        """Make sure that frozen weights are not trainable; PEFT switches all parameters on with its adapters."""
        if self.weights == "frozen":
            self.scorer.requires_grad_(False)
        for module in self.modules():
            if module is not self and hasattr(module, "freeze"):
                module.freeze()

    @property
    def sparse(self) -> bool:
        """Whether no gradient needs a gate that is zero, so that kernels may skip what is not selected."""
        moving = isinstance(self.selector, Scheduled)
        options = self.selector.fixed if moving else getattr(self.selector, "switches", {})
        return self._selects and options.get("grad", "soft") != "straight_through"

    def plain_form(self) -> dict[str, Any] | None:
        """Return how this router decides as plain numbers, for kernels that decide themselves; None when they cannot.

        They know a decision per token by linear scores, softmax, and the selectors softmax, top_k, top_p and
        entropy_switch with constant options. The keys are those of `Layer` in kernels/native.c.
        """
        if self.granularity != "token" or type(self.scorer) is not Linear or self.scorer.activation is not None:
            return None
        if self.feature or self.null or self.shared is not None or self.splits > 1:
            return None
        if not (isinstance(self.link, Scheduled) and isinstance(self.selector, Scheduled)):
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
        if any(options[key] != p.default for key, p in given.items() if key in options and key not in _PLAIN_OPTIONS):
            return None  # groups, pins, a scale, ...
        return {
            "select": kinds[name],
            "k": min(options.get("k", options.get("min_k", 0)), self.num_experts),
            "normalise": {"none": 0, "sum1": 1, "sumk": 2, "real": 1}[options.get("normalise", "none")],
            "constant": options.get("weight") == "const",
            "omega": options.get("omega", 1.0),
            "p": options.get("p", 1.0),
            "crossing": options.get("crossing") == "include",
            "entropy": ("shannon", "tsallis", "renyi").index(options.get("entropy", "shannon")),
            "q": options.get("q", 1.0),
            "threshold": options.get("threshold", 0.0),
            "temperature": self.link.fixed.get("temperature", 1.0),
        }

    def _select(self, scores: Tensor, probs: Tensor, hidden: Tensor, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """Return gates (B, S, N) and the notes of the selector."""
        given: dict[str, Any] = {}
        for name in self._selector_takes:
            if name == "price":
                given[name] = None if self.price is None else self._prices().to(probs.device)
                for edit, site in ctx.edits if self.price is not None else ():
                    given[name] = edit.prices(given[name], site)
            elif name == "real":
                given[name] = self.num_experts
            elif name == "scores":
                given[name] = scores
            elif name == "hidden":
                given[name] = hidden
            elif name == "notes":
                given[name] = {}
            elif name == "generator":
                given[name] = self._generator("selector", probs, ctx)
        return self.selector(probs, ctx, progress=ctx.progress, **given), given.get("notes", {})

    def _prices(self) -> Tensor:
        """Return the prices as selectors see them: (N,), or (h, N)."""
        value = self.price.value
        return value.unflatten(0, (self.splits, -1)) if self.splits > 1 else value

    def _generator(self, part: str, like: Tensor, ctx: Context) -> torch.Generator | None:
        """Return the generator of the draws of one part in this forward; None: torch's own."""
        return None if ctx.memory is None else ctx.memory.generator(f"{self.place.name}/{part}", like.device)

    def _score(self, read: Tensor, x: Tensor, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """Return scores (B, S, N) and the notes of the scorer."""
        given: dict[str, Any] = {}
        for name in self._scorer_takes:
            if name == "generator":
                given[name] = self._generator("scorer", x, ctx)
            else:
                given[name] = {"bank": self.bank, "x": x, "notes": {}}[name]
        return self.scorer(read, ctx, **given), given.get("notes", {})

    @in_float32
    def forward(self, x: Tensor, ctx: Context) -> Routing:
        """Decide for x (B, S, d) -> Routing of (B, S, E), or (B, 1, E) per prompt and per task."""
        with torch.autocast(x.device.type, enabled=False):
            hidden = read = x.float()
            for feature in self.feature:
                read = feature(read, ctx)
            if self.pool is not None:
                read = self.pool(read, prompt_tokens(read, ctx))
            scores, notes = self._score(read, hidden, ctx)
            for edit, site in ctx.edits:
                scores = edit.scores(scores, site)
            laid_out = scores.unflatten(-1, (self.splits, -1)) if self.splits > 1 else scores
            probs = self.link(laid_out, progress=ctx.progress)
            gates, more = self._select(laid_out, probs, read, ctx)
            if self.splits > 1:
                probs, gates = probs.flatten(-2), gates.flatten(-2)
            for edit, site in ctx.edits:
                gates = edit.gates(gates, site)
            choices = None
            if self.null:
                choices, gates = gates != 0, gates[..., : self.num_experts]
            always = None
            if self.shared is not None:
                # a decision per prompt or per task may not read single tokens
                always = self.shared(read if self.pool is not None else hidden, gates)
            view = notes.pop("view", None)
            routing = Routing(scores, probs, gates, always, choices, {**notes, **more} or None)
            return routing if view is None else dataclasses.replace(routing, passes=((view, routing.applied),))

    @property
    def has_gradient(self) -> bool:
        """Whether gradients go through decisions: to the router's parameters, or to what it reads."""
        return self._scores_have_gradient or any(True for _ in self.parameters())

    def observe(self, routing: Routing, ctx: Context) -> None:
        """Let the price, if there is one, take one training forward into account."""
        if self.price is not None:
            values = routing.scores if self._priced == "scores" else routing.probs
            found = (routing.notes or {}).get("price")
            self.price.observe(routing.selected, ctx.weights(routing.gates), values, found)

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Put the experts in another order."""
        if self.null:  # null experts stay where they are, after the real ones
            order = torch.cat([order, torch.arange(self.num_experts, self.num_experts + self.null)])
        width = self.num_experts + self.null
        table = torch.cat([order + width * block for block in range(self.splits)])
        for part, own in ((self.scorer, table), (self.link, order), (self.selector, order), (self.price, table)):
            if hasattr(part, "permute"):
                part.permute(own)


def _component(registry: Registry, spec: Spec, *args: Any) -> Any:
    """Build a link or a selector: a function whose options may be schedules, or a module called in the same way."""
    name, options = split_spec(spec)
    component = registry.get(name)
    return component(*args, **options) if inspect.isclass(component) else Scheduled(component, options)
