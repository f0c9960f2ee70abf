"""Findings: what the doctor says, and what can be seen without taking a training step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from ..checkpoint import misfits, peft_model_of
from ..control import report
from ..errors import MoloraError
from ..files import local_folder, look


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: how it is, and what to do about it."""

    level: Literal["ok", "warn", "fail"]
    what: str
    next: str = ""


def structure_findings(model: nn.Module, adapter: str) -> Iterator[Finding]:
    """Say how many layers are routed, and which were skipped and why."""
    what = report(model, adapter)
    yield Finding(
        "ok", f"{len(what.wrapped)} layers are routed by {what.decisions} decision" + "s" * (what.decisions != 1)
    )
    for path, reason in what.skipped.items():
        yield Finding("warn", f"'{path}' was skipped: {reason}", "leave it out of target_modules if that is as meant")


def parameters_findings(model: nn.Module, adapter: str) -> Iterator[Finding]:
    """Look at what is trainable, whether all numbers are finite, and the precision of the adapter."""
    ours, base = [], []
    for name, parameter in model.named_parameters():
        is_ours = "molora_" in name or ".modules_to_save." in name
        (ours if is_ours else base).append((name, parameter))
    mine = [(n, p) for n, p in ours if f".{adapter}." in n]
    trained = [name for name, parameter in mine if parameter.requires_grad]
    if not any("molora_" in name for name in trained):
        yield Finding(
            "fail",
            f"adapter '{adapter}' is frozen: none of its parameters is trainable",
            "load it with is_trainable=True, or call model.set_adapter(...) and model.set_requires_grad(...)",
        )
    else:
        yield Finding("ok", f"{len(trained)} of the adapter's {len(mine)} tensors are trainable")
    loose = [name for name, parameter in base if parameter.requires_grad]
    if loose:
        yield Finding(
            "warn",
            f"{len(loose)} tensors of the base are trainable, and saving the adapter will not save them "
            f"(first: '{loose[0]}')",
            "freeze them with requires_grad_(False), or list their modules in modules_to_save",
        )
    else:
        yield Finding("ok", "the base is frozen")
    broken = [name for name, parameter in ours if not torch.isfinite(parameter).all()]
    if broken:
        yield Finding("fail", f"{len(broken)} tensors hold NaN or Inf (first: '{broken[0]}')", "load or wrap it again")
    low = [name for name, parameter in ours if "molora_" in name and parameter.dtype != torch.float32]
    if low:
        yield Finding(
            "warn",
            f"{len(low)} tensors of the adapter are not float32 (first: '{low[0]}'), so small updates are lost",
            "do not call model.half() or .bfloat16() after wrapping; choose the base's dtype when it is loaded",
        )


def folder_findings(model: nn.Module, adapter: str, folder: str | Path) -> Iterator[Finding]:
    """Hold the tensors of a saved adapter against those that this model would save."""
    try:
        contents = look(local_folder(folder))
    except MoloraError as error:
        yield Finding("fail", str(error), "give the folder of a saved adapter")
        return
    problems = contents.problems or [
        *misfits(peft_model_of(model, adapter), adapter, contents.tensors),
        *contents.not_finite(),
    ]
    if not problems:
        yield Finding("ok", f"all {len(contents.tensors)} tensors of '{folder}' fit this model")
        return
    shown = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
    yield Finding("fail", f"'{folder}' does not fit: {shown}", "use the model and the recipe it was trained with")
