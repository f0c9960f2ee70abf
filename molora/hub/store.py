"""Hub: a library of adapters in a folder, with versions, aliases, checks and search; or one elsewhere, to be read.

    hub = Hub("adapters_hub")
    hub.add("runs/news", "news", task="topic", description="Sorts headlines into topics.", licence="apache-2.0")
    hub.get("news@1").folder          # a PEFT folder: molora.import_peft, molora.load, PeftModel.from_pretrained
    hub.search(text="headlines")      # see search.py

    Hub("hf://owner/library@3f2a...")  # or s3://bucket/library: read through the cache, see mirror.py

Everything that is added is checked first (verify.py). How it is kept whole on disk is in disk.py.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import ConfigError, LoadError, did_you_mean, raise_all
from .address import is_address
from .card import CARD, AdapterCard, hash_files
from .compare import Difference, compare
from .disk import LOCK_SECONDS, Disk
from .effect import Probe, proof_of_effect
from .entry import Entry, newest
from .index import Index
from .intake import check, fill, leave_out_copies, make_card, with_fingerprint
from .limits import Limits
from .mirror import Mirror
from .names import Ref, check_name, is_version, parse
from .places import alias_problems, place
from .search import Hit, search
from .web import Unreachable, Web


class Hub:
    """A library of adapters in a folder; see disk.py for its layout. Or one elsewhere, which is only read.

    Any number of processes may use one library at the same time.

    Args:
        root: the folder, which is made with the first adapter; or an address: hf://owner/name[@revision][/folder], a
            page of the Hub, s3://bucket/folder and the like. A Hub repository is read at the commit that it had when it
            was opened. The arguments below are for these.
        lock_seconds: how long a change waits for another process that is changing the library.
        revision: branch, tag or commit of a Hub repository.
        storage_options: of the fsspec file system.
        cache_dir: of what is transferred.
        progress: show bars; by default when stderr is a terminal.
        web: the client of the Hub, as `Web(endpoint, token, hosts=...)`; by default with the saved token.

    Raises:
        LoadError: an address cannot be read, and was not before.
        ConfigError: it is no address.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        lock_seconds: float = LOCK_SECONDS,
        revision: str | None = None,
        storage_options: Mapping[str, Any] | None = None,
        cache_dir: str | Path | None = None,
        progress: bool | None = None,
        web: Web | None = None,
    ) -> None:
        if is_address(root):
            how = {"options": storage_options, "cache_dir": cache_dir, "progress": progress}
            self.disk: Disk = Mirror(str(root), web or Web(), revision=revision, lock_seconds=lock_seconds, **how)
        else:
            self.disk = Disk(root, lock_seconds)
        self.index = Index(self.disk)

    @property
    def root(self) -> Path:
        """The folder of the library; of one elsewhere, that of its index."""
        return self.disk.root

    @property
    def where(self) -> str:
        """Where the library is: its folder, or its address with the commit that it is read at."""
        return self.disk.where

    # --- looking ------------------------------------------------------------------------------------------------------

    def list(self, *, all_versions: bool = False) -> list[Entry]:
        """Return the newest version of every adapter, or all versions, in order of their names."""
        entries = self._with_aliases(self.index.entries())
        return entries if all_versions else newest(entries)

    def get(self, ref: str | Ref) -> Entry:
        """Return an adapter by `name` (its newest version), `name@version` or alias.

        Raises:
            ConfigError: there is no such adapter.
            LoadError: it is damaged.
        """
        resolved = self.resolve(ref)
        entries = [entry for entry in self.index.entries(resolved.name) if entry.version == resolved.version]
        if not entries:
            raise ConfigError(f"adapter '{resolved}' was removed by another process")
        raise_all(list(entries[0].problems), LoadError, f"adapter '{resolved}' is damaged")
        self.disk.fetch(resolved)
        if not entries[0].card.files:  # it was elsewhere without a card, and has one now that it is here
            entries = [self.disk.entry(resolved)]
        return self._with_aliases(entries)[0]

    def folder(self, ref: Ref) -> Path:
        """Return the folder of a version (`name@version`); that of a library elsewhere comes into the cache first."""
        return self.disk.fetch(ref)

    def resolve(self, ref: str | Ref) -> Ref:
        """Return name and version of what `name`, `name@version` or an alias stands for; raise ConfigError for none."""
        wanted = parse(ref)
        aliases = self.disk.state().aliases
        if wanted.name in aliases:
            target = aliases[wanted.name]
            if wanted.version is not None and target.version is not None:
                raise ConfigError(f"'{wanted.name}' is an alias of {target}; write {target.name}@{wanted.version}")
            wanted = Ref(target.name, target.version if wanted.version is None else wanted.version)
        versions = self.disk.versions(wanted.name)
        if not versions:
            known = {name for name, _ in self.disk.scan()[0]} | set(aliases)
            raise ConfigError(f"adapter '{wanted.name}' is unknown{did_you_mean(wanted.name, known)}")
        if wanted.version is not None and wanted.version not in versions:
            numbers = ", ".join(map(str, versions))
            raise ConfigError(f"adapter '{wanted.name}' has no version {wanted.version}; it has: {numbers}")
        return Ref(wanted.name, wanted.version or versions[-1])

    def search(
        self,
        text: str | None = None,
        *,
        task: str | None = None,
        base: str | nn.Module | None = None,
        kind: str | None = None,
        like: str | Ref | None = None,
        embedder: Callable[[list[str]], Any] | None = None,
        embedder_name: str | None = None,
        all_versions: bool = False,
        limit: int = 20,
    ) -> list[Hit]:
        """Return adapters, the best first; see `molora.hub.search.search`."""
        return search(
            self,
            text,
            task=task,
            base=base,
            kind=kind,
            like=like,
            embedder=embedder,
            embedder_name=embedder_name,
            all_versions=all_versions,
            limit=limit,
        )

    def aliases(self) -> dict[str, Ref]:
        """Return what each alias stands for."""
        return self.disk.state().aliases

    def diff(self, a: str | Ref, b: str | Ref) -> Difference:
        """Return how two adapters, or two versions of one, differ in config, card and tensors."""
        return compare(self.get(a).folder, self.get(b).folder, str(self.resolve(a)), str(self.resolve(b)))

    def verify(self, ref: str | Ref | None = None, limits: Limits | None = None) -> dict[Ref, list[str]]:
        """Check one adapter, or all versions of all, down to every byte; returns the problems of each.

        The index is built anew when all are checked. What is wrong with the library itself is under Ref("", None).

        Args:
            ref: which one; none for all.
            limits: of `molora.hub.verify`; its defaults when None.
        """
        if ref is not None:
            found = self.resolve(ref)
            return {found: self._check(found, limits)}
        stamps, strays = self.disk.scan()
        result = {found: self._check(found, limits) for found in sorted(stamps)}
        try:
            names = {name for name, _ in stamps}
            for alias, target in self.aliases().items():
                if target.name not in names or (target.version is not None and target not in stamps):
                    strays.append(f"alias '{alias}' stands for {target}, which is not there")
                if alias in names:
                    strays.append(f"alias '{alias}' hides the adapter of that name")
        except LoadError as error:
            strays.append(str(error))
        if stamps and self.disk.can_be_written():
            self.index.rebuild()
        return result | ({Ref(""): strays} if strays else {})

    def _check(self, ref: Ref, limits: Limits | None) -> list[str]:
        try:
            folder = self.disk.fetch(ref, check=False)
        except Unreachable:
            raise
        except LoadError as error:
            return [str(error)]
        return check(folder, limits=limits)

    # --- changing -----------------------------------------------------------------------------------------------------

    def add(
        self,
        source: str | Path | nn.Module,
        name: str,
        card: AdapterCard | Mapping[str, Any] | str | Path | None = None,
        *,
        version: int | None = None,
        alias: str | None = None,
        adapter: str = "default",
        base_model: nn.Module | None = None,
        probes: Sequence[Probe] = (),
        tokenize: Callable[[str], Mapping[str, Any]] | None = None,
        limits: Limits | None = None,
        **fields: Any,
    ) -> Entry:
        """Check an adapter and add it as a new version; a kill at any moment adds all of it or nothing.

        The same files with the same card as the newest version are not added again.

        Args:
            source: the folder of an adapter (a PEFT LoRA or a mixture of molora), or a model with one.
            name: what to call it.
            card: an AdapterCard, its content, or a card.yaml; by default the one in the folder.
            version: its number; by default the next one. A number that was removed is not given again.
            alias: also let this alias stand for the new version.
            adapter: of a model, which of its adapters.
            base_model: which the adapter must fit, and whose fingerprint goes into the card. Weights that PEFT saved
                beside a LoRA and that are this base's own to the last bit are left out.
            probes: inputs on which the adapter must change what `base_model` answers; see `molora.hub.effect`.
            tokenize: for probes that are texts.
            limits: of `molora.hub.verify`.
            fields: of the card, in place of those in `card`: task="topic", licence="apache-2.0", ...

        Returns:
            The new entry, or the newest one when nothing changed.

        Raises:
            LoadError: the adapter cannot be trusted; all problems at once.
            ConfigError: name, version or card cannot be used.
        """
        self.disk.require_local("added")
        check_name(name)
        if alias is not None:
            check_name(alias, "alias")
        if version is not None and not is_version(str(version)):
            raise ConfigError(f"version must be a whole number from 1, got {version!r}")
        with self.disk.draft() as draft:
            own_base = fill(draft, source, adapter)
            ready = make_card(draft, source, card, fields)
            gone = leave_out_copies(draft, base_model) if base_model is not None else []
            if gone:
                ready = ready.replace(files=hash_files(draft))
                warnings.warn(f"left out, since the base has the same: {', '.join(gone)}", stacklevel=2)
            ready = with_fingerprint(ready, draft, base_model if base_model is not None else own_base)
            (draft / CARD).write_text(ready.to_yaml(), encoding="utf-8")
            raise_all(check(draft, base_model, limits), LoadError, f"adapter '{name}' was not added")
            if probes:
                if base_model is None:
                    raise ConfigError("probes need the base model: add(..., base_model=model)")
                proof_of_effect(base_model, draft, probes, tokenize=tokenize, limits=limits).require()
            with self.disk.changing():
                self.disk.tidy()
                state = self.disk.state()
                ref = place(self.disk, draft, name, version, alias, state)
                if ref is None:
                    ref = Ref(name, self.disk.versions(name)[-1])
                else:
                    self.disk.publish(draft, ref)
                if alias is not None:
                    state.aliases[alias] = ref
                    self.disk.write_state(state)
                self.index.sync()
        return self.get(ref)

    def alias(self, alias: str, ref: str | Ref) -> Ref:
        """Let an alias stand for an adapter (always its newest version) or for one version; returns the target."""
        self.disk.require_local("given another name")
        check_name(alias, "alias")
        self.disk.scan()  # tells when there is no library; none is made for this
        with self.disk.changing():
            target, state = parse(ref), self.disk.state()
            resolved = self.resolve(target)
            target = Ref(resolved.name, None if target == Ref(resolved.name) else resolved.version)
            raise_all(alias_problems(alias, {n for n, _ in self.disk.scan()[0]}), ConfigError, "no alias was made")
            state.aliases[alias] = target
            self.disk.write_state(state)
        return target

    def remove(self, ref: str | Ref, *, all_versions: bool = False) -> list[Ref]:
        """Remove an alias, one version (`name@2`), an adapter's only version, or with `all_versions` all of them.

        Returns:
            What was removed. A version's number is never given again.

        Raises:
            ConfigError: there is no such adapter, `name` has several versions, or an alias stands for it.
        """
        self.disk.require_local("removed")
        self.disk.scan()  # tells when there is no library; none is made for this
        with self.disk.changing():
            self.disk.tidy()
            wanted, state = parse(ref), self.disk.state()
            if wanted.version is None and wanted.name in state.aliases:
                del state.aliases[wanted.name]
                self.disk.write_state(state)
                return [wanted]
            resolved = self.resolve(wanted)
            versions = self.disk.versions(resolved.name)
            if wanted.version is None and len(versions) > 1 and not all_versions:
                numbers = ", ".join(map(str, versions))
                raise ConfigError(
                    f"adapter '{wanted}' has versions {numbers}; name one, such as {wanted}@{versions[0]}, or remove "
                    "all of them (--all-versions)"
                )
            doomed = [Ref(resolved.name, v) for v in versions if wanted.version in (None, v)]
            last = len(doomed) == len(versions)
            held = [a for a, t in state.aliases.items() if t in doomed or (last and t.name == resolved.name)]
            raise_all(
                [f"alias '{alias}' stands for {state.aliases[alias]}; remove it first" for alias in sorted(held)],
                ConfigError,
                f"adapter '{wanted}' was not removed",
            )
            for one in doomed:
                self.disk.withdraw(one)
            self.index.sync()
        return doomed

    def _with_aliases(self, entries: list[Entry]) -> list[Entry]:
        by_target = defaultdict(list)
        for alias, target in self.aliases().items():
            by_target[target].append(alias)
        latest = {entry.name: entry.version for entry in entries}
        return [
            replace(e, aliases=tuple(sorted(by_target[e.ref] + by_target[Ref(e.name)] * (latest[e.name] == e.version))))
            for e in entries
        ]
