"""Where in a library a new adapter goes: which version it becomes, and which names it may not take."""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError, LoadError, raise_all
from ..files import look
from .card import read_card
from .disk import Disk, State
from .names import Ref


def place(disk: Disk, draft: Path, name: str, version: int | None, alias: str | None, state: State) -> Ref | None:
    """Return which version a draft becomes, None when it is the newest one already; the lock is held."""
    names = {found for found, _ in disk.scan()[0]}
    segments = {part for tensor in look(draft).tensors for part in tensor.split(".")}
    problems = [f"'{name}' is an alias already; choose another name"] * (name in state.aliases)
    problems += [
        f"'{name}' differs from adapter '{other}' by case alone"
        for other in sorted(names)
        if other != name and other.lower() == name.lower()
    ]
    if name in segments:
        problems.append(
            f"'{name}' is a part of the adapter's tensor names, and PEFT would mix them up; choose another, such "
            f"as '{name}-1'"
        )
    problems += alias_problems(alias, names | {name})
    raise_all(problems, ConfigError, f"adapter '{name}' was not added")
    versions, gone = disk.versions(name), state.removed.get(name, 0)
    if versions and version in (None, versions[-1]) and _same(draft, disk.folder(Ref(name, versions[-1]))):
        return None
    if version in versions:
        raise ConfigError(f"adapter '{name}' has a version {version} already, and versions never change; leave it out")
    if version is not None and version <= gone:
        raise ConfigError(f"version {version} of '{name}' was removed, and no number is given twice; leave it out")
    return Ref(name, version or max([*versions, gone], default=0) + 1)


def alias_problems(alias: str | None, names: set[str]) -> list[str]:
    """Return why an alias cannot be used beside these names of adapters; empty when it can, or is None."""
    taken = [name for name in names if alias is not None and name.lower() == alias.lower()]
    return [f"alias '{alias}' is the name of an adapter; choose another" for _ in taken]


def _same(draft: Path, version: Path) -> bool:
    try:
        return read_card(draft) == read_card(version)
    except LoadError:
        return False
