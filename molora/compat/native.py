"""Native mixtures of experts: modules that hold the weights of all their experts in 3-D parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def native_experts(module: nn.Module) -> dict[str, tuple[int, int]] | None:
    """Return {parameter: (d_in, d_out)} of a module of stacked native experts, wrapped or not; None for others.

    These are the classes under transformers' `use_experts_implementation` (Mixtral, Qwen-MoE, ...): whatever they look
    like inside, transformers itself replaces their forward by the grouped one that `run_native_experts` follows.
    """
    while hasattr(module, "base_layer"):
        module = module.base_layer
    facts = ("has_gate", "has_bias", "is_transposed", "num_experts", "_apply_gate", "_is_expert_parallel")
    if not all(hasattr(module, fact) for fact in facts) or module._is_expert_parallel:
        return None
    sizes = {}
    for name in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
        weight = getattr(module, name, None)
        if not isinstance(weight, Tensor) or weight.dim() != 3 or weight.element_size() < 2:
            return None  # quantised to less than 16 bits
        if not weight.is_floating_point():
            return None
        sizes[name] = tuple(weight.shape[1:]) if module.is_transposed else (weight.shape[2], weight.shape[1])
    return sizes  # type: ignore[return-value]


def run_native_experts(module: nn.Module, x: Tensor, index: Tensor, weights: Tensor, add: Any) -> Tensor:
    """Run stacked native experts as transformers' grouped forward does, with something added to each product.

    Args:
        module: the module of the experts (see `native_experts`).
        x: (N, d); index, weights: (N, k), the native router's choice.
        add: called as `add(parameter, y, rows, expert, token)` with y (M, d_out) the product of the M = N k sorted
            rows (M, d_in) and the 3-D parameter of that name, the native expert and the token of each row; returns
            what takes the place of y.

    Returns:
        (N, d).
    """
    from transformers.integrations.moe import _grouped_linear

    k = index.shape[-1]
    expert, order = torch.sort(index.reshape(-1), stable=True)
    token = order // k
    ends = torch.bincount(expert, minlength=module.num_experts).cumsum(0).to(torch.int32)
    rows = x.index_select(0, token)
    up, down = native_experts(module) or ()
    for name in (up, down):
        bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
        weight = getattr(module, name)
        y = add(name, _grouped_linear(rows, weight, ends, bias, module.is_transposed), rows, expert, token)
        rows = y if name == down else module._apply_gate(y) if module.has_gate else module.act_fn(y)
    if getattr(module, "has_post_expert_norm", False):
        rows = module.post_expert_norm(rows)
    weighted = rows * weights.reshape(-1)[order][:, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return weighted[back].view(len(x), k, -1).sum(1).to(x.dtype)
