"""Plan: what becomes of one request of a router; and what no request may hold."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..request import ServeError
from ..tenants.tenant import Tenant

MAX_MODEL = 256  # characters of a model's name
# what requests of SGLang, LoRAX and vLLM may say beside `model`: adapters, files, other servers and their passwords,
# code, and a place in the queue before others
REFUSED = (
    "lora_path lora_id lora_request lora_name adapter_id adapter_source adapter_parameters api_token "
    "kv_transfer_params bootstrap_host bootstrap_port bootstrap_room custom_logit_processor priority"
).split()


@dataclass
class Plan:
    """What becomes of one request.

    Attributes:
        id: of the answer, by which it can be rewarded.
        tenant: who asks.
        body: what is sent.
        model: what is asked for, as the upstream server calls it.
        shown: the same, as clients call it.
        is_auto: whether it was chosen here.
        told: what the client is told of the choice; empty when it named the model itself.
        grant: of the tenant's quota.
        prompt: estimated tokens of the prompt.
        hides_usage: whether the stream tells usage that the client did not ask for.
        started: of time.monotonic.
    """

    id: str
    tenant: Tenant
    body: dict[str, Any]
    model: str
    shown: str
    is_auto: bool
    told: dict[str, Any] = field(default_factory=dict)
    grant: Any = None
    prompt: int = 0
    hides_usage: bool = False
    started: float = field(default_factory=time.monotonic)

    @property
    def read(self) -> dict[str, int]:
        """The usage of a request of which at least the prompt was read."""
        return {"prompt_tokens": self.prompt, "completion_tokens": 0}

    @property
    def streams(self) -> bool:
        """Whether the answer comes in pieces."""
        return self.body.get("stream") is True


def check_body(body: Mapping[str, Any]) -> None:
    """Raise ServeError for a request that does not say its model, or asks for adapters by other fields."""
    name = body.get("model")
    if not isinstance(name, str) or not 0 < len(name) <= MAX_MODEL:
        raise ServeError(f"model must be a name of 1 to {MAX_MODEL} characters", param="model")
    wrong = [key for key in REFUSED if body.get(key) is not None]
    extra = body.get("molora")
    if extra is not None and (not isinstance(extra, dict) or set(extra) - {"trace"}):
        wrong.append("molora")
    if wrong:
        raise ServeError(
            f"{', '.join(wrong)}: not forwarded by a router; the adapter is chosen by model alone, its name or 'auto'",
            param=wrong[0],
        )
    if not isinstance(body.get("stream"), (bool, type(None))):  # which a server may read as true
        raise ServeError("stream must be true or false", param="stream")
