"""Who may use what: Tenant with its rights and limits, and `resolve`, the one way from a name to what it names."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields

from ...errors import ConfigError, raise_all
from ..request import ServeError

MAX_SHOWN = 120  # characters of a name that an error repeats
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_PATTERN = re.compile(r"\*|[A-Za-z0-9][A-Za-z0-9._/-]{0,120}(?:\*|@[1-9][0-9]{0,8})?")


@dataclass(frozen=True)
class Limits:
    """How much a tenant may use; None is no limit.

    Attributes:
        requests_per_minute, tokens_per_minute: in any 60 seconds; tokens are those of prompts and answers together.
        tokens_per_day: from midnight to midnight, UTC.
        concurrent: requests that run or wait at the same time.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None
    concurrent: int | None = None

    def problems(self) -> list[str]:
        """Return what is wrong with the values."""
        return [
            f"limit '{name}' must be a whole number from 1, or absent, got {value!r}"
            for name, value in asdict(self).items()
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**62)
        ]


LIMITS = tuple(one.name for one in fields(Limits))


@dataclass(frozen=True)
class Tenant:
    """A user of the server.

    Attributes:
        name: letters, digits, `.`, `_`, `-`.
        weight: of its share when the server is busy.
        models: adapters and mixtures that it may use: a name with all its versions (`news`), one version (`news@2`),
            all names that begin so (`news-*`), or all (`*`).
        base: whether it may use the base model without any adapter.
        manage: whether it may load, unload and pin what it may use.
        limits: how much it may use.
    """

    name: str
    weight: float = 1.0
    models: frozenset[str] = frozenset()
    base: bool = True
    manage: bool = False
    limits: Limits = field(default_factory=Limits)

    def may(self, name: str) -> bool:
        """Whether the tenant may use the adapter or mixture of this name, given as `name` or `name@version`."""
        if "*" in self.models or name in self.models or name.partition("@")[0] in self.models:
            return True
        return any(name.startswith(pattern[:-1]) for pattern in self.models if pattern.endswith("*"))

    def visible(self, names: Iterable[str]) -> list[str]:
        """Return those of the names that the tenant may use, in the order given."""
        return [name for name in names if self.may(name)]

    def check(self) -> Tenant:
        """Return the tenant; raise ConfigError that lists everything wrong with it."""
        problems = self.limits.problems()
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            problems.append("a name is letters, digits, '.', '_' and '-', 96 at most, the first a letter or digit")
        is_number = isinstance(self.weight, (int, float)) and not isinstance(self.weight, bool)
        if not (is_number and 1e-6 <= self.weight <= 1e6 and math.isfinite(self.weight)):
            problems.append(f"weight must be a number from 1e-6 to 1e6, got {self.weight!r}")
        for pattern in sorted(self.models, key=str):
            if not isinstance(pattern, str) or not _PATTERN.fullmatch(pattern):
                problems.append(
                    f"model {pattern!r} is neither a name, nor name@version, nor the start of names with one * at its "
                    "end, nor * for all"
                )
        problems += [f"{key} must be true or false, got {value!r}"
                     for key, value in (("base", self.base), ("manage", self.manage))
                     if not isinstance(value, bool)]  # fmt: skip
        raise_all(problems, ConfigError, f"tenant {str(self.name)[:MAX_SHOWN]!r}")
        return self


EVERYBODY = Tenant("default", models=frozenset("*"), manage=True)  # who calls a server without tenants


def resolve(
    tenant: Tenant, name: str, known: Mapping[str, str] | Iterable[str], base: str | Collection[str] = ()
) -> str:
    """Return what a name in a request stands for.

    This is the only way from a caller's name to an adapter, so that an adapter which the caller may not use cannot be
    told from one that does not exist. What counts is the right to the adapter itself: an alias gives none.

    Args:
        tenant: who asks.
        name: as in the request.
        known: everything that the server has, other tenants' adapters too: names, or a mapping from names and aliases
            to the names of what they stand for.
        base: the name of the base model, or its names.

    Raises:
        ServeError: 404 `model_not_found`, the same for unknown and for forbidden names.
    """
    if name in ((base,) if isinstance(base, str) else base):
        if tenant.base:
            return name
        raise not_found(name)
    known = known if isinstance(known, (Mapping, frozenset, set)) else frozenset(known)
    if name not in known:
        raise not_found(name)
    target = known[name] if isinstance(known, Mapping) else name
    if not tenant.may(target):
        raise not_found(name)
    return target


def not_found(name: str) -> ServeError:
    """Return the answer about a name that is unknown or forbidden; it depends on the name as the caller wrote it."""
    shown = name if len(name) <= MAX_SHOWN else f"{name[:MAX_SHOWN]}..."
    return ServeError(
        f"the model {shown!r} does not exist or you may not use it; GET /v1/models lists those that you may use",
        status=404,
        code="model_not_found",
        param="model",
    )
