"""A library on disk: which folders it has, and the only ways in which they appear and go.

    <root>/<name>/<version>/     adapter_config.json, adapter_model.safetensors, card.yaml, README.md
    <root>/library.yaml          aliases, and the highest version of each name that was removed
    <root>/.index.sqlite         a cache of the above (index.py), not to be committed
    <root>/.lock                 held by whoever changes the library
    <root>/.draft-*, .trash-*    an adapter on its way in, or out

A version's folder is never changed. It appears by one rename of a draft whose files are on the disk already, and goes
by one rename, so that a kill at any moment leaves a library in which every version is whole or not there. What a kill
leaves behind, a draft whose owner is dead or a trash folder, goes with the next change.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import ConfigError, LoadError
from ..files import CONFIG, WEIGHTS
from .card import CARD
from .entry import Entry, read_entry
from .names import Ref, is_version, parse, why_not_name
from .plain_yaml import read_yaml, write_yaml

STATE, INDEX, LOCK = "library.yaml", ".index.sqlite", ".lock"
DRAFT, TRASH = ".draft-", ".trash-"
IGNORED = f"{INDEX}*\n{LOCK}\n{DRAFT}*\n{TRASH}*\n"
LOCK_SECONDS = 60.0


@dataclass
class State:
    """What the folders do not say.

    Attributes:
        aliases: other names of adapters, or of one version of them.
        removed: the highest version that was removed, by adapter, so that no number is given twice.
    """

    aliases: dict[str, Ref] = field(default_factory=dict)
    removed: dict[str, int] = field(default_factory=dict)


class Disk:
    """The folders of one library.

    Args:
        root: its folder; it is made with the first adapter.
        lock_seconds: how long a change waits for another process that is changing the library.
    """

    def __init__(self, root: str | Path, lock_seconds: float = LOCK_SECONDS) -> None:
        self.root = Path(root).expanduser().absolute()
        self._lock = FileLock(self.root / LOCK, timeout=lock_seconds)  # of this thread; may be taken again inside

    @property
    def where(self) -> str:
        """Where it is, to be read by people."""
        return str(self.root)

    def require_local(self, what: str) -> None:
        """Refuse to change a library that is elsewhere (mirror.py); this one is here."""

    # --- reading ------------------------------------------------------------------------------------------------------

    def entry(self, ref: Ref) -> Entry:
        """Look at a version, without reading a tensor; never raises for what is in it."""
        return read_entry(ref, self.folder(ref))

    def fetch(self, ref: Ref, check: bool = True) -> Path:
        """Return the folder of a version, which is here already."""
        return self.folder(ref)

    def scan(self) -> tuple[dict[Ref, str], list[str]]:
        """Return a stamp of every version, which changes with its files, and what does not belong into a library.

        Raises:
            LoadError: there is no such folder.
        """
        stamps: dict[Ref, str] = {}
        strays: list[str] = []
        for folder in self._folders(self.root):
            problem = why_not_name(folder.name)
            if problem or folder.is_symlink():
                strays.append(f"folder '{folder.name}': {problem or 'it is a link, which a library does not follow'}")
                continue
            for version in self._folders(folder.path):
                if is_version(version.name) and not version.is_symlink():
                    stamps[Ref(folder.name, int(version.name))] = _stamp(version.path)
                else:
                    strays.append(
                        f"folder '{folder.name}/{version.name}': no version, which is a folder called 1, 2, …"
                    )
        return stamps, strays

    def _folders(self, path: str | Path) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(path) as found:
                return sorted((e for e in found if not e.name.startswith(".") and e.is_dir()), key=lambda e: e.name)
        except (FileNotFoundError, NotADirectoryError):
            if path == self.root:
                raise LoadError(
                    f"there is no library at '{self.root}'; molora hub add makes one, or give another --root"
                ) from None
            return []  # removed by another process a moment ago

    def versions(self, name: str) -> list[int]:
        """Return the versions of one adapter in order; empty when there is none."""
        return sorted(int(e.name) for e in self._folders(self.root / name) if is_version(e.name))

    def folder(self, ref: Ref) -> Path:
        """Return where a version is, or would be."""
        return self.root / ref.name / str(ref.version)

    def state(self) -> State:
        """Return the aliases and removed versions.

        Raises:
            LoadError: library.yaml is damaged.
        """
        try:
            text = (self.root / STATE).read_bytes().decode("utf-8")
        except FileNotFoundError:
            return State()
        except UnicodeDecodeError as error:
            raise LoadError(f"'{self.root / STATE}' is damaged: {error}") from None
        return self.read_state(text, str(self.root / STATE))

    def read_state(self, text: str, where: str) -> State:
        """Return what the text of a library.yaml says; raise LoadError when it is damaged."""
        try:
            content = read_yaml(text, STATE) or {}
            if not isinstance(content, Mapping) or set(content) - {"format", "aliases", "removed"}:
                raise ConfigError("it must hold format, aliases and removed, and nothing else")
            aliases, removed = content.get("aliases") or {}, content.get("removed") or {}
            if not isinstance(aliases, Mapping) or not isinstance(removed, Mapping):
                raise ConfigError("aliases and removed must be mappings")
            if any(not isinstance(number, int) or number < 1 for number in removed.values()):
                raise ConfigError("removed must map names to versions")
            return State({str(alias): parse(str(ref)) for alias, ref in aliases.items()}, dict(removed))
        except ConfigError as error:
            raise LoadError(f"'{where}' is damaged: {error}; mend it, or delete it with its aliases") from None

    # --- changing -----------------------------------------------------------------------------------------------------

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Hold the library's lock: nobody else adds, removes or indexes inside the block.

        Raises:
            ConfigError: another process holds it for too long, or the folder cannot be written.
        """
        self._make_root()
        try:
            self._lock.acquire()
        except Timeout:
            raise ConfigError(
                f"the library '{self.root}' is being changed by another process for more than "
                f"{self._lock.timeout:g} s; try again when it is done"
            ) from None
        except OSError as error:
            raise ConfigError(f"the library '{self.root}' cannot be written: {error.strerror}") from None
        try:
            yield
        finally:
            self._lock.release()

    def can_be_written(self) -> bool:
        """Whether this process may change the library."""
        return os.access(self.root, os.W_OK)

    def _make_root(self) -> None:
        if self.root.is_dir():
            return
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            ignore = self.root / ".gitignore"
            if not ignore.exists():
                ignore.write_text(IGNORED, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"no library can be made at '{self.root}': {error.strerror}") from None

    def write_state(self, state: State) -> None:
        """Replace library.yaml as a whole; only inside `changing`."""
        aliases = {alias: str(ref) for alias, ref in sorted(state.aliases.items())}
        content: dict[str, Any] = {"format": 1, "aliases": aliases, "removed": dict(sorted(state.removed.items()))}
        draft = self.root / f"{DRAFT}{secrets.token_hex(8)}.yaml"
        draft.write_text(write_yaml(content), encoding="utf-8")
        flush(draft)
        os.replace(draft, self.root / STATE)
        flush(self.root)

    @contextmanager
    def draft(self) -> Iterator[Path]:
        """Yield an empty folder to fill; what is not published inside the block is deleted.

        A lock beside it says that its owner lives, so that `tidy` of another process leaves it alone, however long a
        transfer into it takes.
        """
        self._make_root()
        path = self.root / f"{DRAFT}{secrets.token_hex(8)}"
        lock = FileLock(f"{path}.lock")
        try:
            lock.acquire()
        except OSError as error:
            raise ConfigError(f"the library '{self.root}' cannot be written: {error.strerror}") from None
        try:
            path.mkdir()
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
            Path(f"{path}.lock").unlink(missing_ok=True)
            lock.release()

    def publish(self, draft: Path, ref: Ref) -> Path:
        """Make a filled draft a version, in one step; only inside `changing`."""
        target = self.folder(ref)
        for file in draft.iterdir():
            flush(file)  # a power cut must not lose what is about to count
        flush(draft)
        target.parent.mkdir(exist_ok=True)
        flush(self.root)
        os.rename(draft, target)
        flush(target.parent)
        return target

    def withdraw(self, ref: Ref) -> None:
        """Take a version out, in one step; only inside `changing`. Its number is not given again."""
        state = self.state()
        state.removed[ref.name] = max(int(ref.version or 0), state.removed.get(ref.name, 0))
        self.write_state(state)
        trash = self.root / f"{TRASH}{secrets.token_hex(8)}"
        os.rename(self.folder(ref), trash)
        flush(self.root)
        shutil.rmtree(trash, ignore_errors=True)
        with suppress(OSError):
            self.folder(ref).parent.rmdir()  # when it was the last one

    def tidy(self) -> None:
        """Delete what killed processes left behind; only inside `changing`."""
        for path in self.root.glob(f"{TRASH}*"):
            shutil.rmtree(path, ignore_errors=True)
        for path in self.root.glob(f"{DRAFT}*.yaml"):
            path.unlink(missing_ok=True)  # written under the lock that is held now
        for path in {self.root / p.name.removesuffix(".lock") for p in self.root.glob(f"{DRAFT}*")}:
            with suppress(Timeout), FileLock(f"{path}.lock", timeout=0):  # its owner would hold it
                shutil.rmtree(path, ignore_errors=True)
                Path(f"{path}.lock").unlink(missing_ok=True)
        for folder in self._folders(self.root):
            with suppress(OSError):
                os.rmdir(folder.path)  # of a first version that did not come; others are not empty


def _stamp(folder: str) -> str:
    parts = []
    for name in ("", CONFIG, WEIGHTS, CARD):
        try:
            found = os.stat(os.path.join(folder, name), follow_symlinks=False)
        except OSError:
            parts.append("-")
            continue
        parts.append(f"{found.st_mtime_ns}" if name == "" else f"{found.st_size}:{found.st_mtime_ns}")
    return " ".join(parts)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():
            return  # Windows opens no folders, and keeps their names by itself
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
