"""ServeOptions: everything that `molora serve` can be told, in one YAML or by flags; flags win.

model: ./gemma
hub: ./adapters_hub
tenants: tenants.yaml
slots: {8: 32, 16: 8}
kv_memory: 2GiB
selectors:
  topic: {method: pilots}          # fitted on the cards of the library at the start
  fine: {folder: ./selector}       # fitted before, by `molora prompts fit`
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from accelerate.utils import convert_file_size_to_int

from ..errors import ConfigError, did_you_mean, raise_all

BACKENDS = ("auto", "hf-cb", "hf-simple")
DTYPES = ("auto", "float32", "bfloat16", "float16")
SIZES = ("kv_memory", "cpu_memory", "max_body")
PATHS = ("tenants", "database", "manifest")


@dataclass
class ServeOptions:
    """The options of a server. Sizes are bytes, or texts such as `2GiB`; times are seconds.

    Attributes:
        model: folder or Hub name of the base model.
        name: what clients call the base model; by default the last part of `model`.
        gguf_file: the file in `model`, when it is a GGUF.
        dtype: of the base model.
        quantize: `4bit` or `8bit` by bitsandbytes; None: as it is.
        hub: folder or address of the library of adapters.
        adapters: which of its adapters are served; None: all.
        pinned: those that are loaded before the server is ready, and are never evicted.
        manifest: a file with the adapters that are wanted, instead of `adapters` and `pinned`.
        slots: how many adapters of each rank may act at the same time.
        targets: layers that adapters may use: `all-linear`, or the ends of their names.
        cpu_memory: of adapters that are kept beside those in slots.
        loaders: threads that read adapters.
        tenants: a YAML of tenants; None: everybody may use everything.
        database: SQLAlchemy URL, or a file, of keys and usage; by default a file beside `tenants`.
        selectors: what `model: auto` may ask, by name: options of a prompt selector, or `{folder: ...}` of a fitted
            one. The first is the default.
        feedback: file in which answers with their propensities and rewards are kept; None: in memory.
        backend: `hf-cb` (continuous batching, paged), `hf-simple` (static batches, any model), or `auto`.
        kv_memory: of keys and values.
        max_batch: requests that run at the same time.
        max_waiting: requests that wait at most; more are answered 429.
        max_length: tokens of prompt and answer together; None: what the model takes.
        timeout: of a request, unless it asks for less.
        host, port: to listen on; port 0 takes a free one.
        drain: seconds that running answers get when the server is told to stop.
        max_body: of a request.
        docs: whether /openapi.json exists.
        log_level: of the server's log.
    """

    model: str = ""
    name: str | None = None
    gguf_file: str | None = None
    dtype: str = "auto"
    quantize: str | None = None
    hub: str | None = None
    adapters: list[str] | None = None
    pinned: list[str] = field(default_factory=list)
    manifest: str | None = None
    slots: dict[int, int] = field(default_factory=lambda: {8: 16, 16: 8})
    targets: str | list[str] = "all-linear"
    cpu_memory: int | str = "1GiB"
    loaders: int = 2
    tenants: str | None = None
    database: str | None = None
    selectors: dict[str, dict[str, Any]] = field(default_factory=dict)
    feedback: str | None = None
    backend: str = "auto"
    kv_memory: int | str = "1GiB"
    max_batch: int = 32
    max_waiting: int = 256
    max_length: int | None = None
    timeout: float = 300.0
    host: str = "127.0.0.1"
    port: int = 8000
    drain: float = 30.0
    max_body: int | str = "8MiB"
    docs: bool = True
    log_level: str = "info"

    def __post_init__(self) -> None:
        problems = []
        for name in SIZES:
            value = getattr(self, name)
            try:
                setattr(self, name, convert_file_size_to_int(value))
            except (ValueError, TypeError):
                problems.append(f"{name} must be bytes or a size such as 2GiB, got {value!r}")
        if not self.model:
            problems.append("model is missing: the folder or Hub name of the base model")
        for name, choices in (("backend", BACKENDS), ("dtype", DTYPES), ("quantize", (None, "4bit", "8bit"))):
            if getattr(self, name) not in choices:
                told = ", ".join(str(choice) for choice in choices)
                problems.append(f"{name} must be one of {told}, got {getattr(self, name)!r}")
        for name, least in (("loaders", 1), ("max_batch", 1), ("max_waiting", 0), ("port", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                problems.append(f"{name} must be a whole number from {least}, got {value!r}")
        for name in ("timeout", "drain"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                problems.append(f"{name} must be seconds above 0, got {value!r}")
        if self.max_length is not None and (not isinstance(self.max_length, int) or self.max_length < 2):
            problems.append(f"max_length must be a whole number from 2, got {self.max_length!r}")
        if not isinstance(self.slots, Mapping) or not all(
            isinstance(n, int) for pair in self.slots.items() for n in pair
        ):
            problems.append(f"slots must say how many there are of each rank, as {{8: 16}}, got {self.slots!r}")
        if (self.adapters or self.pinned) and self.manifest:
            problems.append("manifest takes the place of adapters and pinned; give one or the other")
        if (self.adapters or self.pinned or self.manifest) and not self.hub:
            problems.append("adapters come from a library; say which with hub")
        if not isinstance(self.selectors, Mapping) or not all(isinstance(o, Mapping) for o in self.selectors.values()):
            problems.append(f"selectors must map names to options, got {self.selectors!r}")
        raise_all(problems, ConfigError, "these options cannot be used")
        self.slots = dict(self.slots)
        if self.name is None:
            self.name = Path(self.model).name or self.model

    @classmethod
    def read(cls, path: str | Path | None = None, **flags: Any) -> ServeOptions:
        """Return the options of a YAML, with flags that are not None in their place.

        Paths in the file are relative to it.

        Raises:
            ConfigError: the file cannot be read, or a key or value is wrong; all problems at once.
        """
        told: dict[str, Any] = {} if path is None else _file(Path(path))
        known = {one.name for one in fields(cls)}
        unknown = [f"'{key}' is unknown{did_you_mean(str(key), known)}" for key in told if key not in known]
        raise_all(unknown, ConfigError, f"'{path}' holds keys that are no options")
        return cls(**{**told, **{key: value for key, value in flags.items() if value is not None}})

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as in a YAML."""
        return dataclasses.asdict(self)


def _file(path: Path) -> dict[str, Any]:
    try:
        told = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"the options in '{path}' cannot be read: {error}") from error
    if not isinstance(told, dict):
        raise ConfigError(f"'{path}' must hold options as `key: value`, got {type(told).__name__}")
    for key in ("model", "hub", *PATHS):
        value = told.get(key)
        if isinstance(value, str) and value.startswith(("./", "../", "~")):
            told[key] = os.path.normpath(path.parent / Path(value).expanduser())
    return told
