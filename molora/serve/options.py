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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError, raise_all
from .cluster.options import ClusterOptions
from .option_values import (
    choice_problems,
    count_problems,
    listening_problems,
    read_options,
    size_problems,
    text_problems,
    truth_problems,
)

BACKENDS = ("auto", "hf-cb", "hf-simple")
DTYPES = ("auto", "float32", "bfloat16", "float16")
CHOICES = {"backend": BACKENDS, "dtype": DTYPES, "quantize": (None, "4bit", "8bit")}


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
        feedback: whether answers can be rewarded, and bandits learn from it: a folder for their logs, or `{folder: ...,
            policy: thompson, frozen: true}`; true: in memory; None: nobody asks.
        backend: `hf-cb` (continuous batching, paged), `hf-simple` (static batches, any model), or `auto`.
        kv_memory: of keys and values.
        max_batch: requests that run at the same time.
        max_waiting: requests that wait at most; more are answered 429.
        max_length: tokens of prompt and answer together; None: what the model takes.
        timeout: of a request, unless it asks for less.
        share_prefixes: whether tenants may find each other's prompts in the prefix cache, as answers' usage and time
            then tell; for tenants who trust each other and have a long prompt in common.
        host, port: to listen on; port 0 takes a free one.
        drain: seconds that running answers get when the server is told to stop.
        max_body: of a request.
        docs: whether /openapi.json exists.
        open_metrics: whether /metrics, which names tenants and adapters, needs no admin key where there are tenants.
        log_level: of the server's log.
        replicas: of the engine, each with a model of its own; more than one need Ray Serve.
        cluster: how they are run; see `cluster.options.ClusterOptions`.
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
    feedback: bool | str | dict[str, Any] | None = None
    backend: str = "auto"
    kv_memory: int | str = "1GiB"
    max_batch: int = 32
    max_waiting: int = 256
    max_length: int | None = None
    timeout: float = 300.0
    share_prefixes: bool = False
    host: str = "127.0.0.1"
    port: int = 8000
    drain: float = 30.0
    max_body: int | str = "8MiB"
    docs: bool = True
    open_metrics: bool = False
    log_level: str = "info"
    replicas: int = 1
    cluster: dict[str, Any] = field(default_factory=dict)
    unknown: InitVar[Sequence[str]] = ()  # what is wrong already; told with the rest

    def __post_init__(self, unknown: Sequence[str]) -> None:
        problems = list(unknown)
        problems += [*self._of_values(), *self._of_the_library()]
        if type(self.replicas) is int:
            try:
                ClusterOptions.of(self.cluster, self.replicas)
            except ConfigError as error:
                problems.append(str(error))
        raise_all(problems, ConfigError, "these options cannot be used")
        self.slots = dict(self.slots)
        if self.name is None:
            self.name = Path(self.model).name or self.model

    def _of_values(self) -> Iterator[str]:
        """Yield what is wrong with values by themselves."""
        if not self.model or not isinstance(self.model, str):
            yield "model is missing: the folder or Hub name of the base model"
        yield from choice_problems(self, CHOICES)
        yield from size_problems(self, ("kv_memory", "cpu_memory"))
        yield from count_problems(self, {"loaders": 1, "max_batch": 1, "max_waiting": 0, "replicas": 1})
        yield from truth_problems(self, ("share_prefixes",))
        yield from text_problems(self, ("name", "gguf_file", "hub", "manifest"))
        yield from listening_problems(self)
        if self.max_length is not None and (type(self.max_length) is not int or self.max_length < 2):
            yield f"max_length must be a whole number from 2, got {self.max_length!r}"
        if not isinstance(self.slots, Mapping) or not all(
            type(n) is int and n > 0 for pair in self.slots.items() for n in pair
        ):
            yield f"slots must say how many there are of each rank, as {{8: 16}}, got {self.slots!r}"
        if not isinstance(self.selectors, Mapping) or not all(isinstance(o, Mapping) for o in self.selectors.values()):
            yield f"selectors must map names to options, got {self.selectors!r}"

    def _of_the_library(self) -> Iterator[str]:
        """Yield what is wrong with what is to be served."""
        for name in ("adapters", "pinned"):
            value = getattr(self, name)
            if not (value is None and name == "adapters") and not (
                isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value)
            ):
                yield f"{name} must be a list of names, got {value!r}"
        if not (isinstance(self.targets, str) or all(isinstance(one, str) for one in self.targets or [None])):
            yield f"targets must be all-linear, or a list of the ends of names of layers, got {self.targets!r}"
        if (self.adapters or self.pinned) and self.manifest:
            yield "manifest takes the place of adapters and pinned; give one or the other"
        if (self.adapters or self.pinned or self.manifest) and not self.hub:
            yield "adapters come from a library; say which with hub"

    @classmethod
    def read(cls, path: str | Path | None = None, **flags: Any) -> ServeOptions:
        """Return the options of a YAML, with flags that are not None in their place.

        Paths in the file are relative to it.

        Raises:
            ConfigError: the file cannot be read, or a key or value is wrong; all problems at once.
        """
        return read_options(cls, path, flags, ("model", "hub", "tenants", "database", "manifest"))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as in a YAML."""
        return dataclasses.asdict(self)
