"""The first of two passes: the model runs without its adapters, and leaves its last states for the routers (X-LoRA).

It runs without gradient and without dropout. In cached decoding it needs keys and values of its own, since those of the
adapted pass hold other values: a second key-value cache is kept beside the first, so that a step of generation costs
two forwards of one token each, instead of two over the whole text.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .compat.caches import tokens_in_cache
from .errors import RoutingError
from .routing.first_pass import CACHE, STATES
from .routing.trace import Pass

_NOT_NEEDED = ("labels", "num_items_in_batch")
_CACHES = ("DynamicCache",)  # what a second cache can be kept beside


def check_cache(cache: Any, arguments: dict[str, Any]) -> None:
    """Raise RoutingError for a cache that no second one can be kept beside.

    Args:
        cache: of the forward that begins, or None.
        arguments: of the forward, by name.
    """
    kind = "state-space cache" if arguments.get("cache_params") is not None else type(cache).__name__
    if cache is not None and kind not in _CACHES:
        raise RoutingError(
            "this router runs the model twice and needs a second cache beside each, which it can keep beside a "
            f"DynamicCache but not beside a {kind}; generate with use_cache=False, or with the default cache"
        )


def run_first_pass(module: nn.Module, arguments: dict[str, Any], now: Pass) -> None:
    """Run a model without its adapters and leave its last states (B, S, h) in the memory of the open pass.

    Args:
        module: the base model; its routed layers are switched off for this one call.
        arguments: of its forward, by name.
        now: the pass that has been opened.

    Raises:
        RoutingError: the model keeps what it has seen in a cache that no second one can follow, or gives no states.
    """
    if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        raise RoutingError("routers that read a first pass of the model (X-LoRA) know no encoder-decoder models")
    own = now.memory.past.get(CACHE)
    if tokens_in_cache(own) != tokens_in_cache(now.cache):
        raise RoutingError(
            f"the cache of this generation holds {tokens_in_cache(now.cache)} tokens, but this router has followed "
            f"only {tokens_in_cache(own)} of them (it was pinned or switched off in between); run the prompt again"
        )
    body, call = _body(module, {name: value for name, value in arguments.items() if name not in _NOT_NEEDED})
    if "past_key_values" in call:
        call["past_key_values"] = own
    if now.collecting or "cache_params" in call:
        call["use_cache"] = False
    with torch.no_grad(), _alone(module):
        outputs = body(**call)
    states = getattr(outputs, "last_hidden_state", None)
    if states is None:
        states = (getattr(outputs, "hidden_states", None) or (None,))[-1]
    if states is None:
        raise RoutingError(
            f"{type(module).__name__} returned no hidden states, which this router reads (X-LoRA); use a model whose "
            "forward understands output_hidden_states=True, or another router"
        )
    now.memory.now[STATES] = states.detach()
    cache = getattr(outputs, "past_key_values", None)
    if cache is not None and not now.collecting:
        now.memory.past[CACHE] = cache


def _body(module: nn.Module, call: dict[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return what gives the last states, and its arguments: the model without its head, else the whole model.

    Without the head no logits are made and no states but the last are kept.
    """
    body = getattr(module, getattr(module, "base_model_prefix", "") or "-", None)
    if not isinstance(body, nn.Module) or body is module:
        return module.forward, {**call, "output_hidden_states": True, "return_dict": True}
    known = inspect.signature(body.forward).parameters
    of_head = inspect.signature(module.forward).parameters.keys() - known.keys()
    takes_more = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    kept = {name: v for name, v in call.items() if name in known or (takes_more and name not in of_head)}
    return body, {**kept, "return_dict": True}


@contextmanager
def _alone(module: nn.Module) -> Iterator[None]:
    """Switch adapters and dropout off."""
    layers = [layer for layer in module.modules() if hasattr(layer, "molora_bank")]
    training = [part for part in module.modules() if part.training]
    before = [layer._disable_adapters for layer in layers]
    try:
        for part in training:
            part.training = False
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for part in training:
            part.training = True
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was
