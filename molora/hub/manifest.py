"""Manifest: which adapters a process or another library should have, and how it gets there.

    format: 1
    adapters:
      news: news@2                    what it is called there: which adapter of the library
      law: {adapter: law, digest: 9b1e…}   this content and no other, whatever version is the newest
      poems: {adapter: poems, like: news}  a new expert that is routed like another one at first
      jokes: {adapter: jokes, pin: true}   a server never evicts it

`reconcile` compares the manifest with what there is, says what it would do, and does it: experts of a live mixture are
added, swapped and removed while it runs; versions are copied to, and removed from, another library. Everything is
looked up and checked before the first step; each step is whole or not done at all, so that after a crash the same call
goes on where it stopped.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import ConfigError, MoloraError, did_you_mean, raise_all
from .disk import flush
from .entry import Entry
from .names import Ref, check_name, parse
from .plain_yaml import read_yaml, write_yaml
from .store import Hub
from .targets import HubTarget, MixtureTarget, Step, Target, Wanted

FORMAT = 1
_KEYS = ("adapter", "digest", "like", "pin")


@dataclass(frozen=True)
class Manifest:
    """The adapters that are wanted, by name."""

    wanted: tuple[Wanted, ...] = ()

    @classmethod
    def of(cls, adapters: Mapping[str, Any] | Iterable[str]) -> Manifest:
        """Build a manifest from `{name: adapter, ...}`, where an adapter may be a mapping, or from adapters alone.

        Raises:
            ConfigError: something is wrong with it; all problems at once.
        """
        if not isinstance(adapters, Mapping):
            given = list(adapters)
            adapters = {str(one).partition("@")[0]: one for one in given}
            if len(adapters) != len(given):
                raise ConfigError(f"two adapters of {given} have one name; write {{name: adapter}} for each")
        problems: list[str] = []
        wanted = []
        for name, value in adapters.items():
            try:
                wanted.append(_wanted(name, value))
            except ConfigError as error:
                problems.append(f"{name!r}: {error}")
        raise_all(problems, ConfigError, "this manifest cannot be used")
        return cls(tuple(wanted))

    @classmethod
    def load(cls, path: str | Path) -> Manifest:
        """Read a manifest file; raise ConfigError when it is missing or wrong."""
        try:
            content = read_yaml(Path(path).expanduser().read_bytes().decode("utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"manifest '{path}' cannot be read: {error}") from None
        if not isinstance(content, Mapping) or content.get("format", FORMAT) != FORMAT:
            raise ConfigError(f"manifest '{path}' must be a mapping with format: {FORMAT} and adapters")
        keys = ("format", "adapters")
        unknown = [f"key {key!r}{did_you_mean(str(key), keys)}" for key in content if key not in keys]
        if not isinstance(content.get("adapters") or {}, Mapping):
            unknown.append("adapters must map names to adapters")
        raise_all(unknown, ConfigError, f"manifest '{path}' cannot be used")
        return cls.of(content.get("adapters") or {})

    def save(self, path: str | Path) -> Path:
        """Write the manifest; a kill leaves the old file or the new one."""
        adapters = {}
        for one in self.wanted:
            more = {key: getattr(one, key) for key in ("digest", "like") if getattr(one, key) is not None}
            more |= {"pin": True} if one.pin else {}
            adapters[one.name] = {"adapter": one.adapter, **more} if more else one.adapter
        path = Path(path).expanduser()
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        draft.write_text(write_yaml({"format": FORMAT, "adapters": adapters}), encoding="utf-8")
        flush(draft)
        os.replace(draft, path)
        return path

    def pinned(self, hub: Hub) -> Manifest:
        """Return the manifest with the version and digest that each adapter has now."""
        found = _entries(self, hub)
        return Manifest(tuple(replace(w, adapter=str(e.ref), digest=e.digest) for w, e in found))


@dataclass(frozen=True)
class Plan:
    """What `reconcile` does, or did, in this order."""

    steps: tuple[Step, ...]

    @property
    def changes(self) -> tuple[Step, ...]:
        """The steps that change something."""
        return tuple(step for step in self.steps if step.action != "keep")

    def __str__(self) -> str:
        return "\n".join(f"{step.action:<6}  {step.name}  {step.why}" for step in self.steps) or "nothing to do"


def reconcile(
    manifest: Manifest | str | Path | Mapping[str, Any] | Iterable[str],
    hub: Hub,
    target: Target | Hub | nn.Module,
    *,
    apply: bool = True,
    prune: bool | None = None,
) -> Plan:
    """Bring a mixture or another library to what a manifest says.

    Args:
        manifest: a Manifest, the path of one, or what `Manifest.of` takes.
        hub: the library that adapters come from.
        target: a model whose mixture changes while it runs, another library, or any `Target`.
        apply: False returns the plan and changes nothing.
        prune: remove what the manifest does not name; by default in a mixture, not in a library.

    Returns:
        The plan; when applied, its steps are done.

    Raises:
        ConfigError: an adapter is unknown, its digest is another, or a step is impossible; all problems at once, and
            nothing was changed.
        LoadError: an adapter is damaged or does not fit; the steps before it are done, and the same call goes on.
    """
    if isinstance(manifest, (str, Path)):
        manifest = Manifest.load(manifest)
    elif not isinstance(manifest, Manifest):
        manifest = Manifest.of(manifest)
    if isinstance(target, Hub):
        target = HubTarget(target)
    elif isinstance(target, nn.Module):
        target = MixtureTarget(target)
    plan = _plan(_entries(manifest, hub), target, target.prunes if prune is None else prune)
    if apply:
        for step in plan.changes:
            if step.action == "remove":
                target.drop(step.name)
            else:
                target.put(step)
    return plan


def _plan(found: list[tuple[Wanted, Entry]], target: Target, prune: bool) -> Plan:
    resident = target.resident()
    steps: dict[str, Step] = {}
    problems = []
    for wanted, entry in found:
        name = target.key(wanted, entry)
        if name in steps:
            if steps[name].entry != entry:
                problems.append(f"'{name}' is wanted twice, as {steps[name].entry.ref} and as {entry.ref}")
            continue
        if name not in resident:
            step = Step("add", name, entry, f"is {entry.ref}", wanted.like)
        elif resident[name] == entry.digest:
            step = Step("keep", name, entry, f"is {entry.ref} already")
        else:
            why = "was put there by somebody else" if resident[name] is None else "was another one"
            step = Step("swap", name, entry, f"becomes {entry.ref}, {why}", wanted.like)
        steps[name] = step
    gone = [Step("remove", name, None, "is not wanted") for name in resident if prune and name not in steps]
    order = [*gone, *steps.values()] if target.removes_first else [*steps.values(), *gone]
    problems += [f"'{step.name}': {why}" for step in order if (why := target.why_not(step))]
    raise_all(problems, ConfigError, "the manifest cannot be brought about, and nothing was changed")
    return Plan(tuple(order))


def _entries(manifest: Manifest, hub: Hub) -> list[tuple[Wanted, Entry]]:
    """Return the entry of each adapter that is wanted; raises with all that cannot be had."""
    found, problems = [], []
    for wanted in manifest.wanted:
        try:
            entry = hub.get(wanted.adapter)
        except MoloraError as error:
            problems.append(f"'{wanted.name}': {error}")
            continue
        if wanted.digest not in (None, entry.digest):
            problems.append(
                f"'{wanted.name}': {entry.ref} has digest {entry.digest}, the manifest wants {wanted.digest}"
            )
        found.append((wanted, entry))
    raise_all(problems, ConfigError, f"library '{hub.where}' does not have what the manifest wants")
    return found


def _wanted(name: Any, value: Any) -> Wanted:
    if isinstance(value, (str, Ref)):
        value = {"adapter": str(value)}
    if not isinstance(value, Mapping) or not isinstance(value.get("adapter"), str):
        raise ConfigError(f"write an adapter, or a mapping with adapter and perhaps digest and like, not {value!r:.80}")
    problems = [f"key {key!r}{did_you_mean(str(key), _KEYS)}" for key in value if key not in _KEYS]
    digest, like = value.get("digest"), value.get("like")
    if digest is not None and not (isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)):
        problems.append(f"digest must be a sha256 in hexadecimal, got {digest!r:.80}")
    if like is not None and not isinstance(like, str):
        problems.append(f"like must be the name of an expert, got {like!r:.80}")
    pin = value.get("pin", False)
    if not isinstance(pin, bool):
        problems.append(f"pin must be true or false, got {pin!r:.80}")
    for check in (lambda: check_name(name), lambda: parse(value["adapter"])):
        try:
            check()
        except ConfigError as error:
            problems.append(str(error))
    raise_all(problems, ConfigError, "it is wrong")
    return Wanted(name, value["adapter"], digest, like, pin)
