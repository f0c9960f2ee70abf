"""A vLLM plugin: LoRAs of a library of molora, found by name when they are first asked for, and checked.

    MOLORA_HUB=adapters_hub VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve MODEL --enable-lora --max-lora-rank 64

vLLM calls `register` in each of its processes (entry point `molora` of the group `vllm.general_plugins`). An adapter is
`name`, `name@2`, or `tenant/name`; MOLORA_ALLOW lists which are served, as in the rights of tenants. What is handed to
vLLM is a copy whose folder is called by the digest of its content, so that a changed adapter has another path: vLLM's
cache of keys and values goes by name and path, and would serve the old ones under the old path.

Nothing here imports vLLM before `register`, and molora never needs it. What of it is relied on is in `interface`.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .hub_resolver import ALLOW, BASE, HUB, HubResolver

logger = logging.getLogger("vllm.molora")  # below vLLM's own, whose handlers are the only ones there
CACHE = "MOLORA_VLLM_CACHE"
RESOLVER = "molora"  # what vLLM calls it


def interface() -> tuple[Any, Any, Any]:
    """Return vLLM's LoRAResolver, its registry and its LoRARequest.

    Raises:
        ConfigError: vLLM is not there, or is not as it was when this was written (0.32.0).
    """
    try:
        from vllm.lora.request import LoRARequest
        from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry
    except ImportError as error:
        raise ConfigError(f"this vLLM has no LoRA resolvers: {error}") from error
    wanted = (
        (LoRAResolver.resolve_lora, ("self", "base_model_name", "lora_name")),
        (LoRAResolverRegistry.register_resolver, ("resolver_name", "resolver")),
    )
    wrong = [f"{what.__qualname__}{inspect.signature(what)}" for what, names in wanted
             if tuple(inspect.signature(what).parameters) != names]  # fmt: skip
    missing = {"lora_name", "lora_int_id", "lora_path"} - set(inspect.signature(LoRARequest).parameters)
    if wrong or missing or not inspect.iscoroutinefunction(LoRAResolver.resolve_lora):
        told = ", ".join([*wrong, *(f"LoRARequest without {name}" for name in sorted(missing))])
        raise ConfigError(f"this vLLM's LoRA resolvers are others than molora knows: {told or 'resolve_lora'}")
    return LoRAResolver, LoRAResolverRegistry, LoRARequest


def from_environment(environ: Mapping[str, str]) -> HubResolver | None:
    """Return the resolver that the environment describes; None without MOLORA_HUB.

    Raises:
        ConfigError: something in it cannot be used.
    """
    hub = environ.get(HUB)
    if not hub:
        return None
    allow = environ.get(ALLOW)
    default = Path(environ.get("XDG_CACHE_HOME") or "~/.cache") / "molora" / "vllm"
    patterns = None if allow is None else _listed(allow)
    return HubResolver(hub, environ.get(CACHE) or default, patterns, bases=_listed(environ.get(BASE, "")), log=logger)


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def register() -> None:
    """Register the resolver with vLLM; does nothing without MOLORA_HUB. vLLM calls this, in every process."""
    finder = from_environment(os.environ)
    if finder is None:
        return
    base, registry, request = interface()

    class MoloraResolver(base):  # type: ignore[misc, valid-type]
        """Finds LoRAs in a library of molora."""

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            """Return a LoRARequest, or None when there is no such adapter that may be served."""
            found = await asyncio.to_thread(finder.find, base_model_name, lora_name)
            if found is None:
                return None
            return request(lora_name=found.name, lora_int_id=found.id, lora_path=str(found.path))

    registry.register_resolver(RESOLVER, MoloraResolver())
    logger.info("LoRAs come from the library '%s'", finder.hub.where)
