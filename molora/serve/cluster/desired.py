"""RemoteStore: stands for the adapter stores of all replicas. What it is told becomes part of the manifest.

The manifest is what all replicas bring themselves to, so a change outlives every process, and a replica that starts
later has it too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from ...errors import ConfigError, LoadError, MoloraError
from ...hub.manifest import Manifest
from ...hub.store import Hub
from ...hub.targets import Wanted
from ..request import ServeError
from ..store.resident import Residence
from ..tenants.tenant import not_found
from .fleet import Fleet
from .remote import called

Wanteds = dict[str, Wanted]


class RemoteSources:
    """What `Service` needs of `Sources`: the library."""

    def __init__(self, where: str | None) -> None:
        self._where = where

    @property
    def hub(self) -> Hub:
        """The library; raises ConfigError when there is none."""
        if self._where is None:
            raise ConfigError("this cluster has no library; start it with one (option hub)")
        return Hub(self._where)


class RemoteStore:
    """What `Service` needs of an AdapterStore.

    Args:
        handle: of the engine deployment.
        fleet: what the replicas tell.
        manifest: the file that all replicas follow; None: what they have cannot change.
        hub: the library.
    """

    def __init__(self, handle: Any, fleet: Fleet, manifest: str | Path | None, hub: str | None = None) -> None:
        self._handle, self._fleet, self.sources = handle, fleet, RemoteSources(hub)
        self._manifest = None if manifest is None else Path(manifest)

    def close(self) -> None:
        """Stop asking the replicas."""
        self._fleet.close()

    def entries(self) -> list[Residence]:
        """Return the adapters that all replicas have."""
        return self._fleet.entries()

    def entry(self, name: str) -> Residence:
        """Return one adapter; raise ServeError when there is none."""
        found = next((one for one in self.entries() if one.name == name), None)
        if found is None:
            raise not_found(name)
        return found

    def kinds(self) -> Mapping[str, str]:
        """Return `lora` or `mixture` for each name."""
        return {one.name: one.kind for one in self.entries()}

    @property
    def names(self) -> frozenset[str]:
        """The names of all adapters."""
        return frozenset(self.kinds())

    def counters(self) -> dict[str, float]:
        """Return what has happened so far on all replicas."""
        return self._fleet.counters()

    def register(self, name: str, source: str | None = None, *, pinned: bool = False) -> Residence:
        """Write an adapter of the library into the manifest, and wait until the replicas have it.

        Raises:
            ConfigError: there is no such adapter in the library, or the name cannot be one.
            LoadError: it is damaged or cannot be served; the manifest is as it was.
            ServeError: there is no manifest, or no replica.
        """
        source = name if source is None else source
        self._check_manifest()
        called(self._handle.check, name, source)  # raises what is wrong with it

        def put(wanted: Wanteds) -> None:
            before = wanted.get(name)
            is_pinned = pinned or (before is not None and before.pin)
            wanted[name] = Manifest.of({name: {"adapter": source, "pin": is_pinned}}).wanted[0]

        self._change(name, put)
        return self.entry(name)

    def pin(self, name: str, pinned: bool = True) -> None:
        """Keep an adapter in its place on every replica, or let it be evicted again."""
        self.entry(name)

        def put(wanted: Wanteds) -> None:
            if name in wanted:
                wanted[name] = replace(wanted[name], pin=pinned)

        self._change(name, put)

    def unregister(self, name: str) -> None:
        """Take an adapter out of the manifest; running requests end with it."""
        self.entry(name)
        self._change(name, lambda wanted: wanted.pop(name, None))

    def _check_manifest(self) -> Path:
        if self._manifest is None:
            raise ServeError(
                "the adapters of this cluster are fixed, since it has no manifest that its replicas follow; its "
                "operator starts it with one (option manifest)",
                status=409,
                code="no_manifest",
            )
        return self._manifest

    def _change(self, name: str, edit: Callable[[Wanteds], object]) -> None:
        """Change the manifest and let all replicas follow; back again when one cannot."""
        path = self._check_manifest()
        with FileLock(f"{path}.lock"):
            before = Manifest.load(path)
            wanted = {one.name: one for one in before.wanted}
            edit(wanted)
            Manifest(tuple(wanted.values())).save(path)
            every = self._fleet.all("reconcile")
            failed = [one for changes in every for one in changes if one.name == name and one.action == "failed"]
            if failed:
                before.save(path)
                with contextlib.suppress(MoloraError):
                    self._fleet.all("reconcile")
        self._fleet.refresh()
        if failed:
            raise LoadError(failed[0].why)
