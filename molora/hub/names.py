"""Names in a library: what an adapter, an alias and a version may be called, and how `name@2` is read.

A name is a folder on every file system, a part of a URL and an argument of a shell, so it is plain ASCII, and two
names never differ by case alone. A version is a whole number from 1; it is given once and never again.
"""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

from ..errors import ConfigError

MAX_NAME = 96
_NAME = re.compile(rf"[A-Za-z][A-Za-z0-9._-]{{0,{MAX_NAME - 1}}}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
# Device names of Windows, which are no folders whatever their ending, and words that commands give a meaning.
RESERVED = frozenset(
    ["con", "prn", "aux", "nul", "latest", "all", "none", "default", "alias", "aliases", "index", "library"]
    + [f"{port}{number}" for port in ("com", "lpt") for number in range(10)]
)


class Ref(NamedTuple):
    """What `name` or `name@version` says; version None means the newest."""

    name: str
    version: int | None = None

    def __str__(self) -> str:
        return self.name if self.version is None else f"{self.name}@{self.version}"


def why_not_name(name: object, what: str = "adapter") -> str | None:
    """Return why this cannot be a name, with one that could; None when it can."""
    if not isinstance(name, str):
        return f"{what} name {name!r} is no text"
    if name.split(".")[0].lower() in RESERVED:
        return f"{what} name '{name}' is reserved; choose another, such as 'my-{name}'"
    if _NAME.fullmatch(name) and ".." not in name and not name.endswith("."):
        return None
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", plain).strip("-")[:MAX_NAME]
    plain = plain if not plain or plain[0].isalpha() else f"a{plain.lstrip('_')}"
    hint = f", such as '{plain}'" if plain and plain.lower() not in RESERVED else ""
    shown = name if len(name) <= MAX_NAME else f"{name[:40]}… ({len(name)} characters)"
    return (
        f"{what} name {shown!r} cannot be used: write a letter, then letters, digits, '.', '_' or '-', "
        f"{MAX_NAME} at most, no '..'{hint}"
    )


def check_name(name: object, what: str = "adapter") -> str:
    """Return the name; raise ConfigError when it cannot be one."""
    problem = why_not_name(name, what)
    if problem:
        raise ConfigError(problem)
    return str(name)


def is_version(text: str) -> bool:
    """Whether a folder's name is a version number, written in the one way it is written."""
    return _VERSION.fullmatch(text) is not None


def parse(ref: str | Ref, what: str = "adapter") -> Ref:
    """Read `name` or `name@version`.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(ref, Ref):
        return Ref(check_name(ref.name, what), ref.version)
    name, at, version = str(ref).partition("@")
    check_name(name, what)
    if at and not is_version(version):
        raise ConfigError(f"'{ref}' names no version: write {name}@1, with a whole number, or {name} for the newest")
    return Ref(name, int(version) if at else None)
