"""Routers from prompts, as mergekit starts the gates of its mixtures: no training, no data beyond a few sentences.

The row of an expert is the mean hidden state of prompts that ask for it, minus that of prompts that do not, divided by
its length: for each router the states that it reads itself, with no expert acting. mergekit (modes `hidden` and
`hidden_avg`) takes the states between the blocks instead, since its gates sit there, and counts padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError, raise_all
from ...posthoc.average import POOLS, mean_inputs
from ...posthoc.base import fill, install
from ...posthoc.rerouting import expert_names, routers_of, sites_of

Prompts = Mapping[str, Sequence[str]]


def gates_from_prompts(
    model: nn.Module,
    tokenize: Callable[[str], Mapping[str, Any]],
    positive: Prompts,
    negative: Prompts | None = None,
    *,
    adapter: str = "default",
    pool: str = "last",
    top_k: int = 2,
    train: bool = False,
) -> nn.Module:
    """Route a mixture by how its prompts look to the model.

    Args:
        model: a mixture, as `molora.import_peft` makes it.
        tokenize: prompt -> what the model is called with, one row; such as
            `lambda text: tokenizer(text, return_tensors="pt")`.
        positive: name of each expert -> prompts that it is for; every expert needs one.
        negative: name of an expert -> prompts that it is not for.
        adapter: the name of the mixture.
        pool: the state of a prompt: its `last` token (mergekit's `hidden`), or the `mean` of its tokens (`hidden_avg`).
        top_k: how many experts act per token; their weights are the softmax over their scores.
        train: leave the rows trainable, as a start for training the router.

    Returns:
        The model.

    Raises:
        ConfigError: experts without prompts or unknown, or prompts that say nothing; nothing is changed.
    """
    names, negative = expert_names(model, adapter), negative or {}
    problems = [f"expert '{name}' has no positive prompt" for name in names if not positive.get(name)]
    problems += [f"there is no expert '{name}'" for name in sorted({*positive, *negative} - {*names})]
    problems += [f"the prompts of '{n}' must be a list" for n, p in {**positive, **negative}.items() if type(p) is str]
    if pool not in POOLS:
        problems.append(f"pool {pool!r} is unknown; known: {', '.join(POOLS)}")
    if not 1 <= top_k <= len(names):
        problems.append(f"top_k must be between 1 and the number of experts {len(names)}, got {top_k}")
    raise_all(problems, ConfigError, "gates cannot be made from these prompts")
    rows: dict[str, dict[str, Tensor]] = {}
    for name in names:
        rows[name] = _mean_state(model, tokenize, positive[name], adapter, pool)
        if negative.get(name):
            away = _mean_state(model, tokenize, negative[name], adapter, pool)
            rows[name] = {path: row - away[path] for path, row in rows[name].items()}
    flat = sorted({name for name, found in rows.items() for row in found.values() if not row.norm() > 1e-8})
    raise_all(
        [f"the positive and negative prompts of '{name}' look the same" for name in flat], ConfigError, "no gates"
    )
    install(
        model,
        adapter,
        scorer="prototypes",
        selector={"name": "top_k", "k": top_k, "normalise": "sum1"},
        weights="own" if train else "frozen",
    )
    for path, router in zip(sites_of(model, adapter), routers_of(model, adapter), strict=True):
        fill(router, [nn.functional.normalize(rows[name][path], dim=0) for name in names])
    return model


def _mean_state(
    model: nn.Module, tokenize: Callable[[str], Mapping[str, Any]], prompts: Sequence[str], adapter: str, pool: str
) -> dict[str, Tensor]:
    """Return path of the layer -> mean over prompts (d,), each prompt counting as one."""
    each = [mean_inputs(model, [tokenize(prompt)], None, adapter=adapter, pool=pool) for prompt in prompts]
    return {path: torch.stack([states[path] for states in each]).mean(0) for path in each[0]}
