"""Safetensors headers, checked by hand: a corrupt, truncated or hostile file is refused before anything is allocated.

The memory a check takes is bounded by the header's own size and by the number of tensors that are allowed.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from .errors import LoadError

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library itself
MAX_TENSORS = 1_000_000
MAX_NAME = 1_000  # characters of a tensor's name
MAX_AXES = 8
# Bytes per element; the sub-byte types of newer safetensors never hold adapters.
DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}


class TensorInfo(NamedTuple):
    """What a safetensors header says about one tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def is_floating(self) -> bool:
        """Whether its values are real floating numbers."""
        return "F" in self.dtype  # F16, BF16, F32, F64, F8_...


def read_header(path: Path, *, max_bytes: int = MAX_HEADER, max_tensors: int = MAX_TENSORS) -> dict[str, TensorInfo]:
    """Check the header of a safetensors file against the file, and return what it says.

    Args:
        path: the file.
        max_bytes: the largest header that is read.
        max_tensors: the most tensors that it may name.

    Raises:
        LoadError: the file is missing, a pickle is offered in its place, or it is truncated, corrupt or hostile.
    """
    if not path.is_file():
        pickles = sorted(p.name for p in path.parent.glob("adapter_model.*") if p.suffix in PICKLES)
        if pickles:
            raise LoadError(
                f"{path.name} is missing; {pickles[0]} is a pickle, which can run any code and is never loaded: "
                "have it saved as safetensors"
            )
        others = sorted(p.name for p in path.parent.glob("*.safetensors"))
        raise LoadError(f"{path.name} is missing" + _instead(path.name, others))
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8:
            raise LoadError(f"{path.name} is truncated: it has {size} bytes, not even the 8 of its length field")
        if length > max_bytes:
            raise LoadError(
                f"{path.name} is not safetensors, or hostile: its header claims {length:,} bytes, "
                f"{max_bytes:,} are allowed"
            )
        if length > size - 8:
            raise LoadError(f"{path.name} is truncated: its header has {length:,} bytes, the file {size:,}")
        text = file.read(length)
    # Parsed JSON takes up to a hundred times its own size: "[{},{},...". Honest headers hold few things per tensor.
    for mark, count in ((b"{", 2), (b"[", 4), (b",", 16)):
        if text.count(mark) > count * (max_tensors + 64):
            raise LoadError(f"{path.name} is hostile: its header holds more than the {max_tensors:,} tensors allowed")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{path.name} is corrupt: its header is not readable JSON ({shown(error)})") from None
    if not isinstance(header, dict):
        raise LoadError(f"{path.name} is corrupt: its header must be a mapping, got {type(header).__name__}")
    header.pop("__metadata__", None)
    if len(header) > max_tensors:
        raise LoadError(f"{path.name} names {len(header):,} tensors, {max_tensors:,} are allowed")
    return _check_layout(path.name, header, size - 8 - length)


def _instead(name: str, others: list[str]) -> str:
    """Return the tail of an error about a missing file that names those which may hold what is missed."""
    if not others:
        return ""
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    return f"; {shown(others[0])}{more} is there, which PEFT does not read either: save all tensors as one {name}"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a name occurs twice")
    return mapping


def _check_layout(file: str, header: dict[str, Any], available: int) -> dict[str, TensorInfo]:
    """Check that the tensors of a header lie side by side, without gap or overlap, and fill the file exactly."""
    found: dict[str, TensorInfo] = {}
    spans = []
    for name, entry in header.items():
        if len(name) > MAX_NAME or not name.isprintable():
            raise LoadError(f"{file} is corrupt: a tensor is called {shown(name)}, which is no name")
        dtype, shape, span = (_get(entry, key) for key in ("dtype", "shape", "data_offsets"))
        if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
            raise LoadError(f"{file} is corrupt: tensor '{name}' has the unknown dtype {shown(dtype)}")
        if not _are_counts(shape) or not _are_counts(span) or len(span) != 2:
            raise LoadError(f"{file} is corrupt: tensor '{name}' has shape {shown(shape)} and offsets {shown(span)}")
        if span[1] - span[0] != math.prod(shape) * DTYPE_BYTES[dtype]:
            raise LoadError(
                f"{file} is corrupt: tensor '{name}' of shape {shape} and dtype {dtype} cannot fill bytes {span}"
            )
        spans.append((span[0], span[1], name))
        found[name] = TensorInfo(dtype, tuple(shape))
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            what = "overlaps the one before it" if start < end else f"leaves a gap of {start - end} bytes before it"
            raise LoadError(f"{file} is corrupt: tensor '{name}' {what}")
        end = stop
    if end > available:
        raise LoadError(f"{file} is truncated: its tensors need {end:,} bytes, {available:,} are there")
    if end < available:
        raise LoadError(f"{file} is corrupt: {available - end:,} bytes follow its last tensor")
    return found


def _get(entry: Any, key: str) -> Any:
    return entry.get(key) if isinstance(entry, dict) else None


def _are_counts(values: Any) -> bool:
    return (
        isinstance(values, list) and len(values) <= MAX_AXES and all(type(v) is int and 0 <= v < 2**63 for v in values)
    )


def shown(value: Any, limit: int = 120) -> str:
    """Return a value from a file as it may be printed: escaped, and cut when it is long."""
    text = str(value) if isinstance(value, Exception) else repr(value)
    text = text if len(text) <= limit else f"{text[:limit]}… ({len(text):,} characters)"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
