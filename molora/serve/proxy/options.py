"""RouteOptions: everything that `molora route` can be told, in one YAML or by flags; flags win.

upstream: http://127.0.0.1:8000
selector: ./selector                 # fitted by `molora prompts fit`, with embedder words or sentence
base: llama                          # what the upstream server calls its base model
tenants: tenants.yaml
pattern: "{tenant}/{adapter}"        # how the upstream server calls an adapter; by default as clients do
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ...errors import ConfigError, raise_all
from ..option_values import (
    count_problems,
    listening_problems,
    read_options,
    second_problems,
    size_problems,
    text_problems,
)

KEY_VARIABLE = "MOLORA_UPSTREAM_KEY"
ADAPTER, TENANT = "{adapter}", "{tenant}"
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")


@dataclass
class RouteOptions:
    """The options of a router. Sizes are bytes, or texts such as `8MiB`; times are seconds.

    Attributes:
        upstream: URL of an OpenAI-compatible server; nothing that a client sends changes it.
        selector: folder of a fitted prompt selector; None: `model: auto` is unknown.
        base: what the upstream server calls its base model, all its names; by default the first model that it lists
            without a parent. With tenants it must be given, since rights hang on it.
        names: adapter -> what the upstream server calls it, where `pattern` does not say.
        pattern: what the upstream server calls the others, from {adapter} and {tenant}.
        key_variable: variable of the environment that holds the upstream server's API key; it may be unset.
        ca: file of certificates that the upstream server's is checked by; None: those of the system.
        tenants: a YAML of tenants; None: everybody may use everything.
        database: SQLAlchemy URL, or a file, of keys and usage; by default a file beside `tenants`.
        feedback: a folder, or folder, policy and frozen, of the bandits that /v1/feedback teaches; None: none.
        answer_tokens: that are reserved from a tenant's limits for an answer without max_tokens.
        timeout: for a whole request.
        connect_timeout: to connect, and to wait for a free connection.
        retries: of connecting; a request of which anything may have been sent is never sent again.
        connections: to the upstream server at the same time.
        max_body: of a request.
        max_answer: of an answer, or of one event of a stream.
        host, port: to listen on; port 0 takes a free one.
        drain: seconds that running answers get when the router is told to stop.
        docs: whether /openapi.json exists.
        open_metrics: whether /metrics needs no admin key where there are tenants.
        log_level: of the router's log.
    """

    upstream: str = ""
    selector: str | None = None
    base: str | list[str] | None = None
    names: dict[str, str] = field(default_factory=dict)
    pattern: str = ADAPTER
    key_variable: str = KEY_VARIABLE
    ca: str | None = None
    tenants: str | None = None
    database: str | None = None
    feedback: bool | str | dict[str, Any] | None = None
    answer_tokens: int = 1024
    timeout: float = 300.0
    connect_timeout: float = 5.0
    retries: int = 2
    connections: int = 200
    max_body: int | str = "8MiB"
    max_answer: int | str = "64MiB"
    host: str = "127.0.0.1"
    port: int = 8080
    drain: float = 30.0
    docs: bool = True
    open_metrics: bool = False
    log_level: str = "info"
    unknown: InitVar[Sequence[str]] = ()  # what is wrong already; told with the rest

    def __post_init__(self, unknown: Sequence[str]) -> None:
        problems = [
            *unknown,
            *size_problems(self, ("max_answer",)),
            *count_problems(self, {"answer_tokens": 1, "retries": 0, "connections": 1}),
            *second_problems(self, ("connect_timeout",)),
            *text_problems(self, ("selector", "ca")),
            *listening_problems(self),
        ]
        problems += _url_problems(self.upstream)
        problems += self._name_problems()
        if not isinstance(self.key_variable, str) or not _VARIABLE.fullmatch(self.key_variable):
            # it may be a key that was written here by mistake, so it is not quoted
            problems.append("key_variable is the name of a variable of the environment, not a key")
        raise_all(problems, ConfigError, "these options cannot be used")
        self.upstream = re.sub(r"(/v1)?/*$", "", self.upstream.rstrip("/"))

    def _name_problems(self) -> list[str]:
        problems = []
        bases = [self.base] if isinstance(self.base, str) else self.base
        if bases is not None and (not isinstance(bases, list) or not all(isinstance(b, str) and b for b in bases)):
            problems.append(f"base must be a name or a list of names, got {self.base!r}")
        elif not bases and (self.tenants is not None or self.database is not None):
            problems.append("base is missing: with tenants, say what the upstream server calls its base model")
        if not isinstance(self.names, Mapping) or not all(
            isinstance(one, str) and one for pair in self.names.items() for one in pair
        ):
            problems.append(f"names must map adapters to the upstream server's names, got {self.names!r}")
        elif len(set(self.names.values())) < len(self.names):
            problems.append("two adapters of names have the same upstream name")
        if not isinstance(self.pattern, str) or self.pattern.count(ADAPTER) != 1 or self.pattern.count(TENANT) > 1:
            problems.append(f"pattern must hold {ADAPTER} once, and may hold {TENANT}, got {self.pattern!r}")
        return problems

    @property
    def bases(self) -> tuple[str, ...]:
        """The names of the base model that are given."""
        return (self.base,) if isinstance(self.base, str) else tuple(self.base or ())

    @classmethod
    def read(cls, path: str | Path | None = None, **flags: Any) -> RouteOptions:
        """Return the options of a YAML, with flags that are not None in their place.

        Paths in the file are relative to it.

        Raises:
            ConfigError: the file cannot be read, or a key or value is wrong; all problems at once.
        """
        return read_options(cls, path, flags, ("selector", "tenants", "database", "ca"))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as in a YAML."""
        return dataclasses.asdict(self)


def _url_problems(url: Any) -> list[str]:
    if not isinstance(url, str) or not url:
        return ["upstream is missing: the URL of an OpenAI-compatible server, such as http://127.0.0.1:8000"]
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        return [f"upstream is no URL: {error}"]
    if "@" in parts.netloc:  # not quoted: it holds a password
        return ["upstream must hold no user or password; the API key comes from the variable key_variable names"]
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return [f"upstream must be http://HOST:PORT or https://HOST, got {url!r}"]
    if parts.query or parts.fragment:
        return [f"upstream must hold no '?' or '#', got {url!r}"]
    return []
