"""What a mixture is made of: adapters from folders, from a library by name, and from memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor

from ..errors import ConfigError, LoadError
from ..files import CONFIG, INCOMING, WEIGHTS, Contents, TensorInfo, local_folder, look, read_config
from .entry import Entry
from .names import parse
from .store import Hub

# A folder or Hub repository; `name` or `name@2` in a library; an entry of one; a PeftModel with one LoRA; or
# (config, tensors) as PEFT saves them.
Ingredient = str | Path | Entry | PeftModel | tuple[Mapping[str, Any] | PeftConfig, Mapping[str, Tensor]]

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
}
_NOTHING = torch.empty(0, dtype=torch.uint8)
_TORCH = {name: dtype for dtype, name in _DTYPES.items()}


@dataclass
class Held(Contents):
    """The contents of an adapter that is in memory instead of a folder."""

    held: dict[str, Tensor] = field(default_factory=dict)

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors one by one, where they are."""
        yield from self.held.items()

    def not_finite(self) -> list[str]:
        """Return a problem for each tensor that holds NaN or Inf."""
        return broken(self.held)


def broken(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return a problem for each of these tensors that holds NaN or Inf; quick where none does."""
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    # a sum is finite only where all of its terms are, and is much quicker than looking at each
    doubtful = {n: t for n, t in floats.items() if not math.isfinite(t.sum(dtype=torch.float32).item())}
    return [f"tensor '{name}' holds NaN or Inf" for name, t in doubtful.items() if not torch.isfinite(t.float()).all()]


class Reader:
    """Reads the tensors of one adapter folder after another into one piece of memory, without allocating it anew.

    What `read` returned is overwritten by the next `read`.
    """

    LARGEST = 1 << 26  # bytes that are kept between reads

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._header: tuple[bytes, dict[str, Any]] = b"", {}  # of the last file: adapters often have the same layout
        self._looked: tuple[bytes, int, dict[str, TensorInfo]] = b"", 0, {}  # a header that was checked, and the size

    def look(self, folder: Path) -> Contents:
        """Look at an adapter folder as `molora.files.look` does; the same header is not checked twice in a row."""
        path, (text, size, tensors) = folder / WEIGHTS, self._looked
        if text and not (folder / INCOMING).exists() and path.is_file() and path.stat().st_size == size:
            with path.open("rb", buffering=0) as file:
                if file.read(len(text)) == text:
                    try:
                        return Contents(folder, read_config(folder / CONFIG), dict(tensors))
                    except LoadError:
                        pass  # it is told below
        contents = look(folder)
        if not contents.problems:
            with path.open("rb", buffering=0) as file:
                length = 8 + int.from_bytes(file.read(8), "little")
                file.seek(0)
                self._looked = file.read(length), path.stat().st_size, dict(contents.tensors)
        return contents

    def read(self, contents: Contents) -> tuple[dict[str, Tensor], list[str]]:
        """Return the tensors of an adapter whose header was checked, and a problem for each that holds NaN or Inf."""
        if isinstance(contents, Held):
            tensors = dict(contents.read())
            return tensors, broken(tensors)
        path = contents.folder / WEIGHTS
        size = path.stat().st_size
        if len(self._buffer) < size:
            self._buffer = bytearray(size)
        buffer = self._buffer
        if size > self.LARGEST:
            self._buffer = bytearray()
        with path.open("rb", buffering=0) as file:
            filled = file.readinto(memoryview(buffer)[:size])
        start = 8 + int.from_bytes(buffer[:8], "little")
        text = bytes(buffer[8:start]) if filled == size and start <= size else b"{}"
        if text != self._header[0]:
            self._header = text, {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        header = self._header[1]
        if {n: (entry["dtype"], tuple(entry["shape"])) for n, entry in header.items()} != contents.tensors:
            return {}, [f"{WEIGHTS} has changed while it was read"]
        if start % 4 == 0 and start < size and all(info.dtype == "F32" for info in contents.tensors.values()):
            everything = torch.frombuffer(buffer, dtype=torch.float32, count=(size - start) // 4, offset=start)
            order = sorted(header, key=lambda name: header[name]["data_offsets"])  # side by side, as was checked
            parts = everything.split([math.prod(header[name]["shape"]) for name in order])
            tensors = {name: part.view(header[name]["shape"]) for name, part in zip(order, parts, strict=True)}
            return tensors, [] if math.isfinite(everything.sum().item()) else broken(tensors)
        tensors = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            dtype, place = _TORCH[entry["dtype"]], {"count": end - begin, "offset": start + begin}
            flat = torch.frombuffer(buffer, dtype=torch.uint8, **place) if end > begin else _NOTHING
            aligned = (start + begin) % dtype.itemsize == 0
            tensors[name] = (flat if aligned else flat.clone()).view(dtype).view(entry["shape"])
        return tensors, broken(tensors)


def hold(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Held:
    """Return the contents of an adapter given by its config and its tensors, as PEFT names them in a file."""
    held = {name: tensor.detach() for name, tensor in tensors.items()}
    infos = {name: TensorInfo(_DTYPES.get(t.dtype, str(t.dtype)), tuple(t.shape)) for name, t in held.items()}
    return Held(Path("(in memory)"), dict(config), infos, [], held)


def contents_of(
    source: Ingredient, hub: Hub | str | Path | None = None, look: Callable[[Path], Contents] = look
) -> Contents:
    """Return what an adapter holds, by its header; nothing is allocated for what lies in a folder.

    Args:
        source: see `Ingredient`. A text is a folder if there is one, else a name in the library, else a Hub repository.
        hub: the library, or its folder.
        look: what looks at a folder.

    Raises:
        ConfigError: it is no adapter, or the library has none of that name.
        LoadError: there is no such folder or repository.
    """
    if isinstance(source, PeftModel):
        return _of_model(source)
    if isinstance(source, Entry):
        return look(source.folder)
    if isinstance(source, tuple) and len(source) == 2:
        config, tensors = source
        return hold(_plain(config), tensors)
    if not isinstance(source, (str, Path)):
        raise ConfigError(
            "an adapter is a folder, a name in a library, a PeftModel with a LoRA, or (config, tensors); got "
            f"{type(source).__name__}"
        )
    if hub is not None and isinstance(source, str) and not Path(source).is_dir() and _is_ref(source):
        library = hub if isinstance(hub, Hub) else Hub(hub)
        return look(library.get(source).folder)
    try:
        return look(local_folder(source))
    except LoadError as error:
        if hub is None and isinstance(source, str) and _is_ref(source):
            raise LoadError(f"{error}; to find it in a library, say which (hub=)") from error
        raise


def label_of(source: Ingredient, number: int) -> str:
    """Return what an expert is called when nobody says so."""
    if isinstance(source, Entry):
        return source.name
    if isinstance(source, str) and _is_ref(source):
        return parse(source).name
    if isinstance(source, (str, Path)):
        return Path(source).name or str(source)
    if isinstance(source, PeftModel) and source.active_adapter != "default":
        return str(source.active_adapter)
    return f"expert_{number}"


def _is_ref(text: str) -> bool:
    try:
        parse(text)
    except ConfigError:
        return False
    return True


def _of_model(model: PeftModel) -> Held:
    name = model.active_adapter
    if not isinstance(name, str) or name not in model.peft_config:
        raise LoadError(f"a PeftModel gives one expert, but its active adapters are {name!r}; activate one of them")
    tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return hold(_plain(model.peft_config[name]), tensors)


def _plain(config: Mapping[str, Any] | PeftConfig) -> dict[str, Any]:
    plain = dict(config) if isinstance(config, Mapping) else config.to_dict()
    kind = plain.get("peft_type")
    plain["peft_type"] = getattr(kind, "value", kind)  # an enum until PEFT writes it
    return {key: sorted(value) if isinstance(value, set) else value for key, value in plain.items()}
