"""Average activation: an expert's vector at a layer is the mean of what the layer reads on the expert's own data.

A baseline of PHATGOOSE (arXiv 2402.05859), and a router of the mttl library. It needs a few batches per expert and no
training. mttl takes the last token of 10 samples, divides by the length, and scores `h v / sqrt(d)`; the authors of
PHATGOOSE take the mean over tokens and score as PHATGOOSE does (measure `norm`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..control import pin, routed_layers, trace_of
from ..errors import ConfigError, raise_all
from ..routing.prototypes import MEASURES
from .base import fill, install, one_hot, slot_of
from .registry import posthoc_routers
from .rerouting import expert_names, routers_of, sites_of

POOLS = ("mean", "last")
Batches = Iterable[Mapping[str, Any]]


class Inputs:
    """Sums of what each routed layer reads, while it is switched on.

    Args:
        model: a wrapped model.
        adapter: whose layers.
        pool: `mean`, every valid token of a row counts; `last`, its last valid token only.

    Attributes:
        sums: path of the layer -> (d,) float64.
        counts: path of the layer -> how many tokens were summed.
    """

    def __init__(self, model: nn.Module, adapter: str = "default", pool: str = "mean") -> None:
        if pool not in POOLS:
            raise ConfigError(f"pool {pool!r} is unknown; known: {', '.join(POOLS)}")
        self.pool, self.sums, self.counts = pool, dict[str, Tensor](), dict[str, float]()
        self._trace, self._adapter = trace_of(model), adapter
        self._layers, self._hooks = routed_layers(model, adapter), list[Any]()

    def __enter__(self) -> Inputs:
        self._hooks = [layer.register_forward_pre_hook(self._read) for layer in self._layers.values()]
        return self

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _read(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        site = layer.sites[self._adapter]
        hidden, ctx = self._trace.rows_of(site, args[0].detach())
        valid = torch.ones(hidden.shape[:2], dtype=torch.bool) if ctx.valid is None else ctx.valid
        valid = valid.to(hidden.device)
        if self.pool == "last":
            position = torch.arange(1, valid.shape[1] + 1, device=valid.device) * valid
            valid = valid & (position == position.amax(1, keepdim=True))
        total = (hidden.double() * valid[..., None]).sum((0, 1)).cpu()
        self.sums[site.name] = self.sums.get(site.name, 0.0) + total
        self.counts[site.name] = self.counts.get(site.name, 0.0) + float(valid.sum())

    def means(self) -> dict[str, Tensor]:
        """Return path of the layer -> the mean (d,), float32, where anything was read."""
        return {path: (self.sums[path] / n).float() for path, n in self.counts.items() if n}


@torch.no_grad()
def mean_inputs(
    model: nn.Module,
    batches: Batches,
    expert: int | str | None,
    *,
    adapter: str = "default",
    pool: str = "mean",
    limit: int | None = None,
) -> dict[str, Tensor]:
    """Return what each layer reads on average (d,), by its path, on batches of one expert's data.

    Args:
        model: a wrapped model.
        batches: what the model is called with.
        expert: number or name of the expert that acts meanwhile; None: the base model alone.
        adapter: the name of the mixture.
        pool: `mean` or `last`, see `Inputs`.
        limit: at most so many batches.
    """
    names = expert_names(model, adapter)
    gates = torch.zeros(len(names)) if expert is None else one_hot(model, expert, adapter)
    was_training, count = model.training, 0
    model.eval()
    try:
        with Inputs(model, adapter, pool) as inputs, pin(model, gates):
            for batch in islice(batches, limit):
                model(**batch)
                count += 1
    finally:
        model.train(was_training)
    if not count:
        raise ConfigError(f"expert {expert!r} has no batches to average over")
    return inputs.means()


@posthoc_routers.register("average")
def build(
    model: nn.Module,
    adapter: str = "default",
    *,
    data: Mapping[int | str, Batches],
    top_k: int = 2,
    pool: str = "mean",
    measure: str = "scaled",
    normalise: bool = True,
    active: bool = True,
    temperature: float = 1.0,
    limit: int | None = None,
) -> nn.Module:
    """Route a mixture by the mean activations of each expert's own data.

    Args:
        model: a wrapped model.
        adapter: the name of the mixture.
        data: number or name of an expert -> batches of its data. Experts without data are never chosen.
        top_k: how many experts act per token, at most all; their weights sum to 1.
        pool: `mean` over valid tokens, or the `last` valid token of each row.
        measure: how vectors are compared: `scaled` (h v / sqrt(d)), `dot`, `abs` or `norm` (as PHATGOOSE).
        normalise: divide each vector by its length.
        active: let the expert act while its data is read; otherwise the base model reads it alone.
        temperature: divides the scores.
        limit: at most so many batches per expert.

    Returns:
        The model.

    Raises:
        ConfigError: unknown experts or options, or no data; nothing is changed.
    """
    names, problems = expert_names(model, adapter), []
    if measure not in MEASURES:
        problems.append(f"measure {measure!r} is unknown; known: {', '.join(MEASURES)}")
    slots = {}
    for expert in data:
        try:
            slots[slot_of(names, expert)] = expert
        except ConfigError as error:
            problems.append(str(error))
    if not data:
        problems.append("no expert has data")
    raise_all(problems, ConfigError, "average activation cannot be built")
    found = {
        slot: mean_inputs(model, data[expert], slot if active else None, adapter=adapter, pool=pool, limit=limit)
        for slot, expert in slots.items()
    }
    if normalise:
        found = {slot: {path: nn.functional.normalize(v, dim=0) for path, v in m.items()} for slot, m in found.items()}
    install(
        model,
        adapter,
        scorer={"name": "prototypes", "measure": measure},
        link={"name": "softmax", "temperature": float(temperature)},
        selector={"name": "top_k", "k": min(top_k, len(names)), "normalise": "sum1"},
    )
    for path, router in zip(sites_of(model, adapter), routers_of(model, adapter), strict=True):
        fill(router, [found.get(slot, {}).get(path) for slot in range(len(names))])
    return model
