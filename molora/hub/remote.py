"""Remote: adapters come from a Hugging Face Hub or from S3-like storage into a library, and go there.

    pull("owner/news-lora", hub)                            the newest commit; its id is in the result, to be pinned
    pull("owner/news-lora@3f2a...", hub, name="news")       this commit
    pull("s3://bucket/library/news", hub)                   the newest version in that folder
    push(hub, "news", "owner/news-lora", private=True)      see push.py

What is pulled is untrusted: see web.py (hosts), transfer.py (sizes, hashes) and verify.py (content). The library gets
all of it, or nothing. Nothing is executed, and no other file than those of sources.FILES is ever transferred.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import ConfigError, LoadError
from .address import Address, parse_address
from .card import read_card
from .entry import Entry
from .limits import Limits
from .push import Pushed, push
from .sources import HubSource, Source, StorageSource, adapter_folders, list_repository, list_storage
from .store import Hub
from .transfer import Bar, cached, download, place_of
from .verify import check_folder
from .web import Unreachable, Web

__all__ = ["Pulled", "Pushed", "adapters_at", "open_source", "pull", "push"]


@dataclass(frozen=True)
class Pulled:
    """What came: the entry in the library, from where, and the commit that pins it (empty for storage)."""

    entry: Entry
    where: str
    revision: str
    offline: bool = False


def pull(
    address: str,
    hub: Hub,
    *,
    name: str | None = None,
    revision: str | None = None,
    alias: str | None = None,
    base: nn.Module | None = None,
    limits: Limits | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
    hosts: Sequence[str] = (),
    storage_options: Mapping[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    digest: str | None = None,
    progress: bool | None = None,
    web: Web | None = None,
) -> Pulled:
    """Bring an adapter into a library, as a new version.

    An interrupted pull goes on where it stopped, and leaves the library as it was. Without a network, what was pulled
    before is taken from the cache, after its hashes were checked again.

    Args:
        address: owner/name[@revision], hf://owner/name[@revision]/folder, a page of the Hub, or s3://bucket/folder, ...
        hub: the library.
        name: what to call it; by default the last part of the address.
        revision: branch, tag or commit of a Hub repository.
        alias: also let this alias stand for it.
        base: the base model, whose layers must fit.
        limits: what it may take; sizes are checked before the download.
        token: of the Hub; None for the saved one, False for none.
        endpoint: of the Hub.
        hosts: more hosts that the Hub may redirect to.
        storage_options: of the fsspec file system.
        cache_dir: of downloads.
        digest: refuse an adapter with another `AdapterCard.digest`; it pins what is in storage.
        progress: show a bar; by default when stderr is a terminal.
        web: a client, in place of token, endpoint and hosts.

    Raises:
        LoadError: it cannot be had, or cannot be trusted; all problems at once.
        ConfigError: address or name cannot be used.
    """
    hub.disk.require_local("pulled into it")
    web = web or Web(endpoint, token, hosts=hosts)
    wanted = parse_address(address, web.endpoint)
    offline = False
    try:
        source = open_source(wanted, web, revision, storage_options)
    except Unreachable as error:
        where, folder = _recall(wanted, web, revision, cache_dir, error)
        offline, commit = True, where.partition("@")[2].partition("/")[0]
    else:
        where, commit = source.where, source.revision
        with Bar(progress, f"pull {wanted.name}", sum(file.size for file in source.files.values())) as bar:
            folder = download(source, _place(web, source.where, cache_dir), limits=limits, progress=bar)
        _remember(wanted, web, revision, where, cache_dir)
    check_folder(folder, base=base, limits=limits).require(f"'{where}' cannot be trusted")
    if digest is not None:
        have = read_card(folder).digest
        if have != digest:
            raise LoadError(f"'{where}' has digest {have}, {digest} was asked for")
    entry = hub.add(folder, name or wanted.name, alias=alias, base_model=base, limits=limits)
    return Pulled(entry, where, commit, offline)


def adapters_at(
    address: str, *, web: Web | None = None, revision: str | None = None, options: Mapping[str, Any] | None = None
) -> list[str]:
    """Return the addresses of all adapters of a library elsewhere, of each the newest version, pinned to its commit.

    A library that was pushed or copied as it is on disk, `<name>/<version>/`, comes back with
    `for one in adapters_at("s3://bucket/library"): pull(one, hub)`.

    Args:
        address: of a repository or folder that holds adapters; see address.py.
        web: the client of the Hub.
        revision: branch, tag or commit of a Hub repository.
        options: of the fsspec file system.

    Raises:
        LoadError: it cannot be read.
        ConfigError: the address cannot be used.
    """
    web = web or Web()
    place = parse_address(address, web.endpoint)
    if place.repo is None:
        found = adapter_folders("", list_storage(place.text, options)[1])
        return [f"{place.text}/{folder}".rstrip("/") for folder in found]
    commit, every = list_repository(web, place, revision)
    return [f"hf://{place.repo}@{commit}/{folder}".rstrip("/") for folder in adapter_folders(place.folder, every)]


def open_source(
    address: Address, web: Web, revision: str | None = None, options: Mapping[str, Any] | None = None
) -> Source:
    """Return the source behind an address; raise LoadError when there is no adapter."""
    if address.repo is not None:
        return HubSource(web, address, revision)
    if revision is not None:
        raise ConfigError(f"'{address.text}' has no revisions; pin its content with digest=")
    return StorageSource(address.text, options)


def _place(web: Web, where: str, cache_dir: str | Path | None) -> Path:
    return place_of(f"{web.endpoint} {where}" if where.startswith("hf://") else where, cache_dir)


def _note(address: Address, web: Web, revision: str | None, cache_dir: str | Path | None) -> Path:
    """Return the file that says what an address stood for when it was last pulled."""
    asked = f"{web.endpoint} {address.repo} {revision or address.revision or 'main'} {address.folder}"
    place = place_of(f"ref {asked}", cache_dir)
    return place.with_name(f"{place.name}.ref")


def _remember(address: Address, web: Web, revision: str | None, where: str, cache_dir: str | Path | None) -> None:
    if address.repo is not None:
        note = _note(address, web, revision, cache_dir)
        draft = note.with_name(f"{note.name}.{os.getpid()}")
        draft.write_text(where, encoding="utf-8")
        os.replace(draft, note)


def _recall(
    address: Address, web: Web, revision: str | None, cache_dir: str | Path | None, error: Unreachable
) -> tuple[str, Path]:
    """Return where the files of an address came from when it was last pulled, and their folder in the cache."""
    try:
        where = _note(address, web, revision, cache_dir).read_text(encoding="utf-8")
    except OSError:
        where = ""
    folder = cached(_place(web, where, cache_dir)) if where else None
    if folder is None:
        raise LoadError(f"{error}; and '{address.text}' is not in the cache of earlier pulls") from error
    return where, folder
