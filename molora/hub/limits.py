"""Limits: which files an adapter may have, how large, and how much they may ask for; before any of them is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..files import CARD as README
from ..files import CONFIG, PICKLES, WEIGHTS
from ..headers import shown
from .card import CARD, MAX_CARD

TEXTS = (README, "LICENSE", "NOTICE")
SUFFIXES = (".safetensors", ".json", ".yaml", ".yml")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
FLOATS = frozenset({"F16", "BF16", "F32", "F64"})


@dataclass(frozen=True)
class Limits:
    """What an adapter may take; the defaults fit adapters of the largest open models.

    Attributes:
        files: how many files a folder may hold.
        weights: bytes of all safetensors files together.
        config: bytes of adapter_config.json, and of any other file that is no weights.
        header: bytes of a safetensors header.
        tensors: tensors of one file.
        rank: of one expert.
        experts: of one mixture's layer.
        number: largest whole number in the config of a mixture, seeds left out.
        dtypes: of the tensors of a LoRA; mixtures may also hold whole numbers and booleans, in their routers.
    """

    files: int = 32
    weights: int = 8 << 30
    config: int = 1_000_000
    header: int = 16_000_000
    tensors: int = 50_000
    rank: int = 1_024
    experts: int = 16_384
    number: int = 1_000_000
    dtypes: frozenset[str] = FLOATS


def why_not_file(name: str) -> str | None:
    """Return why a file of this name cannot be part of an adapter; None when it can."""
    if name in (CONFIG, WEIGHTS, CARD, *TEXTS):
        return None
    if Path(name).suffix.lower() in PICKLES:
        return "is a pickle, which can run any code and is never loaded: have it saved as safetensors"
    if not _FILE_NAME.fullmatch(name) or ".." in name:
        return "is no plain file name"
    if not name.endswith(SUFFIXES):
        return f"does not belong into an adapter: only {', '.join(SUFFIXES)} files and {', '.join(TEXTS)} do"
    return None


def size_problems(sizes: Mapping[str, int], limits: Limits) -> list[str]:
    """Return what in these file sizes in bytes, of a folder or of a promised download, exceeds the limits."""
    found = []
    if len(sizes) > limits.files:
        found.append(f"it has {len(sizes):,} files, {limits.files:,} are allowed")
    weights = sum(size for name, size in sizes.items() if name.endswith(".safetensors"))
    if weights > limits.weights:
        found.append(f"its weights have {weights:,} bytes, {limits.weights:,} are allowed")
    for name, size in sizes.items():
        most = MAX_CARD if name == CARD else limits.config
        if not name.endswith(".safetensors") and size > most:
            found.append(f"{shown(name)} has {size:,} bytes, {most:,} are allowed")
    return found
