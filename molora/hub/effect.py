"""Proof of effect: an adapter that is registered must change what the model says, and change it to numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import load
from ..compat.registration import MOLORA
from ..control import pin
from ..errors import ConfigError, LoadError, raise_all
from ..from_peft import import_peft
from ..undo import Snapshot
from .limits import Limits
from .verify import check_folder

Probe = Mapping[str, Any] | str


@dataclass(frozen=True)
class Effect:
    """What an adapter does to probe inputs.

    Attributes:
        changes: for each probe, the largest change of an output, relative to the largest output.
        smallest: changes up to this are rounding.
        tensors: how many tensors the adapter holds.
        unmatched: those that belong to no layer of the model.
        problems: why the adapter is refused; empty when it has an effect.
    """

    changes: tuple[float, ...]
    smallest: float
    tensors: int
    unmatched: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def largest(self) -> float:
        """The largest relative change over all probes."""
        return max(self.changes, default=0.0)

    def require(self) -> Effect:
        """Return itself; raise LoadError when the adapter is refused."""
        raise_all(list(self.problems), LoadError, "this adapter cannot be registered")
        return self


def proof_of_effect(
    model: nn.Module,
    folder: str | Path,
    probes: Sequence[Probe],
    *,
    tokenize: Callable[[str], Mapping[str, Any]] | None = None,
    limits: Limits | None = None,
) -> Effect:
    """Run probes through a base model without and with an adapter; the model is afterwards as it was.

    An adapter has an effect when it changes some output of some probe by more than rounding: 8 units in the last place
    of the output's dtype, relative to the largest output.

    Args:
        model: the base model, without adapters.
        folder: of a PEFT LoRA or a mixture of molora.
        probes: inputs of the model by name, or texts.
        tokenize: makes inputs of a text, with a batch axis: `lambda text: tokenizer(text, return_tensors="pt")`.
        limits: of check_folder, which comes first.

    Returns:
        What it does; `effect.require()` raises LoadError for an adapter that is refused.

    Raises:
        ConfigError: there are no probes, or texts without `tokenize`.
    """
    if not probes or (tokenize is None and any(isinstance(probe, str) for probe in probes)):
        raise ConfigError("proof_of_effect needs probes: inputs of the model by name, or texts and tokenize=")
    inputs = [tokenize(probe) if isinstance(probe, str) and tokenize else probe for probe in probes]
    verdict = check_folder(folder, base=model, limits=limits)
    tensors = {} if verdict.contents is None else verdict.contents.tensors
    found = list(verdict.problems)
    if verdict.unmatched:
        found.insert(0, f"{len(verdict.unmatched)} of {len(tensors)} tensors find no place in the model")
    if found:
        return Effect((), 0.0, len(tensors), verdict.unmatched, tuple(found))
    before = Snapshot(model)
    try:
        model.eval()
        plain = [_outputs(model, one) for one in inputs]
        if verdict.kind == MOLORA:
            adapted: nn.Module = load(model, folder)
            after = [_outputs(adapted.eval(), one) for one in inputs]
        else:
            adapted = import_peft(model, [folder]).eval()
            with pin(adapted, torch.ones(1)):
                after = [_outputs(adapted, one) for one in inputs]
    finally:
        before.restore()
    smallest = 8 * max((torch.finfo(value.dtype).eps for one in plain for value in one), default=0.0)
    changes = tuple(_change(a, b) for a, b in zip(plain, after, strict=True))
    if not all(change < float("inf") for change in changes):
        found.append("with it the model's outputs are NaN or Inf")
    elif max(changes) <= smallest:
        what = "its B matrices may still be zero, as they are before training"
        found.append(
            f"it changes nothing: over {len(inputs)} probes the outputs differ by {max(changes):.1e} at most; {what}"
        )
    return Effect(changes, smallest, len(tensors), (), tuple(found))


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Return every floating tensor of the model's output."""
    device = next(iter(model.parameters())).device
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
    output = model(**moved)
    values = (
        output.values() if isinstance(output, Mapping) else output if isinstance(output, (list, tuple)) else [output]
    )
    return [value.detach().cpu() for value in values if isinstance(value, Tensor) and value.is_floating_point()]


def _change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Return the largest relative change; Inf when something is not finite that was."""
    largest = 0.0
    for a, b in zip(before, after, strict=True):
        a, b = a.double(), b.double()
        was_finite = torch.isfinite(a)
        if not torch.isfinite(b[was_finite]).all():
            return float("inf")
        scale = a[was_finite].abs().max().item() if was_finite.any() else 0.0
        change = (a - b)[was_finite].abs().max().item() if was_finite.any() else 0.0
        largest = max(largest, change / scale if scale else float(change > 0))
    return largest
