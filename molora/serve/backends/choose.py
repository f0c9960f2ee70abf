"""Which backends an engine runs: continuous batching where the model allows, static batches for the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from ...compat.models import generates
from ...errors import ConfigError, did_you_mean
from ..request import Program
from .base import Backend
from .continuous import Continuous, why_not
from .simple import Simple

NAMES = ("auto", "hf-cb", "hf-simple")
BESIDE = 8  # hf-simple beside hf-cb gets this part of the memory, for mixtures that read whole prompts


@dataclass
class Backends:
    """The backends of one model, the preferred one first.

    Attributes:
        all: those that run.
        report: what was chosen and why, line by line.
    """

    all: list[Backend]
    report: list[str] = field(default_factory=list)

    def of(self, program: Program) -> tuple[Backend | None, str]:
        """Return the backend for a program; None, and why, when no backend can run it."""
        reasons = []
        for backend in self.all:
            reason = backend.why_not(program)
            if reason is None:
                return backend, ""
            reasons.append(reason)
        return None, "; ".join(reasons) or "this model does not generate text; ask for embeddings"


def choose(
    model: nn.Module,
    name: str,
    kv_bytes: int,
    max_batch: int,
    pad_id: int,
    needs_prompt: Callable[[str], str | None],
) -> Backends:
    """Return the backends for a model.

    Args:
        model: with the adapters inside.
        name: `hf-cb`, `hf-simple`, or `auto`.
        kv_bytes: of keys and values, of all backends together.
        max_batch: jobs that run at the same time.
        pad_id: any token.
        needs_prompt: tells why a mixture cannot run where tokens are packed, by name; None: it can.

    Raises:
        ConfigError: the model cannot run so.
    """
    if name not in NAMES:
        raise ConfigError(f"backend '{name}' is unknown{did_you_mean(name, NAMES)}")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not generates(base):
        if name != "auto":
            raise ConfigError(f"{type(base).__name__} does not generate text, so it takes no backend; leave it at auto")
        return Backends([], [f"no backend: {type(base).__name__} does not generate text; it embeds and classifies"])
    reason = None if name == "hf-simple" else why_not(model)
    if reason is not None and name == "hf-cb":
        raise ConfigError(f"hf-cb cannot run this model: {reason}; use backend hf-simple")
    if name == "hf-simple" or reason is not None:
        simple = Simple(model, kv_bytes=kv_bytes, max_batch=max_batch, pad_id=pad_id)
        return Backends([simple], [f"hf-simple: {reason or 'as asked'}; {simple.capacity} tokens of keys and values"])
    beside = kv_bytes // BESIDE if name == "auto" else 0
    paged = Continuous(model, kv_bytes - beside, places=max_batch, packed=needs_prompt)
    found: list[Backend] = [paged]
    report = [f"hf-cb: {paged.capacity} tokens of keys and values"]
    if beside:
        simple = Simple(model, kv_bytes=beside, max_batch=max_batch, pad_id=pad_id)
        if simple.capacity > 1:
            found.append(simple)
            report.append(f"hf-simple beside it, for mixtures that read whole prompts: {simple.capacity} tokens")
    return Backends(found, report)
