"""Trust: everything that can be wrong with an adapter folder from elsewhere, found before any of it is used.

`check_folder` reads names and sizes first, then headers, then configs and card, and tensors last and piece by piece:
the memory it takes is bounded by `Limits`, whatever the files say. It reports all problems at once and raises none.
Whether an adapter does anything is another question: see effect.py.
"""

from __future__ import annotations

import copy
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import get_peft_model
from torch import nn

from .. import fingerprint
from ..base_weights import path_of_weight
from ..checkpoint import misfits
from ..compat.layers import linear_sizes, linear_sizes_of
from ..compat.registration import MOLORA
from ..config import MoloraConfig
from ..errors import LoadError, MoloraError, raise_all
from ..files import CONFIG, WEIGHTS, Contents, TensorInfo, not_finite, read_config, read_header
from ..headers import shown
from ..lora_files import lora_problems
from ..plan import why_not_pattern
from .card import CARD, AdapterCard, hash_file, read_card
from .limits import Limits, size_problems, why_not_file

_STATE = frozenset({"BOOL", "U8", "I32", "I64"})  # counters and tables of routers


@dataclass
class Verdict:
    """What a check found.

    Attributes:
        folder: what was checked.
        problems: why it is refused; empty when it may be used.
        notes: what could not be checked, and the like.
        contents: config and header, to be trusted when there is no problem.
        card: its card; None when there is none.
        sizes: bytes of every file by name.
        rank: the largest rank of a LoRA.
        unmatched: tensors of a LoRA that belong to no layer of the base.
    """

    folder: Path
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    contents: Contents | None = None
    card: AdapterCard | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    rank: int = 0
    unmatched: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    @property
    def kind(self) -> str | None:
        """The adapter's PEFT type: LORA or MOLORA."""
        return (self.contents.config or {}).get("peft_type") if self.contents is not None else None

    def require(self, head: str | None = None) -> Verdict:
        """Return itself; raise LoadError with all problems when there is one."""
        raise_all(self.problems, LoadError, head or f"adapter '{self.folder}' cannot be trusted")
        return self


def check_folder(
    path: str | Path, *, base: nn.Module | Mapping[str, Any] | None = None, limits: Limits | None = None
) -> Verdict:
    """Check an adapter folder; nothing in it is run, unpickled or followed elsewhere.

    Args:
        path: the folder of a PEFT LoRA or a mixture of molora, with or without a card.
        base: the model it is for, whose layers must fit; or the fingerprint of that model; or None.
        limits: what it may take.

    Returns:
        The verdict; `verdict.require()` raises LoadError when it is bad.
    """
    limits = limits or Limits()
    verdict = Verdict(Path(path))
    if not verdict.folder.is_dir():
        verdict.problems.append(f"there is no folder '{path}'")
        return verdict
    verdict.problems += _file_problems(verdict, limits)
    if verdict.problems:
        return verdict  # links and oversized files are not opened
    contents = verdict.contents = _contents(verdict.folder, limits)
    verdict.problems += contents.problems
    if (verdict.folder / CARD).exists():
        _check_card(verdict)
    if contents.config is None or not contents.tensors:
        return verdict
    others = [name for name in verdict.sizes if name.endswith(".safetensors") and name != WEIGHTS]
    files = {WEIGHTS: contents.tensors} | {name: _header(verdict, name, limits) for name in others}
    allowed = limits.dtypes | (_STATE if contents.config.get("peft_type") == MOLORA else frozenset())
    for file, tensors in files.items():
        wrong = {name: info.dtype for name, info in tensors.items() if info.dtype not in allowed}
        verdict.problems += [f"tensor '{n}' has dtype {d}; allowed: {_listed(allowed)}" for n, d in wrong.items()]
        verdict.problems += not_finite(verdict.folder / file, tensors)
    _check_content(verdict, base, limits)
    return verdict


# --- files ------------------------------------------------------------------------------------------------------------


def _file_problems(verdict: Verdict, limits: Limits) -> list[str]:
    """Look at names, kinds and sizes of the files; fills `sizes`."""
    found = []
    with os.scandir(verdict.folder) as entries:
        for number, entry in enumerate(sorted(entries, key=lambda entry: entry.name)):
            if number > 10 * limits.files:
                break  # reported by size_problems
            status, problem = entry.stat(follow_symlinks=False), why_not_file(entry.name)
            if stat.S_ISLNK(status.st_mode):
                found.append(f"{shown(entry.name)} is a link; an adapter holds its files itself")
            elif not stat.S_ISREG(status.st_mode):
                found.append(f"{shown(entry.name)} is no plain file; an adapter is one flat folder")
            elif problem:
                found.append(f"{shown(entry.name)} {problem}")
            else:
                verdict.sizes[entry.name] = status.st_size
    return found + size_problems(verdict.sizes, limits)


def _contents(folder: Path, limits: Limits) -> Contents:
    """Read config and header within the limits."""
    contents = Contents(folder)
    try:
        contents.config = read_config(folder / CONFIG, limits.config)
    except LoadError as error:
        contents.problems.append(str(error))
    try:
        contents.tensors = read_header(folder / WEIGHTS, max_bytes=limits.header, max_tensors=limits.tensors)
        if not contents.tensors:
            contents.problems.append(f"{WEIGHTS} holds no tensor")
    except LoadError as error:
        contents.problems.append(str(error))
    return contents


def _header(verdict: Verdict, name: str, limits: Limits) -> dict[str, TensorInfo]:
    try:
        return read_header(verdict.folder / name, max_bytes=limits.header, max_tensors=limits.tensors)
    except LoadError as error:
        verdict.problems.append(str(error))
        return {}


def _check_card(verdict: Verdict) -> None:
    """Read the card, and compare the hashes in it with the files."""
    try:
        verdict.card = card = read_card(verdict.folder)
    except LoadError as error:
        verdict.problems.append(str(error))
        return
    there = set(verdict.sizes) - {CARD}
    verdict.problems += [f"{name} is missing, the card lists it" for name in sorted(card.files.keys() - there)]
    verdict.problems += [f"{name} is not in the card" for name in sorted(there - card.files.keys())]
    for name in sorted(there & card.files.keys()):
        if hash_file(verdict.folder / name) != card.files[name]:
            verdict.problems.append(f"{name} has other content than its card says (sha256 differs)")


def _listed(names: frozenset[str]) -> str:
    return ", ".join(sorted(names))


# --- what the files say -----------------------------------------------------------------------------------------------


def _check_content(verdict: Verdict, base: Any, limits: Limits) -> None:
    contents = verdict.contents
    assert contents is not None and contents.config is not None
    model = base if isinstance(base, nn.Module) else None
    verdict.problems += [f"config: {p}" for p in _wild(contents.config, limits)]
    if contents.config.get("peft_type") != MOLORA:
        sizes = None if model is None else linear_sizes_of(model)
        problems, verdict.rank = lora_problems(contents, sizes, model)
        verdict.problems += problems
        if model is not None and sizes is not None:
            places = {name: _has_place(name, sizes) or path_of_weight(name, model) for name in contents.tensors}
            verdict.unmatched = tuple(name for name, place in places.items() if not place)
        if verdict.rank > limits.rank:
            verdict.problems.append(f"its rank is {verdict.rank:,}, {limits.rank:,} is allowed")
        _compare_base(verdict, base, verdict.card and verdict.card.fingerprint, contents.config)
        return
    if verdict.problems:
        return  # a config that is out of bounds is not built
    try:
        config = MoloraConfig.from_peft_type(**contents.config)
    except MoloraError as error:
        verdict.problems.append(str(error))
        return
    except Exception as error:  # values of any type, where PEFT's and our own checks expect others
        verdict.problems.append(f"its config cannot be used: {type(error).__name__}: {shown(error)}")
        return
    _compare_base(verdict, base, config.fingerprint, contents.config)
    if model is not None and not verdict.problems:
        try:
            verdict.problems += _mixture_misfits(model, config, contents)
        except (MoloraError, ValueError) as error:  # PEFT's own refusals are ValueErrors
            verdict.problems.append(str(error))
        except (RuntimeError, NotImplementedError) as error:  # parts that are computed from weights when made
            verdict.notes.append(f"its shapes are only compared on loading: it needs weights to be built ({error})")
        except Exception as error:
            verdict.problems.append(f"it cannot be built in this model: {type(error).__name__}: {shown(error)}")


def _has_place(name: str, sizes: Mapping[str, Any]) -> bool:
    return name.removeprefix("base_model.model.").partition(".lora_")[0] in sizes


def _wild(config: Mapping[str, Any], limits: Limits) -> Iterator[str]:
    """Yield what in a config would make building it take very much memory or time."""
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        value = config.get(key)
        if isinstance(value, list) and any(not isinstance(one, str) for one in value):
            yield f"{key} must hold texts, got {shown(value)}"
        elif not isinstance(value, (str, list, type(None))):
            yield f"{key} must be a text or a list of texts, got {shown(value)}"
        elif isinstance(value, str) and (problem := why_not_pattern(value)):
            yield f"{key}: {problem}"
    todo: list[tuple[str, Any]] = [("", config)]
    while todo:
        where, value = todo.pop()
        if isinstance(value, Mapping):
            todo += [(str(key), one) for key, one in value.items()]
        elif isinstance(value, list):
            todo += [(where, one) for one in value]
        elif where == "match" and isinstance(value, str) and (problem := why_not_pattern(value)):
            yield f"layers.match: {problem}"
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            most = {"num": limits.experts, "rank": limits.rank, "r": limits.rank}.get(where, limits.number)
            is_seed = "seed" in where and abs(value) < 2**64
            if isinstance(value, int) and abs(value) > most and not is_seed:
                yield f"{shown(where)[1:-1]} is {shown(value)}, {most:,} is allowed"


def _compare_base(verdict: Verdict, base: Any, saved: Any, config: Mapping[str, Any]) -> None:
    if base is None:
        return
    if saved is None:
        verdict.notes.append("it does not say which weights its base had, so only the shapes can be compared")
    elif isinstance(base, nn.Module):
        tensors = verdict.contents.tensors if verdict.contents else {}
        mine, weights = fingerprint.of_model(base, linear_sizes, config.get("modules_to_save"))
        brought = {name.removeprefix("base_model.model.") for name in tensors}
        weights = {name: weight for name, weight in weights.items() if name not in brought}
        verdict.problems += fingerprint.differences(saved, mine, weights)
    else:
        verdict.problems += fingerprint.conflicts(saved, base)


def _mixture_misfits(model: nn.Module, config: MoloraConfig, contents: Contents) -> list[str]:
    """Return how a mixture's tensors differ from what its config builds in this model, which is not touched."""
    skeleton = {id(t): t.to("meta") for t in [*model.parameters(), *model.buffers()]}
    for parameter in model.parameters():
        skeleton[id(parameter)] = nn.Parameter(skeleton[id(parameter)], requires_grad=False)
    hollow = copy.deepcopy(model, skeleton)  # the same modules, around tensors without content
    config = copy.deepcopy(config)
    config.fingerprint = None
    return misfits(get_peft_model(hollow, config, low_cpu_mem_usage=True), "default", contents.tensors)
