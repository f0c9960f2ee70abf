"""The one place that reads a pickle of others: tensors and plain values only, never an object or a call."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import LoadError
from ...headers import shown

MAX_BYTES = 20_000_000_000


def read_plain(path: Path) -> Any:
    """Return the content of a file that torch wrote, if it is made of tensors and plain values alone.

    torch's `weights_only` unpickler runs no code of the file: what is no tensor, number, text, list or mapping is
    refused. The file is mapped and not copied.

    Raises:
        LoadError: the file is missing, damaged or too large, is no zip of torch >= 1.6, or holds other objects.
    """
    if not path.is_file():
        raise LoadError(f"{path.name} is missing in '{path.parent}'")
    if path.stat().st_size > MAX_BYTES:
        raise LoadError(f"{path.name} has {path.stat().st_size:,} bytes, {MAX_BYTES:,} are allowed")
    if not zipfile.is_zipfile(path):
        raise LoadError(f"{path.name} is no archive of torch 1.6 or later; save it again with torch.save")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the unpickler, the archive and the tensors each fail in ways of their own
        raise LoadError(
            f"{path.name} is damaged, or holds more than tensors and plain values, which are never unpickled: "
            f"{shown(error)}"
        ) from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of such a file by name; see `read_plain`.

    Raises:
        LoadError: it cannot be read, or is anything but a mapping from names to finite tensors of floats.
    """
    content = read_plain(path)
    return checked(content, path.name)


def checked(content: Any, where: str) -> dict[str, Tensor]:
    """Return a mapping from names to tensors as it is; raise LoadError when it is anything else."""
    if not isinstance(content, Mapping) or not content:
        raise LoadError(f"{where} must hold a mapping from names to tensors, got {type(content).__name__}")
    wrong = [
        str(name)
        for name, value in content.items()
        if not isinstance(name, str)
        or not isinstance(value, Tensor)
        or value.layout != torch.strided
        or value.device.type != "cpu"
        or not value.is_floating_point()
        or value.untyped_storage().nbytes() < value.numel() * value.element_size()  # one number said to be many
        or not torch.isfinite(value).all()
    ]
    if wrong:
        raise LoadError(f"{where}: these are no finite tensors of floats: {', '.join(wrong[:8])}")
    return dict(content)
