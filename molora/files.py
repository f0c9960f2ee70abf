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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import ConfigError, LoadError
from .headers import MAX_HEADER, PICKLES, TensorInfo, read_header, shown

__all__ = [
    "CARD",
    "CONFIG",
    "INCOMING",
    "MAX_CONFIG",
    "MAX_HEADER",
    "PICKLES",
    "WEIGHTS",
    "Contents",
    "TensorInfo",
    "finish",
    "local_folder",
    "look",
    "mention_molora",
    "not_finite",
    "read_config",
    "read_header",
    "replacing",
]

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
GATES = "molora_gates.safetensors"  # of a LoRA, one vector per layer (molora/posthoc/gates.py)
INCOMING = ".incoming"  # a complete set of new files on its way into the folder around it

HOW_TO_LOAD = """## How to load this adapter

It holds routed experts, which PEFT loads once molora is imported (`pip install molora`):

```python
import molora  # without this line PEFT stops with KeyError: 'MOLORA'
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/or/repository")  # or: molora.load(base_model, ...)
```
"""

MAX_CONFIG = 16_000_000
PIECE = 1_000_000  # values that are looked at at once


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
        """Return a problem for each tensor that holds NaN or Inf; some megabytes are in memory at a time."""
        return not_finite(self.folder / WEIGHTS, self.tensors)


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


def not_finite(file: Path, tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Return a problem for each of these tensors of a safetensors file that holds NaN or Inf, read piece by piece."""
    found = []
    try:
        with safe_open(file, framework="pt", device="cpu") as weights:
            for name, info in tensors.items():
                if info.is_floating and not all(
                    torch.isfinite(part.float()).all() for part in _parts(weights, name, info)
                ):
                    found.append(f"tensor '{name}' holds NaN or Inf")
    except (SafetensorError, OSError, RuntimeError, MemoryError) as error:  # the last two: it cannot be mapped
        return [f"{file.name} cannot be read: {error}"]
    return found


def _parts(weights: Any, name: str, info: TensorInfo) -> Iterator[Tensor]:
    """Yield a tensor in groups of rows of about PIECE values."""
    if not info.shape or 0 in info.shape:
        yield weights.get_tensor(name)
        return
    rows = max(1, PIECE * info.shape[0] // math.prod(info.shape))
    piece = weights.get_slice(name)
    for start in range(0, info.shape[0], rows):
        yield piece[start : start + rows]


def read_config(path: Path, max_bytes: int = MAX_CONFIG) -> dict[str, Any]:
    """Return the content of an adapter_config.json; raise LoadError when it is missing or is no JSON mapping."""
    if not path.is_file():
        raise LoadError(f"{path.name} is missing")
    if path.stat().st_size > max_bytes:
        raise LoadError(f"{path.name} has {path.stat().st_size:,} bytes, {max_bytes:,} are allowed")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also bad UTF-8 and absurd numbers
        raise LoadError(f"{path.name} is not readable JSON: {shown(error)}") from None
    if not isinstance(content, dict):
        raise LoadError(f"{path.name} must hold a mapping, got {type(content).__name__}")
    return content


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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        finish(folder)
        draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=folder))
    except OSError as error:
        raise ConfigError(f"'{folder}' cannot be written: {error.strerror}; save into another folder") from None
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
