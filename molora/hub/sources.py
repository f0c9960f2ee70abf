"""Sources: where adapters come from. A source lists the files of one adapter and gives their bytes from any place on.

They are a repository of a Hugging Face Hub, or a folder in S3-like storage through fsspec; see address.py.

A Hub repository is pinned to a commit as soon as it is opened, and storage to the hashes in its card.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol
from urllib.parse import quote

import fsspec

from ..errors import ConfigError, LoadError
from ..files import CARD as README
from ..files import CONFIG, GATES, PICKLES, WEIGHTS
from ..headers import shown
from .address import Address
from .card import CARD, MAX_CARD, AdapterCard
from .names import is_version
from .web import Broken, Web

FILES = (CONFIG, WEIGHTS, CARD, README, GATES, "LICENSE", "NOTICE")  # all that is ever transferred
BLOCK = 1 << 20
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class RemoteFile:
    """What a source promises about a file: its size in bytes and, from a Hub, a hash of its content.

    Attributes:
        name: in the adapter's folder.
        size: bytes.
        sha256: of the content.
        git: sha1 of `blob <size>\\0` and the content, as git names small files.
    """

    name: str
    size: int
    sha256: str | None = None
    git: str | None = None


class Source(Protocol):
    """An adapter somewhere else.

    Attributes:
        where: it is, to be read by people.
        revision: what it is pinned to; empty when nothing but the hashes in its card do.
        files: those of FILES that it has, by name.
    """

    where: str
    revision: str
    files: dict[str, RemoteFile]

    def read(self, name: str, start: int) -> Iterator[bytes]:
        """Yield the bytes of a file from `start` on, or an empty block first and then all when it cannot skip."""


def list_repository(web: Web, address: Address, revision: str | None = None) -> tuple[str, dict[str, Any]]:
    """Return the commit of a Hub repository and what the Hub tells about its files by path; raise LoadError."""
    wanted = revision or address.revision or "main"
    url = f"{web.endpoint}/api/models/{address.repo}/revision/{quote(wanted, safe='')}?blobs=true"
    info = web.json(url)
    commit, siblings = (info.get("sha"), info.get("siblings")) if isinstance(info, dict) else (None, None)
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit) or not isinstance(siblings, list):
        raise LoadError(f"{web.endpoint} does not answer as a Hub does about '{address.repo}'")
    if _COMMIT.fullmatch(wanted) and wanted != commit:
        raise LoadError(f"'{address.repo}' was asked for at commit {wanted}, the Hub answers with {commit}")
    return commit, {str(file.get("rfilename")): file for file in siblings if isinstance(file, dict)}


class HubSource:
    """An adapter in a repository of a Hugging Face Hub, at one commit.

    Args:
        web: the client.
        address: of the repository.
        revision: branch, tag or commit, in place of the address's own.
        listed: what `list_repository` has returned, to be taken instead of asking again.
        names: read these files of that very folder, which need be no adapter.

    Raises:
        LoadError: it cannot be read, or holds no adapter.
    """

    def __init__(
        self,
        web: Web,
        address: Address,
        revision: str | None = None,
        *,
        listed: tuple[str, dict[str, Any]] | None = None,
        names: Sequence[str] = (),
    ) -> None:
        self.revision, every = listed or list_repository(web, address, revision)
        self.web, self.repo = web, str(address.repo)
        self.folder = address.folder if names else _adapter_folder(address.folder, every, address.text)
        prefix, wanted = f"{self.folder}/" if self.folder else "", names or FILES
        self.files = {n: _promise(n, every[prefix + n], self.repo) for n in wanted if prefix + n in every}
        self.where = f"hf://{self.repo}@{self.revision}{'/' * bool(self.folder)}{self.folder}"

    def read(self, name: str, start: int) -> Iterator[bytes]:
        """Yield the bytes of a file from `start` on, or an empty block first and then all of them.

        Raises:
            Broken: the connection broke on the way.
            LoadError: the Hub does not give it, or gives another version.
        """
        path = quote(f"{self.folder}/{name}" if self.folder else name)
        promised = self.files[name]
        with self.web.get(f"{self.web.endpoint}/{self.repo}/resolve/{self.revision}/{path}", start) as (answer, told):
            commit, etag = told.get("x-repo-commit"), told.get("x-linked-etag", "").removeprefix("W/").strip('"')
            if commit not in (None, self.revision):
                raise LoadError(f"{name} comes from commit {shown(commit)}, {self.revision} was asked for")
            if promised.sha256 and _SHA256.fullmatch(etag) and etag != promised.sha256:
                raise LoadError(f"{name} is now said to have sha256 {etag}, before it was {promised.sha256}")
            if answer.status_code == 416:
                raise LoadError(
                    f"{name} from {self.where} is truncated: there are no more than {start:,} of the "
                    f"{promised.size:,} bytes promised"
                )
            if start and not _starts_at(answer, start):
                if answer.status_code == 206:
                    raise LoadError(f"{self.web.endpoint} sends another part of {name} than was asked for")
                yield b""
            yield from self.web.blocks(answer)


def _starts_at(answer: Any, start: int) -> bool:
    return answer.status_code == 206 and (answer.headers.get("content-range") or "").startswith(f"bytes {start}-")


def _promise(name: str, file: Mapping[str, Any], repo: str) -> RemoteFile:
    lfs = file.get("lfs") if isinstance(file.get("lfs"), dict) else {}
    size, sha256, git = lfs.get("size", file.get("size")), lfs.get("sha256"), file.get("blobId")
    sha256 = sha256 if isinstance(sha256, str) and _SHA256.fullmatch(sha256) else None
    git = git if sha256 is None and isinstance(git, str) and _COMMIT.fullmatch(git) else None
    if type(size) is not int or size < 0 or (sha256 is None and git is None):
        raise LoadError(f"the Hub tells no size and hash of {name} in '{repo}'")
    return RemoteFile(name, size, sha256, git)


class StorageSource:
    """An adapter in a folder of S3-like storage, through fsspec.

    Args:
        url: of the folder.
        options: of the file system, such as key and secret; see the documentation of s3fs, gcsfs, adlfs.
        names: read these files of that very folder, which need be no adapter.

    Attributes:
        infos: what the file system tells about each file.

    Raises:
        LoadError: it cannot be read, or holds no adapter.
    """

    def __init__(self, url: str, options: Mapping[str, Any] | None = None, *, names: Sequence[str] = ()) -> None:
        self.fs, every = list_storage(url, options)
        folder = "" if names else _adapter_folder("", every, url)
        self.where, self.revision = f"{url}/{folder}".rstrip("/"), ""
        prefix, self._paths, self.files = f"{folder}/" if folder else "", {}, {}
        self.infos: dict[str, Mapping[str, Any]] = {}
        for name in names or FILES:
            info = every.get(prefix + name)
            if info is not None and info.get("islink"):
                raise LoadError(f"{name} in '{url}' is a link; an adapter holds its files itself")
            if info is not None and isinstance(info.get("size"), int):
                self._paths[name], self.infos[name] = info["name"], info
                self.files[name] = RemoteFile(name, info["size"])
        for name, sha256 in self._hashes().items():
            if name in self.files:
                self.files[name] = replace(self.files[name], sha256=sha256)

    def _hashes(self) -> Mapping[str, str]:
        """Return the hashes in the card, which let an interrupted download go on; none when it is damaged."""
        if CARD not in self.files or self.files[CARD].size > MAX_CARD:
            return {}
        try:
            return AdapterCard.from_yaml(b"".join(self.read(CARD, 0)).decode("utf-8")).files
        except (ConfigError, UnicodeDecodeError):
            return {}  # check_folder says what is wrong with it

    def read(self, name: str, start: int) -> Iterator[bytes]:
        """Yield the bytes of a file from `start` on; raise Broken when they stop."""
        try:
            with self.fs.open(self._paths[name], "rb") as file:
                file.seek(start)
                while block := file.read(BLOCK):
                    yield block
        except OSError as error:
            raise Broken(f"{name} cannot be read from {self.where}: {shown(error)}") from error


def list_storage(url: str, options: Mapping[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
    """Return the file system of a URL and what it tells about the files there by path; raise LoadError."""
    fs, root = storage(url, options)
    try:
        found = fs.find(root, maxdepth=3, detail=True)
    except Exception as error:  # each file system has its own
        raise LoadError(f"'{url}' cannot be read: {shown(error)}") from error
    base = fs._strip_protocol(root).strip("/")
    return fs, {path.strip("/").removeprefix(base).strip("/"): info for path, info in found.items()}


def storage(url: str, options: Mapping[str, Any] | None = None) -> tuple[Any, str]:
    """Return the file system of a URL and the path in it; raise ConfigError when it cannot be used."""
    try:
        fs, root = fsspec.core.url_to_fs(url, **(options or {}))
    except ImportError as error:
        raise ConfigError(f"'{url}' needs another package: {error}") from None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"'{url}' cannot be opened: {error}") from None
    return fs, str(root)


def adapter_folders(folder: str, every: Mapping[str, Any]) -> list[str]:
    """Return the folders of the adapters in a folder, of the versions of one adapter the newest."""
    prefix = f"{folder}/" if folder else ""
    homes = [path.removesuffix(CONFIG).rstrip("/") for path in every if path.endswith(f"/{CONFIG}") or path == CONFIG]
    newest: dict[str, str] = {}
    for home in sorted(home for home in homes if f"{home}/".startswith(prefix)):
        above, _, last = home.rpartition("/")
        name = above if is_version(last) else home
        if name not in newest or (is_version(last) and int(last) > int(newest[name].rpartition("/")[2])):
            newest[name] = home
    return list(newest.values())


def _adapter_folder(folder: str, every: Mapping[str, Any], where: str) -> str:
    """Return the folder of an adapter: the one asked for, or the newest version in it."""
    prefix = f"{folder}/" if folder else ""
    inside = [path.removeprefix(prefix) for path in every if path.startswith(prefix)]
    if CONFIG in inside:
        if WEIGHTS not in inside:
            pickles = sorted(p for p in inside if p.startswith("adapter_model.") and p.endswith(PICKLES))
            why = (
                f"only {shown(pickles[0])}, a pickle, which can run any code and is never loaded" if pickles else "none"
            )
            raise LoadError(f"'{where}' has no {WEIGHTS}: {why}; have it saved as safetensors")
        return folder
    homes = sorted(path.removesuffix(f"/{CONFIG}") for path in inside if path.endswith(f"/{CONFIG}"))
    versions: Sequence[str] = [home for home in homes if is_version(home)]
    if versions:
        return prefix + max(versions, key=int)
    if homes:
        shortened = ", ".join(shown(home)[1:-1] for home in homes[:10]) + (", …" if len(homes) > 10 else "")
        raise LoadError(f"'{where}' holds several adapters: {shortened}; name the folder of one")
    raise LoadError(f"'{where}' holds no adapter: there is no {CONFIG}")
