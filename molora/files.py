"""Adapter folders on disk: looked at before anything is built from them, and replaced as a whole.

`look` reads a folder's config and the header of its safetensors file by hand, so that a corrupt, truncated or hostile
file is refused before one byte is allocated for it. `replacing` writes a folder so that a kill at any moment leaves
the old files or the new ones, never a mixture of both.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import ConfigError, LoadError

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
INCOMING = ".incoming"  # a complete set of new files on its way into the folder around it
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")

HOW_TO_LOAD = """## How to load this adapter

It holds routed experts, which PEFT loads once molora is imported (`pip install molora`):

```python
import molora  # without this line PEFT stops with KeyError: 'MOLORA'
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/or/repository")  # or: molora.load(base_model, ...)
```
"""

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library itself
MAX_CONFIG = 16_000_000
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


@dataclass
class Contents:
    """What an adapter folder holds.

    Attributes:
        folder: where it is.
        config: the content of adapter_config.json; None when it cannot be read.
        tensors: what the header of the weights says, by tensor name.
        problems: everything that is wrong; config and tensors are only to be trusted when it is empty.
    """

    folder: Path
    config: dict[str, Any] | None = None
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors one by one, on the CPU."""
        with safe_open(self.folder / WEIGHTS, framework="pt", device="cpu") as weights:
            for name in self.tensors:
                yield name, weights.get_tensor(name)

    def not_finite(self) -> list[str]:
        """Return a problem for each tensor that holds NaN or Inf."""
        try:
            return [
                f"tensor '{name}' holds NaN or Inf"
                for name, tensor in self.read()
                if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all()
            ]
        except SafetensorError as error:
            return [f"{WEIGHTS} cannot be read: {error}"]


def local_folder(path: str | Path, revision: str | None = None) -> Path:
    """Return the folder of an adapter, fetching it when `path` is the id of a Hub repository.

    Only the config, the card and the safetensors weights are ever downloaded.

    Raises:
        LoadError: there is neither such a folder nor such a repository within reach.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise LoadError(f"'{folder}' is a file; give the folder that holds {CONFIG} and {WEIGHTS}")
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    name = str(path)
    try:
        huggingface_hub.utils.validate_repo_id(name)
        fetched = huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=[CONFIG, WEIGHTS, CARD])
    except HFValidationError:
        raise LoadError(f"there is no folder '{name}', and it is not the id of a Hub repository either") from None
    except Exception as error:  # the Hub fails in many ways: no such repository, no network, no permission, ...
        reason = str(error).strip().partition("\n")[0]
        raise LoadError(f"there is no folder '{name}', and the Hub gave no repository '{name}': {reason}") from error
    return Path(fetched)


def look(folder: Path) -> Contents:
    """Look at an adapter folder without loading a tensor; what is wrong with it is listed in `problems`."""
    contents = Contents(folder)
    finish(folder)
    try:
        contents.config = read_config(folder / CONFIG)
    except LoadError as error:
        contents.problems.append(str(error))
    try:
        contents.tensors = read_header(folder / WEIGHTS)
    except LoadError as error:
        contents.problems.append(str(error))
    return contents


def read_config(path: Path) -> dict[str, Any]:
    """Return the content of an adapter_config.json; raise LoadError when it is missing or is no JSON mapping."""
    if not path.is_file():
        raise LoadError(f"{path.name} is missing")
    if path.stat().st_size > MAX_CONFIG:
        raise LoadError(f"{path.name} has {path.stat().st_size:,} bytes, which no adapter needs")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also bad UTF-8 and absurd numbers
        raise LoadError(f"{path.name} is not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise LoadError(f"{path.name} must hold a mapping, got {type(content).__name__}")
    return content


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Check the header of a safetensors file against the file, and return what it says.

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
        raise LoadError(f"{path.name} is missing")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8:
            raise LoadError(f"{path.name} is truncated: it has {size} bytes, not even the 8 of its length field")
        if length > MAX_HEADER:
            raise LoadError(
                f"{path.name} is not safetensors, or hostile: its header claims {length:,} bytes, "
                f"{MAX_HEADER:,} are allowed"
            )
        if length > size - 8:
            raise LoadError(f"{path.name} is truncated: its header has {length:,} bytes, the file {size:,}")
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{path.name} is corrupt: its header is not readable JSON ({error})") from None
    if not isinstance(header, dict):
        raise LoadError(f"{path.name} is corrupt: its header must be a mapping, got {type(header).__name__}")
    header.pop("__metadata__", None)
    return _check_layout(path.name, header, size - 8 - length)


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
        dtype, shape, span = (_get(entry, key) for key in ("dtype", "shape", "data_offsets"))
        if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
            raise LoadError(f"{file} is corrupt: tensor '{name}' has the unknown dtype {dtype!r}")
        if not _are_counts(shape) or not _are_counts(span) or len(span) != 2:
            raise LoadError(f"{file} is corrupt: tensor '{name}' has shape {shape!r} and offsets {span!r}")
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
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


# --- writing ----------------------------------------------------------------------------------------------------------


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write files into; afterwards they are the files of `folder`, all of them or none.

    The finished draft is renamed to `.incoming`, which is one atomic step, and from then on its files count: moving
    them out one by one may be interrupted, and `finish` completes it before anything reads or writes the folder again.
    Other files of the folder stay as they are.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"'{folder}' is a file; give a folder to save into")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    finish(folder)
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=folder))
    try:
        yield draft
        for path in draft.iterdir():
            with path.open("r+b") as file:
                os.fsync(file.fileno())  # a power cut must not lose what is about to count
        os.replace(draft, folder / INCOMING)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        if is_new and not any(folder.iterdir()):
            folder.rmdir()
        raise
    finish(folder)
    for stale in folder.glob(".draft-*"):  # of saves that were killed; a young one may be another process at work
        if time.time() - stale.stat().st_mtime > 3600:
            shutil.rmtree(stale, ignore_errors=True)


def mention_molora(card: Path) -> None:
    """Add to a model card how to load the adapter: without `import molora`, PEFT knows only `KeyError: 'MOLORA'`."""
    text = card.read_text(encoding="utf-8") if card.is_file() else "---\nlibrary_name: peft\n---\n"
    if "import molora" not in text:
        card.write_text(f"{text.rstrip()}\n\n{HOW_TO_LOAD}", encoding="utf-8")


def finish(folder: Path) -> None:
    """Complete a save of this folder that was interrupted after its files had been written; else do nothing.

    Raises:
        LoadError: the files cannot be moved, for example in a read-only folder.
    """
    incoming = folder / INCOMING
    if not incoming.is_dir():
        return
    try:
        with suppress(FileNotFoundError):  # another process is completing it too
            for path in sorted(incoming.iterdir(), key=lambda path: path.name == CONFIG):
                os.replace(path, folder / path.name)
            incoming.rmdir()
    except OSError as error:
        raise LoadError(f"a save into '{folder}' was interrupted and cannot be completed here: {error}") from None
