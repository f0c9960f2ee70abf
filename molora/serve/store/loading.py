"""Sources of adapters: what is known of one before it is loaded, and how it is read and checked when it is wanted.

Registering looks at names, configs and headers only. Everything that a stranger's file could do wrong is looked for
when it is loaded, on a loader thread: by `molora.hub.verify` the first time, by its digest after that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor

from ...compat.registration import MOLORA
from ...config import MoloraConfig
from ...errors import ConfigError, LoadError, raise_all
from ...files import CONFIG, WEIGHTS, Contents, look, read_config
from ...hub.card import CARD
from ...hub.entry import Entry
from ...hub.ingredients import Reader, broken, contents_of
from ...hub.limits import Limits
from ...hub.verify import check_folder
from ...lora_files import Lora, Pair, read_lora
from .mixtures import insert, needs_whole_prompt, remove, why_not_served
from .slots import Slots, rank_of, too_large

LORA, MIXTURE = "lora", "mixture"


@dataclass(frozen=True)
class Header:
    """What is known of an adapter before it is loaded.

    Attributes:
        kind: `lora` or `mixture`.
        rank: its largest rank; the number of experts of a mixture.
        bytes: of its tensors.
        parent: name of the base model that it says it is for.
        packed: whether it can run where the tokens of requests are packed in one row.
        stamp: what changes with its files; None when that cannot be told.
    """

    kind: str = LORA
    rank: int = 1
    bytes: int = 0
    parent: str = ""
    packed: bool = True
    stamp: str | None = None


@dataclass(frozen=True)
class Loaded:
    """An adapter that was read and checked.

    Attributes:
        digest: of its config and its tensors, in hexadecimal.
        pairs, tensors: of a LoRA.
        folder, stamp: of a mixture, which is put into the model from there; and what changes with its files.
        nbytes: what it takes in memory.
    """

    digest: str
    pairs: Mapping[str, Pair] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    folder: Path | None = None
    stamp: str = ""
    nbytes: int = 0


class Source(Protocol):
    """Where an adapter comes from.

    Attributes:
        header: what is known of it.
    """

    header: Header

    def load(self) -> Loaded:
        """Read and check it; called on a loader thread, as often as it has to be read again.

        Raises:
            LoadError: it cannot be trusted, or does not fit.
            OSError: it cannot be read now.
        """
        ...


class FolderSource:
    """An adapter in a folder: a PEFT LoRA, or a mixture of molora.

    Args:
        folder: where it is.
        slots: what it must fit.
        base: the fingerprint of the base model.
        limits: what it may take.
        label: what messages call it.
        entry: what a library knows of it, so that nothing has to be read now.
        stamp, parent: for the header; by default that of the files, and what the config says.

    Raises:
        LoadError: config or header are damaged, or it cannot be served; all problems at once.
    """

    def __init__(
        self,
        folder: Path,
        slots: Slots,
        base: Mapping[str, Any],
        limits: Limits,
        *,
        label: str,
        entry: Entry | None = None,
        stamp: str | None = None,
        parent: str = "",
    ) -> None:
        self.folder, self.label = folder, label
        self._slots, self._base, self._limits = slots, base, limits
        self._contents: Contents | None = None  # once it was checked
        self._checked = ""
        if entry is not None:
            raise_all(list(entry.problems), LoadError, f"adapter '{label}' is damaged")
            config = read_config(folder / CONFIG) if entry.kind == MIXTURE else {}
            told = (entry.kind, entry.rank or 1, entry.bytes, entry.card.base)
            self.header = self._header(*told, config, stamp_of_entry(entry))
            return
        contents = look(folder)
        raise_all(contents.problems, LoadError, f"adapter '{label}' is damaged")
        config = contents.config or {}
        kind = str(config.get("peft_type"))
        kind, rank = {MOLORA: MIXTURE, "LORA": LORA}.get(kind, kind), 1
        if kind == LORA:
            rank = rank_of(_lora(contents, slots, label).pairs)
        size = (folder / WEIGHTS).stat().st_size
        self.header = self._header(kind, rank, size, parent or _parent(config), config, stamp or stamp_of(folder))

    def _header(self, kind: str, rank: int, size: int, parent: str, config: Mapping[str, Any], stamp: str) -> Header:
        if kind == LORA:
            self._slots.bucket_for(rank)
            return Header(LORA, rank, size, parent, True, stamp)
        if kind != MIXTURE:
            raise LoadError(f"'{self.label}' is an adapter of type '{kind}'; LoRAs and mixtures of molora are served")
        built = MoloraConfig.from_peft_type(**config)
        problem = why_not_served(built)
        if problem:
            raise LoadError(f"mixture '{self.label}' cannot run beside others in one batch: {problem}")
        experts = built.experts["num"]
        rank = experts if isinstance(experts, int) else 1
        return Header(MIXTURE, rank, size, parent, not needs_whole_prompt(built), stamp)

    def load(self) -> Loaded:
        """Read and check it."""
        stamp = stamp_of(self.folder)
        if self._contents is None or stamp != self._checked:
            verdict = check_folder(self.folder, base=self._base, limits=self._limits)
            self._contents = verdict.require(f"'{self.label}' cannot be trusted").contents
            self._checked = stamp
        assert self._contents is not None
        contents = self._contents
        tensors, problems = Reader().read(contents)
        if self.header.kind == LORA:
            return _checked_lora(contents, tensors, problems, self._slots, self.label)
        raise_all(problems + too_large(tensors), LoadError, f"mixture '{self.label}' cannot be served")
        return Loaded(digest_of(contents.config or {}, tensors), folder=self.folder, stamp=stamp)


class HeldSource:
    """A LoRA in memory.

    Args:
        config, tensors: as PEFT saves them; the tensors are copied when they are loaded.
        slots: what it must fit.

    Raises:
        LoadError: it cannot be served; all problems at once.
        ConfigError: it is a mixture, which is served from a folder.
    """

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], slots: Slots) -> None:
        if config.get("peft_type") == MOLORA:
            raise ConfigError("a mixture is served from a folder; write it with molora.save(model, folder) first")
        self._slots = slots
        self._contents = contents_of((config, tensors))
        pairs = _lora(self._contents, slots, "(in memory)").pairs
        nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        self.header = Header(LORA, rank_of(pairs), nbytes, _parent(config))

    def load(self) -> Loaded:
        """Copy and check it."""
        tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self._contents.read()}
        return _checked_lora(self._contents, tensors, broken(tensors), self._slots, "(in memory)")


def put_in(model: PeftModel, loaded: Loaded, adapter: str) -> None:
    """Put a mixture that was read into a served model; see `mixtures.insert`.

    Raises:
        LoadError: it does not fit, or its files have changed since they were checked.
    """
    assert loaded.folder is not None
    insert(model, loaded.folder, adapter)
    if stamp_of(loaded.folder) != loaded.stamp:
        remove(model, adapter)
        raise LoadError("its files have changed while it was loaded; register it again")


def stamp_of(folder: Path) -> str:
    """Return what changes when the files of an adapter do."""
    found = [folder.resolve().as_posix()]
    for name in (CONFIG, WEIGHTS, CARD):
        path = folder / name
        status = path.stat() if path.exists() else None
        found.append("-" if status is None else f"{status.st_ino}:{status.st_size}:{status.st_mtime_ns}")
    return " ".join(found)


def stamp_of_entry(entry: Entry) -> str:
    """Return what tells versions in a library apart, whose files never change."""
    return f"{entry.ref} {entry.digest}"


def _lora(contents: Contents, slots: Slots, label: str) -> Lora:
    """Return the pairs of a LoRA by its config and header; raises with all that keeps it out of the slots."""
    lora = Lora(label, contents)
    problems = read_lora(lora, slots.sizes, values=False)
    raise_all(problems or slots.problems(lora), LoadError, f"'{label}' cannot be served")
    return lora


def _checked_lora(
    contents: Contents, tensors: dict[str, Tensor], problems: list[str], slots: Slots, label: str
) -> Loaded:
    pairs = _lora(contents, slots, label).pairs
    raise_all(problems + too_large(tensors, pairs), LoadError, f"'{label}' cannot be served")
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return Loaded(digest_of(contents.config or {}, tensors), pairs, tensors, nbytes=nbytes)


def _parent(config: Mapping[str, Any]) -> str:
    parent = config.get("base_model_name_or_path")
    return parent if isinstance(parent, str) else ""


def digest_of(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return the digest of all that decides what an adapter does: its whole config, every bit of its tensors."""
    digest = hashlib.blake2b(json.dumps(config, sort_keys=True, default=str).encode(), digest_size=32)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
