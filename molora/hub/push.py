"""Push: an adapter of a library goes to a Hugging Face Hub or to S3-like storage, and is compared when it is there."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub

from ..errors import ConfigError, LoadError, raise_all
from ..files import CONFIG
from .address import Address, parse_address
from .card import CARD, MAX_CARD, hash_file
from .entry import Entry
from .sources import BLOCK, FILES, HubSource, RemoteFile, storage
from .store import Hub
from .transfer import Bar, Progress
from .web import Unreachable, Web


@dataclass(frozen=True)
class Pushed:
    """What went: the entry in the library, where it is now, its commit (empty for storage), and what was sent."""

    entry: Entry
    where: str
    revision: str
    sent: tuple[str, ...]


def push(
    hub: Hub,
    ref: str,
    target: str,
    *,
    private: bool = False,
    message: str | None = None,
    replace: bool = False,
    token: str | bool | None = None,
    endpoint: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: bool | None = None,
    web: Web | None = None,
) -> Pushed:
    """Send an adapter of a library to a Hub repository or to a folder in storage, and check what is there then.

    Files that are there already are not sent again, so an interrupted push goes on with the same call. On a Hub all
    files come with one commit. In storage the config comes after the weights and the card last: until then it is no
    adapter, or one whose hashes differ.

    Args:
        hub: the library.
        ref: name, name@version or alias.
        target: owner/name, hf://owner/name@branch/folder, or s3://bucket/folder, ...
        private: make a new repository private.
        message: of the commit.
        replace: write over another adapter in storage.
        token, endpoint, storage_options, progress, web: as in `pull`.

    Raises:
        LoadError: the adapter is damaged, or what arrived is not what was sent.
        ConfigError: the target cannot be used.
    """
    entry = hub.get(ref)
    raise_all(hub.verify(entry.ref)[entry.ref], LoadError, f"adapter '{entry.ref}' is damaged and was not sent")
    web = web or Web(endpoint, token)
    address = parse_address(target, web.endpoint)
    files = {path.name: path for path in sorted(entry.folder.iterdir()) if path.name in FILES}
    with Bar(progress, f"push {entry.ref}", sum(path.stat().st_size for path in files.values())) as bar:
        if address.repo is None:
            sent = _push_to_storage(entry, files, address, storage_options, replace, bar)
            return Pushed(entry, address.text, "", sent)
        return _push_to_hub(entry, files, address, web, private, message or f"Add {entry.ref}", bar)


def _push_to_hub(
    entry: Entry, files: Mapping[str, Path], address: Address, web: Web, private: bool, message: str, bar: Progress
) -> Pushed:
    repo, prefix, branch = str(address.repo), f"{address.folder}/" if address.folder else "", address.revision or "main"
    api = huggingface_hub.HfApi(endpoint=web.endpoint, token=web.token)
    try:
        try:
            before = HubSource(web, address, branch).files
        except Unreachable:
            raise
        except LoadError:  # there is no such repository, or no adapter in it yet
            api.create_repo(repo, private=private, exist_ok=True)
            before = {}
        new = {name: path for name, path in files.items() if name not in before or not _is_same(path, before[name])}
        bar(sum(path.stat().st_size for name, path in files.items() if name not in new))
        if new:
            added = [huggingface_hub.CommitOperationAdd(prefix + name, str(path)) for name, path in new.items()]
            api.create_commit(repo, added, commit_message=message, revision=branch)
    except LoadError:
        raise
    except Exception as error:  # huggingface_hub has many: no permission, no network, a conflict, ...
        raise LoadError(
            f"'{entry.ref}' was not sent to '{repo}': {str(error).strip().partition(chr(10))[0]}"
        ) from error
    there = HubSource(web, address, branch)
    wrong = [name for name, path in files.items() if name not in there.files or not _is_same(path, there.files[name])]
    raise_all([f"{name} is not there as it was sent" for name in wrong], LoadError, f"'{there.where}' is not whole")
    bar(sum(path.stat().st_size for path in new.values()))
    return Pushed(entry, there.where, there.revision, tuple(new))


def _is_same(path: Path, there: RemoteFile) -> bool:
    """Whether a local file has the size and hash that a Hub tells."""
    if path.stat().st_size != there.size:
        return False
    if there.sha256 is not None:
        return hash_file(path) == there.sha256
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == there.git


def _push_to_storage(
    entry: Entry,
    files: Mapping[str, Path],
    address: Address,
    options: Mapping[str, Any] | None,
    replace: bool,
    bar: Progress,
) -> tuple[str, ...]:
    make = {"auto_mkdir": True} if address.text.startswith("file://") else {}
    fs, root = storage(address.text, {**make, **(options or {})})
    sent = []
    try:
        there = _read(fs, f"{root}/{CARD}", MAX_CARD)
        mine = files[CARD].read_bytes()
        if there is not None and there != mine:
            if not replace:
                raise ConfigError(
                    f"'{address.text}' holds another adapter, or another version; give another folder, or replace it "
                    "with replace=True (--replace)"
                )
            for name in (CARD, CONFIG):  # first: nobody shall take a mixture of two for an adapter
                if fs.exists(f"{root}/{name}"):
                    fs.rm_file(f"{root}/{name}")
        for name in sorted(files, key=lambda name: (name == CARD, name == CONFIG)):
            path, target = files[name], f"{root}/{name}"
            if _hash_there(fs, target, path.stat().st_size) == hash_file(path):
                bar(path.stat().st_size)
                continue
            with path.open("rb") as source, fs.open(target, "wb") as out:
                while block := source.read(BLOCK):
                    out.write(block)
                    bar(len(block))
            if _hash_there(fs, target, path.stat().st_size) != hash_file(path):
                raise LoadError(f"{name} is not at '{address.text}' as it was sent; push it again")
            sent.append(name)
    except OSError as error:
        raise LoadError(f"'{entry.ref}' was not sent to '{address.text}': {error}") from error
    return tuple(sent)


def _read(fs: Any, path: str, most: int) -> bytes | None:
    """Return the content of a small file in storage; None when it is not there."""
    try:
        with fs.open(path, "rb") as file:
            return bytes(file.read(most + 1))
    except FileNotFoundError:
        return None


def _hash_there(fs: Any, path: str, size: int) -> str | None:
    """Return the sha256 of a file in storage; None when it is not there, or has another size."""
    try:
        if fs.size(path) != size:
            return None
        digest = hashlib.sha256()
        with fs.open(path, "rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
        return digest.hexdigest()
    except FileNotFoundError:
        return None
