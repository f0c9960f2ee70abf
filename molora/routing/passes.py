"""Site, Plan and Pass: what the trace knows about a layer, about an adapter, and about one forward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .auxiliary import AuxLoss
from .types import Context, Memory, Routing
from .weighted import WeightedLoss


@dataclass(frozen=True)
class Site:
    """One routed layer of one adapter, as the trace sees it.

    Attributes:
        name: module path of the layer.
        adapter: PEFT adapter name.
        group: sites of one group share a decision.
        shared: whether the group has other sites too.
        leads: whether this site takes the decision of its group (and holds its router).
        stack: which masks describe its input: `main`, `encoder`, or `cross` (encoder states read by a decoder).
        column: the one gate that belongs to this site when the experts are the sites of a block, else None.
        part: i and E: of the gates (B, S, n E) of its group, the i-th E are its own; None when all sites share them.
        edits: whether the experts may get another input than that of the layer (see Trace.passes).
        sparse: whether the gradient of a gate that is zero is not needed (see Router.sparse).
        fixed: there is one expert and no choice: its gate is 1, unless pins name this very site.
    """

    name: str
    adapter: str
    group: str
    shared: bool = False
    leads: bool = True
    stack: str = "main"
    column: int | None = None
    part: tuple[int, int] | None = None
    edits: bool = False
    sparse: bool = False
    fixed: bool = False


class Pass:
    """The state of one forward.

    Attributes:
        contexts: Context per stack.
        shape: (B, S) of the tokens of each stack, where known; tells flattened inputs apart.
        collecting: whether auxiliary losses and choices are collected (a training forward with gradients).
        cache: the key-value cache object of this forward, if any.
        continuing: whether the cache already held tokens, so that per-prompt decisions are reused.
        is_read: whether readers or edits were there when it began.
        decisions: the decisions that other sites or later forwards reuse, by group.
        per_prompt: the groups whose decision outlives the forward, together with its cache.
        cut: the groups whose decision should have a graph but was taken without one, in a reentrant checkpoint.
        aux: the auxiliary loss.
        memory: what routers pass on to later routers, and to later forwards of the same generation.
        prompt_rows: rows of the prompt inside generate(), which may run several beams for each.
    """

    # not a dataclass: torch.compile cannot trace default factories
    def __init__(self, collecting: bool = False, cache: Any = None) -> None:
        self.collecting = collecting
        self.cache = cache
        self.continuing = False
        self.is_read = False
        self.contexts: dict[str, Context] = {}
        self.shape: dict[str, tuple[int, ...]] = {}
        self.decisions: dict[str, Routing] = {}
        self.per_prompt: set[str] = set()
        self.cut: set[str] = set()
        self.aux = AuxLoss()
        self.memory = Memory()
        self.prompt_rows: int | None = None


@dataclass
class Plan:
    """What an adapter asks of the trace: its losses, how many decisions a forward takes, and what else it needs.

    `by_prompt`: decisions outlive a forward. `remembers`: routers need the tokens before this forward (Memory.past).
    `attends`: routers need the attention weights of the model. `looks_ahead`: they need a first pass of the model
    alone. `draws`: routers draw at random in training (Memory.seed). `objective`: how the training loss is made of
    several forwards of a batch, if it is.
    """

    losses: list[WeightedLoss]
    decisions: int
    by_prompt: bool = False
    remembers: bool = False
    attends: bool = False
    looks_ahead: bool = False
    draws: bool = False
    objective: Any = None
    scheduled: bool = False
    sites: set[str] = field(default_factory=set)
