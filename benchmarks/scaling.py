"""How the cost of one routed layer grows: with experts, with active experts, and with tokens."""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
from torch import Tensor, nn

from molora.experts.bank import ExpertBank
from molora.layers import RoutedLinear
from molora.routing.router import Router
from molora.routing.trace import Site, Trace

from .models import RANK, LoopLinear, top_k
from .sections import BASE, Field, section
from .timing import Plain, Work


def routed(base: nn.Linear, experts: int, k: int) -> RoutedLinear:
    """Return the layer with `experts` experts of rank 8."""
    torch.manual_seed(experts)
    layer = RoutedLinear(base, base.in_features, base.out_features, Trace())
    bank = ExpertBank(base.in_features, base.out_features, [RANK] * experts, scaling=2.0)
    nn.init.normal_(bank.Bt, std=0.02)
    layer.add("default", bank)
    scorer = {"name": "linear", "init": 2.0 / base.in_features**0.5}
    router = Router(base.in_features, experts, scorer=scorer, selector=top_k(k))
    layer.molora_router["default"] = router
    layer.sites["default"] = Site("layer", "default", "layer", sparse=router.sparse)
    layer.set_adapter("default")
    base.requires_grad_(False)
    return layer


def work(layer: nn.Module, x: Tensor, trained: bool) -> Plain:
    """Return a forward, or a forward and a backward."""
    if not trained:
        return Plain(torch.no_grad()(functools.partial(layer.eval(), x)))
    cotangent = torch.ones_like(x)  # the layer is square
    leaf = x.clone().requires_grad_()

    def step() -> None:
        layer(leaf).backward(cotangent)
        leaf.grad = None
        layer.zero_grad(set_to_none=True)

    return Plain(step)


def scaling(field: Field, what: str, until: float) -> dict[str, Any]:
    """Measure one layer over `experts`, `active` experts, sequence `length` or `batch` of single tokens."""
    sizes = field.sizes
    width = sizes.layer
    base = nn.Linear(width, width, bias=False).requires_grad_(False)
    cases: list[tuple[int, int, int, tuple[int, int]]] = []  # value, E, k, (rows, positions)
    if what == "experts":
        cases = [(e, e, 2, (1, sizes.tokens)) for e in sorted({*sizes.experts, 2, 32})]
    elif what == "active":
        cases = [(k, 16, k, (1, sizes.tokens)) for k in (1, 2, 4, 8, 16)]
    elif what == "length":
        cases = [(t, 8, 2, (1, t)) for t in sizes.lengths]
    else:
        cases = [(b, 8, 2, (b, 1)) for b in (1, 4, 16, 64)]
    rows: list[dict[str, Any]] = []
    modes = (False, True) if what != "batch" else (False,)
    # all values of one length race together; other lengths cannot share a reference
    leads = sorted({case[3] for case in cases})
    left = len(modes) * len(leads)
    for trained in modes:
        mode = "training" if trained else "inference"
        for lead in leads:
            x = torch.randn(*lead, width)
            works: dict[str, Work] = {BASE: work(base, x, trained)}
            values = {}
            for value, experts, k, its_lead in cases:
                if its_lead != lead:
                    continue
                for kind, layer in (
                    ("molora", routed(base, experts, k)),
                    ("per-expert loop", LoopLinear(base, experts, RANK, k)),
                ):
                    name = f"{kind}, {what} {value}, {mode}"
                    works[name], values[name] = work(layer, x, trained), (kind, value)
            for row in sizes.race(works, time.monotonic() + (until - time.monotonic()) / left)[1:]:
                kind, value = values[row["name"]]
                rows.append({**row, "kind": kind, "value": value, "mode": mode})
            left -= 1
    fixed = {"experts": "k=2", "active": "E=16", "length": "E=8 k=2", "batch": "E=8 k=2, one token each"}[what]
    return section(f"One layer by {what} ({fixed})", f"linear {width} x {width}, rank {RANK}", rows, by=what)
