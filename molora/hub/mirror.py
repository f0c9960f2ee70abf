"""Mirror: a library elsewhere, in a Hub repository or in storage, read as if it were a folder here.

    Hub("hf://owner/library")              at its newest commit, which this Hub stays at
    Hub("hf://owner/library@3f2a.../lib")  at this commit, from a folder in it
    Hub("s3://bucket/library")

Opening it lists it: nothing else is transferred. What `list` and `search` tell comes from cards, configs and the first
bytes of the weights, each asked for once and kept in an index; an adapter itself comes with `get`, `verify` and `diff`,
and stays in the cache under the hashes of its files, so that it is there for every commit that holds it. Without a
network the last listing (listing.py) and the cache are used, hashes checked again. Nothing is ever written there: see
push.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError, LoadError
from ..files import CONFIG, WEIGHTS, read_config
from .address import Address, parse_address
from .card import CARD, MAX_CARD, AdapterCard
from .disk import LOCK_SECONDS, STATE, Disk, State
from .entry import Entry, read_entry
from .intake import make_card
from .limits import Limits
from .listing import Listing, content_key, promised_key, recall, remember, told_key, versions_of
from .names import Ref
from .sources import HubSource, RemoteFile, Source, StorageSource, list_repository, list_storage
from .transfer import Bar, cached, download, is_whole, place_of
from .verify import check_folder
from .web import Unreachable, Web


class Mirror(Disk):
    """A library elsewhere.

    Args:
        root: its address; see address.py.
        revision: branch, tag or commit of a Hub repository.
        web: the client of the Hub.
        options: of the fsspec file system.
        cache_dir: of what was transferred.
        progress: show bars; by default when stderr is a terminal.
        lock_seconds: how long to wait for another process that is indexing the same.

    Raises:
        LoadError: it cannot be listed, and was not before.
        ConfigError: the address cannot be used.
    """

    def __init__(
        self,
        root: str,
        web: Web,
        *,
        revision: str | None = None,
        options: Mapping[str, Any] | None = None,
        cache_dir: str | Path | None = None,
        progress: bool | None = None,
        lock_seconds: float = LOCK_SECONDS,
    ) -> None:
        self.address = parse_address(root, web.endpoint)
        if revision is not None and self.address.repo is None:
            raise ConfigError(f"'{root}' has no revisions; leave revision= out")
        self.web, self.options, self.cache_dir, self.progress = web, options, cache_dir, progress
        self.offline, self._here = False, dict[Ref, Path]()
        self._listed: tuple[str, dict[str, Any]] | None = None
        note = place_of(f"listing {web.endpoint} {root} {revision}", cache_dir)
        note = note.with_name(f"{note.name}.json")
        try:
            self.listing = self._list(revision)
            remember(self.listing, note)
        except Unreachable as error:
            self.listing, self.offline = recall(note, error, root), True
        key = hashlib.sha256(json.dumps([[*ref, *v] for ref, v in sorted(self.listing.versions.items())]).encode())
        place = place_of(f"library {web.endpoint} {self.listing.where} {key.hexdigest()}", cache_dir)
        place.mkdir(parents=True, exist_ok=True)
        super().__init__(place, lock_seconds)

    @property
    def where(self) -> str:
        """Its address, with the commit that it is read at."""
        return self.listing.where

    def require_local(self, what: str) -> None:
        """Refuse to change it."""
        raise ConfigError(
            f"the library '{self.where}' is elsewhere, and is only read from here, so nothing can be {what}; change a "
            f"library in a folder, and send it there: molora hub push NAME {self.address.text}/NAME/1"
        )

    # --- what there is ------------------------------------------------------------------------------------------------

    def _list(self, revision: str | None) -> Listing:
        address = self.address
        if address.repo is not None:
            commit, every = self._listed = list_repository(self.web, address, revision)
            where = f"hf://{address.repo}@{commit}" + f"/{address.folder}" * bool(address.folder)
            keys = {path: promised_key(file) for path, file in every.items()}
            prefix = f"{address.folder}/" if address.folder else ""
            keys = {path.removeprefix(prefix): key for path, key in keys.items() if path.startswith(prefix)}
        else:
            files = list_storage(address.text, self.options)[1]
            where, keys = address.text, {path: told_key(info) for path, info in files.items()}
        versions, strays = versions_of(keys, address.name)
        if not versions:
            raise LoadError(f"'{where}' holds no adapter: there is no {CONFIG} in it, nor in its folders")
        if STATE not in keys:
            return Listing(where, versions, strays)
        own: Source
        if address.repo is not None:
            own = HubSource(self.web, address, listed=self._listed, names=(STATE,))
        else:
            own = StorageSource(address.text, self.options, names=(STATE,))
        return Listing(where, versions, strays, self._small(own, STATE).decode("utf-8", "replace"))

    def scan(self) -> tuple[dict[Ref, str], list[str]]:
        """Return a key of the content of every version, and what does not belong into a library."""
        return {ref: key for ref, (_, key) in self.listing.versions.items()}, list(self.listing.strays)

    def versions(self, name: str) -> list[int]:
        """Return the versions of one adapter in order; empty when there is none."""
        return sorted(int(ref.version or 0) for ref in self.listing.versions if ref.name == name)

    def state(self) -> State:
        """Return the aliases and removed versions; raise LoadError when its library.yaml is damaged."""
        return self.read_state(self.listing.state, f"{self.where}/{STATE}")

    def folder(self, ref: Ref) -> Path:
        """Return where a version is once it was fetched."""
        return self._place(ref) / "files"

    def _place(self, ref: Ref) -> Path:
        return place_of(f"{ref} {self.listing.versions[ref][1]}", self.cache_dir)

    # --- what is transferred ------------------------------------------------------------------------------------------

    def entry(self, ref: Ref) -> Entry:
        """Return what card, config and the header of the weights say, which is all that is transferred.

        Raises:
            LoadError: they cannot be had.
        """
        folder = self.folder(ref)
        if ref in self._here or (self.offline and cached(self._place(ref)) is not None):
            return read_entry(ref, folder)
        source = self._source(ref)
        with tempfile.TemporaryDirectory() as scratch:
            draft = Path(scratch)
            for name in (CONFIG, CARD):
                if name in source.files:
                    (draft / name).write_bytes(self._small(source, name))
            if WEIGHTS in source.files:
                with (draft / WEIGHTS).open("wb") as file:
                    file.write(_head(source))  # and a hole as long as the rest, so that sizes are right
                    file.truncate(source.files[WEIGHTS].size)
            if CARD not in source.files:
                (draft / CARD).write_text(_least_card(draft).to_yaml(), encoding="utf-8")
            found = read_entry(ref, draft)
        return Entry(**{**found.__dict__, "folder": folder})

    def fetch(self, ref: Ref, check: bool = True) -> Path:
        """Return the folder of a version, which comes into the cache first.

        Args:
            ref: name and version.
            check: refuse what cannot be trusted.

        Raises:
            LoadError: it cannot be had, has changed since the library was opened, or cannot be trusted.
        """
        place = self._place(ref)
        folder = self._here.get(ref) or cached(place)
        if folder is None:
            source = self._source(ref)
            with Bar(self.progress, f"get {ref}", sum(file.size for file in source.files.values())) as bar:
                folder = download(source, place, progress=bar)
        if not (folder / CARD).is_file():
            (folder / CARD).write_text(make_card(folder, folder, None, {}).to_yaml(), encoding="utf-8")
        if check and ref not in self._here:
            check_folder(folder, limits=Limits()).require(f"'{ref}' of '{self.where}' cannot be trusted")
            self._here[ref] = folder
        return folder

    def _source(self, ref: Ref) -> Source:
        path, key = self.listing.versions[ref]
        if self.address.repo is not None:
            pinned = self.listing.where.partition("@")[2].partition("/")[0]
            inside = "/".join(part for part in (self.address.folder, path) if part)
            address = Address(self.address.text, self.address.repo, pinned, inside)
            return HubSource(self.web, address, listed=self._listed)
        source = StorageSource(f"{self.address.text}/{path}".rstrip("/"), self.options)
        if key != content_key({name: told_key(info) for name, info in source.infos.items()}):
            raise LoadError(f"'{ref}' of '{self.where}' has changed since the library was opened; open it again")
        return source

    def _small(self, source: Source, name: str) -> bytes:
        """Return a small file, whose hash is checked where one was promised."""
        promised: RemoteFile = source.files[name]
        if promised.size > MAX_CARD:
            raise LoadError(f"{name} in '{source.where}' has {promised.size:,} bytes, {MAX_CARD:,} are allowed")
        content = b""
        for block in source.read(name, 0):
            content += block
            if len(content) > promised.size:
                break
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, "file")
            path.write_bytes(content)
            if not is_whole(path, promised):
                raise LoadError(f"{name} from '{source.where}' is not what was promised")
        return content


def _head(source: Source) -> bytes:
    """Return the header of the weights with its length, or the little that there is."""
    content = b""
    with contextlib.closing(source.read(WEIGHTS, 0)) as blocks:  # type: ignore[type-var]
        for block in blocks:
            content += block
            length = int.from_bytes(content[:8], "little")
            if len(content) >= 8 and (length > Limits().header or len(content) >= 8 + length):
                return content[: 8 + min(length, Limits().header)]  # of one that is cut `read_header` says: hostile
    return content


def _least_card(folder: Path) -> AdapterCard:
    """Return the card of an adapter that has none: what its config says."""
    try:
        base = read_config(folder / CONFIG).get("base_model_name_or_path")
    except LoadError:
        base = None
    return AdapterCard(base=base if isinstance(base, str) else "")
