"""What an adapter store is told to serve: Sources finds what a name stands for, `reconcile` follows a manifest."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ConfigError, MoloraError, did_you_mean
from ...hub.entry import Entry, newest
from ...hub.limits import Limits
from ...hub.manifest import Manifest
from ...hub.names import Ref, parse
from ...hub.store import Hub
from ...hub.targets import Wanted
from .loading import FolderSource, HeldSource, Source, stamp_of_entry
from .slots import Slots

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/@-]{0,127}")


class Sources:
    """Turns what users name into sources of adapters.

    Args:
        hub: the library; None for no library.
        slots: what adapters must fit.
        base: the fingerprint of the base model.
        limits: what an adapter from disk may take.
        cpu_bytes: what one may take in memory.
    """

    def __init__(self, hub: Hub | None, slots: Slots, base: Mapping[str, Any], limits: Limits, cpu_bytes: int) -> None:
        self._hub, self._slots, self._base, self._limits = hub, slots, base, limits
        self._cpu_bytes = cpu_bytes

    @property
    def hub(self) -> Hub:
        """The library; raises ConfigError when there is none."""
        if self._hub is None:
            raise ConfigError("this store has no library; make it with hub=, or register folders and tensors")
        return self._hub

    def find(self, name: str, source: Any) -> Source:
        """Return where an adapter comes from; see `AdapterStore.register`."""
        if not isinstance(name, str) or not _NAME.fullmatch(name) or re.search(r"\.\.|//|/$", name):
            raise ConfigError(
                f"an adapter cannot be served as {name!r:.160}: write a letter or digit, then letters, digits and "
                "'._-/@', 128 at most, no '..'"
            )
        found = self._source(name if source is None else source)
        if found.header.bytes > self._cpu_bytes:
            raise ConfigError(
                f"adapter '{name}' has {found.header.bytes:,} bytes, and adapters may take {self._cpu_bytes:,} in CPU "
                "memory; serve with larger cpu_bytes"
            )
        return found

    def _source(self, source: Any) -> Source:
        known = (self._slots, self._base, self._limits)
        if isinstance(source, str) and self._hub is not None:
            entry = self._hub.get(source)
            label, stamp = str(entry.ref), stamp_of_entry(entry)
            return FolderSource(entry.folder, *known, label=label, stamp=stamp, parent=entry.card.base)
        if isinstance(source, Entry):
            return FolderSource(source.folder, *known, label=str(source.ref), entry=source)
        if isinstance(source, (str, Path)):
            return FolderSource(Path(source), *known, label=Path(source).name)
        if isinstance(source, tuple) and len(source) == 2:
            return HeldSource(*source, self._slots)
        if hasattr(source, "header") and hasattr(source, "load"):
            return source
        raise ConfigError(
            "an adapter is a name in the library, a folder (Path), (config, tensors) or a source; got "
            f"{type(source).__name__}"
        )


@dataclass(frozen=True)
class Change:
    """What `reconcile` did for one name.

    Attributes:
        name: of the adapter in the store.
        action: `add`, `swap`, `remove`, `keep`, `pin`, `unpin`; or `failed`, and then nothing was changed.
        why: in words.
    """

    name: str
    action: str
    why: str = ""


def reconcile(store: Any, manifest: Manifest | str | Path | Mapping[str, Any] | Iterable[str]) -> list[Change]:
    """Bring an AdapterStore to what a manifest says; see its method of this name."""
    if isinstance(manifest, (str, Path)):
        manifest = Manifest.load(manifest)
    elif not isinstance(manifest, Manifest):
        manifest = Manifest.of(manifest)
    look_up = _resolver(store.sources.hub)
    wanted = {one.name for one in manifest.wanted}
    changes = []
    for name in sorted(store.names - wanted):  # first, so that there is room
        store.unregister(name)
        changes.append(Change(name, "remove", "is not wanted"))
    pins = {one.name for one in manifest.wanted if one.pin}
    for entry in store.entries():
        if entry.pinned and entry.name not in pins:
            store.pin(entry.name, False)
            changes.append(Change(entry.name, "unpin", "is not wanted pinned"))
    for one in manifest.wanted:
        try:
            changes.append(_bring(store, one, look_up(one.adapter)))
            if one.pin and not store.entry(one.name).pinned:
                store.pin(one.name)
                changes.append(Change(one.name, "pin", "is wanted pinned"))
        except MoloraError as error:
            changes.append(Change(one.name, "failed", str(error)))
    return changes


def _bring(store: Any, wanted: Wanted, entry: Entry) -> Change:
    if wanted.digest not in (None, entry.digest):
        raise ConfigError(f"{entry.ref} has digest {entry.digest}, the manifest wants {wanted.digest}")
    before = store.stamp(wanted.name)
    if before == stamp_of_entry(entry):
        return Change(wanted.name, "keep", f"is {entry.ref} already")
    store.register(wanted.name, entry)
    return Change(wanted.name, "add" if before is None else "swap", f"is {entry.ref} now")


def _resolver(hub: Hub) -> Callable[[str], Entry]:
    """Return what looks adapters of a library up as `Hub.get` does, without reading its folders for each."""
    every = hub.list(all_versions=True)
    by_ref = {entry.ref: entry for entry in every}
    latest = {entry.name: entry for entry in newest(every)}
    aliases = hub.aliases()

    def look_up(text: str) -> Entry:
        wanted = parse(text)
        if wanted.name in aliases:
            target = aliases[wanted.name]
            wanted = Ref(target.name, target.version if wanted.version is None else wanted.version)
        entry = latest.get(wanted.name) if wanted.version is None else by_ref.get(wanted)
        if entry is None:
            raise ConfigError(f"adapter '{text}' is unknown{did_you_mean(text, [*latest, *aliases])}")
        return entry

    return look_up
