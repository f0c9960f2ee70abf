"""Routers are float32, whatever the model around them is cast to.

Half precision would lose prices, which move by 1e-5, and make near ties of scores fall another way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

HALF = (torch.bfloat16, torch.float16)


class Float32(nn.Module):
    """A module that follows the model to devices, but not into half precision (`model.half()`, `model.to(dtype)`)."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return tensor.to(new.device) if new.dtype in HALF and tensor.dtype not in HALF else new

        return super()._apply(keep, recurse)


def in_float32(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Run a forward of a Float32 module on float32 copies of parameters that it was lent in half precision.

    FSDP with a `param_dtype` gathers all parameters of a layer in that dtype; gradients go back through the copies.
    """

    @functools.wraps(forward)
    def run(self: Float32, *args: Any) -> Any:
        first = _first_parameter(self)  # the others were lent like it
        if first is not None and first.dtype in HALF:
            return torch.func.functional_call(self, {name: p.float() for name, p in self.named_parameters()}, args)
        return forward(self, *args)

    return run


def _first_parameter(module: nn.Module) -> Tensor | None:
    # not parameters(), whose generators would cost a decoded token more than the rest of this file
    for parameter in module._parameters.values():
        if parameter is not None:
            return parameter
    for child in module._modules.values():
        found = None if child is None else _first_parameter(child)
        if found is not None:
            return found
    return None
