"""Targets: what a manifest is brought about in, a live mixture or another library, one step at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from ..control import tuner_of
from .compose import live
from .entry import Entry
from .store import Hub


@dataclass(frozen=True)
class Wanted:
    """One line of a manifest.

    Attributes:
        name: what it is called where it is wanted.
        adapter: `name`, `name@version` or alias in the library.
        digest: sha256 over the files that it must have; None for any.
        like: for a mixture, the expert that a new one is routed like at first.
        pin: for a server, whether it is never evicted.
    """

    name: str
    adapter: str
    digest: str | None = None
    like: str | None = None
    pin: bool = False


@dataclass(frozen=True)
class Step:
    """One thing to do.

    Attributes:
        action: `keep`, `add`, `swap` or `remove`.
        name: of what, in the target.
        entry: of the library; None for `remove`.
        why: in words.
        like: see `Wanted`.
    """

    action: str
    name: str
    entry: Entry | None
    why: str
    like: str | None = None


class Target(Protocol):
    """What a manifest is brought about in: a live mixture, another library, or a cache of your own."""

    prunes: bool  # whether what is not wanted goes by default
    removes_first: bool  # whether room has to be made before something is added

    def key(self, wanted: Wanted, entry: Entry) -> str:
        """Return what an adapter is called there."""

    def resident(self) -> Mapping[str, str | None]:
        """Return the digest of what is there by name; None where it is not known."""

    def why_not(self, step: Step) -> str | None:
        """Return why a step is impossible; None when it is possible."""

    def put(self, step: Step) -> None:
        """Add or swap one adapter."""

    def drop(self, name: str) -> None:
        """Remove one adapter."""


class MixtureTarget:
    """The experts of a live mixture (see compose.py), by name.

    What was put there is remembered with the model, by slot: an expert that somebody else put into another slot, or
    that was there when the model was made, is not known, and is written again.

    Args:
        model: a wrapped model.
        adapter: the name of the mixture.
    """

    prunes, removes_first = True, True

    def __init__(self, model: nn.Module, adapter: str = "default") -> None:
        self.live = live(model, adapter)
        self._known: dict[str, tuple[int, str]] = (
            tuner_of(model).__dict__.setdefault("from_hub", {}).setdefault(adapter, {})
        )

    def key(self, wanted: Wanted, entry: Entry) -> str:
        """Return the expert's name."""
        return wanted.name

    def resident(self) -> dict[str, str | None]:
        """Return the digests of the experts by name."""
        slots = {name: self.live.slot(name) for name in self.live.names}
        known = {name: self._known.get(name) for name in slots}
        return {name: k[1] if (k := known[name]) is not None and k[0] == slots[name] else None for name in slots}

    def why_not(self, step: Step) -> str | None:
        """Return why an adapter cannot become an expert, as far as its kind tells."""
        if step.entry is not None and step.entry.kind != "lora":
            return f"{step.entry.ref} is a {step.entry.kind}, and only LoRAs become experts"
        return None

    def put(self, step: Step) -> None:
        """Add or swap one expert."""
        assert step.entry is not None
        if step.action == "swap":
            slot = self.live.swap(step.name, step.entry)
        else:
            slot = self.live.add(step.name, step.entry, like=step.like)
        self._known[step.name] = (slot, step.entry.digest)

    def drop(self, name: str) -> None:
        """Remove one expert."""
        self.live.remove(name)
        self._known.pop(name, None)


class HubTarget:
    """Another library, whose versions are copies: called `name@version` as they are where they come from."""

    prunes, removes_first = False, False

    def __init__(self, hub: Hub) -> None:
        self.hub = hub

    def key(self, wanted: Wanted, entry: Entry) -> str:
        """Return name and version."""
        return str(entry.ref)

    def resident(self) -> dict[str, str | None]:
        """Return the digests of all versions; of damaged ones None."""
        if not self.hub.root.is_dir():
            return {}
        return {str(e.ref): None if e.problems else e.digest for e in self.hub.list(all_versions=True)}

    def why_not(self, step: Step) -> str | None:
        """Return why a version cannot be copied: there is one of this number with other content."""
        if step.action == "swap":
            return (
                f"library '{self.hub.root}' has other content under this version, and versions never change; remove it"
            )
        return None

    def put(self, step: Step) -> None:
        """Copy one version."""
        assert step.entry is not None
        self.hub.add(step.entry.folder, step.entry.name, version=step.entry.version)

    def drop(self, name: str) -> None:
        """Remove one version."""
        self.hub.remove(name)
