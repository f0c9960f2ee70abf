"""What a router knows of single experts: which rows of which of its tensors, found by asking it to reorder experts.

Every part of a router has `permute(order)`, which says all there is to know about where its experts are. A copy of
the router is filled with noise and permuted once; what has moved along with the experts belongs to them.
"""

from __future__ import annotations

import copy
import itertools

import torch
from torch import Tensor

from ..errors import ConfigError
from ..registry import Spec, split_spec
from ..routing import parts  # noqa: F401  (registers every scorer)
from ..routing.router import Router
from ..routing.scorers import scorers

ROUNDS = 24  # of noise: bools and small numbers look alike by chance

# Scorers that choose by themselves: tokens whose choice is closed would get no expert at all.
CHOOSERS = ("codebook", "distilled", "hash", "random")

Rows = dict[str, tuple[int, ...]]  # tensor of a router -> its axes that count experts

_KEPT = "_rows_by_expert"  # where a router keeps what was found


def rows_of(router: Router) -> Rows:
    """Return which axes of which tensors of a router count its experts.

    Raises:
        ConfigError: something of it belongs to experts in another way, such as a table of expert numbers.
    """
    found: Rows | None = router.__dict__.get(_KEPT)
    if found is None:
        for name in CHOOSERS:
            if type(router.scorer) is scorers.get(name):
                raise ConfigError(f"{why_not_close(name)}; use another router")
        found = router.__dict__[_KEPT] = _find(router)
    return found


def why_not_close(scorer: Spec) -> str | None:
    """Return why no slot of a router with this scorer can be closed, or None when it can."""
    name, _ = split_spec(scorer, "scorer")
    return f"scorer '{name}' chooses by itself and would choose closed slots, too" if name in CHOOSERS else None


@torch.no_grad()
def copy_rows(router: Router, old: int, new: int) -> None:
    """Let a router treat expert `new` as it treats expert `old`, in place; nothing else of it changes.

    Raises:
        ConfigError: see `rows_of`.
    """
    rows = rows_of(router)
    if not rows:
        return
    state = router.state_dict()
    width = router.num_experts + router.null
    for name, axes in rows.items():
        for axis in axes:
            for start in range(0, state[name].shape[axis], width):
                state[name].select(axis, start + new).copy_(state[name].select(axis, start + old))


@torch.no_grad()
def _find(router: Router) -> Rows:
    experts, width = router.num_experts, router.num_experts + router.null
    if experts < 2:
        return {}
    bank = router.bank
    twin = copy.deepcopy(router, {} if bank is None else {id(bank): bank})
    order = torch.arange(experts).roll(1)
    full = torch.cat([order, torch.arange(experts, width)])
    orders = {width * n: torch.cat([full + width * block for block in range(n)]) for n in range(1, router.splits + 1)}
    orders.setdefault(experts, order)
    generator = torch.Generator().manual_seed(0)
    left: dict[str, list[tuple[int, ...]]] = {}
    for _ in range(ROUNDS):
        before = {name: _noise(tensor, experts, generator) for name, tensor in twin.state_dict().items()}
        for name, tensor in twin.state_dict().items():
            tensor.copy_(before[name])
        twin.permute(order)
        for name, after in twin.state_dict().items():
            choices = left.get(name, _choices(after, orders))
            left[name] = [axes for axes in choices if torch.equal(_moved(before[name], axes, orders), after.cpu())]
    lost = sorted(name for name, choices in left.items() if not choices)
    if lost:
        raise ConfigError(
            f"tensor '{lost[0]}' of the router at '{router.place.name}' does not hold a row per expert, so no expert "
            "can take over the routing of another; use a router with a row per expert, or make it anew afterwards"
        )
    return {name: choices[0] for name, choices in left.items() if choices[0]}


def _noise(like: Tensor, experts: int, generator: torch.Generator) -> Tensor:
    if like.dtype == torch.bool:
        return torch.rand(like.shape, generator=generator) < 0.5
    if like.is_floating_point():
        return torch.rand(like.shape, generator=generator).to(like.dtype)
    return torch.randint(0, experts, tuple(like.shape), generator=generator).to(like.dtype)


def _choices(tensor: Tensor, orders: dict[int, Tensor]) -> list[tuple[int, ...]]:
    """Return all sets of axes that could count experts, the empty one first."""
    axes = [axis for axis in range(tensor.dim()) if tensor.shape[axis] in orders]
    return [chosen for count in range(len(axes) + 1) for chosen in itertools.combinations(axes, count)]


def _moved(tensor: Tensor, axes: tuple[int, ...], orders: dict[int, Tensor]) -> Tensor:
    for axis in axes:
        tensor = tensor.index_select(axis, orders[tensor.shape[axis]])
    return tensor
