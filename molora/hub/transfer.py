"""Transfer: files of a source come into a folder of the cache, resumed where they stopped, checked before they count.

<cache>/<source>/files/adapter_model.safetensors          whole, its hash was right
<cache>/<source>/files/adapter_model.safetensors.part     on its way; goes on from here after a kill
<cache>/<source>/promised.json                            sizes and hashes, so that it can be used offline
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import huggingface_hub
from filelock import FileLock, Timeout
from huggingface_hub.utils import tqdm

from ..errors import ConfigError, LoadError, raise_all
from ..headers import shown
from .limits import Limits, size_problems
from .sources import FILES, RemoteFile, Source
from .web import Broken

PART, PROMISED = ".part", "promised.json"
ATTEMPTS = 5  # without a single new byte
PAUSE = 0.5  # seconds before the first of them; doubled each time
Progress = Callable[[int], Any]  # told of every number of new bytes


class Bar:
    """A progress bar over bytes; a `Progress`.

    Args:
        shown: whether to draw it; None for when stderr is a terminal.
        title: before it.
        total: bytes.
    """

    def __init__(self, shown: bool | None, title: str, total: int) -> None:
        hidden = not (sys.stderr.isatty() if shown is None else shown)
        self._bar = tqdm(desc=title, total=total, unit="B", unit_scale=True, disable=hidden, file=sys.stderr)

    def __call__(self, count: int) -> None:
        """Go on by so many bytes."""
        self._bar.update(count)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """Return the folder of downloads: `cache_dir`, or `molora` beside the caches of Hugging Face (HF_HOME)."""
    return Path(cache_dir).expanduser() if cache_dir is not None else Path(huggingface_hub.constants.HF_HOME, "molora")


def place_of(where: str, cache_dir: str | Path | None = None) -> Path:
    """Return the cache folder of a source."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "--", where).strip("-.")[-80:]
    return cache_root(cache_dir) / f"{plain}-{hashlib.sha256(where.encode()).hexdigest()[:16]}"


def download(source: Source, place: Path, *, limits: Limits | None = None, progress: Progress | None = None) -> Path:
    """Bring the files of a source into the cache, and return the folder that holds them and nothing else.

    A kill at any moment costs at most the last block; the next call goes on where it stopped.

    Args:
        source: what to bring.
        place: its folder in the cache; see `place_of`.
        limits: sizes are compared with them before anything is asked for.
        progress: called with the number of bytes of each block, and once with those that are there already.

    Raises:
        LoadError: it is too large, not what was promised, or cannot be had; all files' sizes are checked first.
        ConfigError: another process is downloading the same for long.
    """
    sizes = {name: file.size for name, file in source.files.items()}
    raise_all(size_problems(sizes, limits or Limits()), LoadError, f"'{source.where}' was not downloaded")
    _room_for(place, sum(sizes.values()), source.where)
    folder = place / "files"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(place / ".lock", timeout=600):
            for path in folder.iterdir():
                if path.name.removesuffix(PART) not in source.files:
                    path.unlink()
            for name, file in source.files.items():
                _bring(source, file, folder / name, progress or (lambda count: None))
            draft = place / f"{PROMISED}{PART}"
            draft.write_text(json.dumps({name: asdict(file) for name, file in source.files.items()}), encoding="utf-8")
            os.replace(draft, place / PROMISED)
    except Timeout:
        raise ConfigError(f"another process is downloading '{source.where}' for more than 10 minutes") from None
    return folder


def cached(place: Path) -> Path | None:
    """Return the folder of an earlier complete download whose files still are what was promised; else None."""
    try:
        promised = json.loads((place / PROMISED).read_text(encoding="utf-8"))
        files = [RemoteFile(**entry) for entry in promised.values()]
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    folder = place / "files"
    whole = files and all(file.name in FILES and is_whole(folder / file.name, file) for file in files)
    return folder if whole else None


def _room_for(place: Path, size: int, where: str) -> None:
    near = next(path for path in (place, *place.parents) if path.is_dir())
    free = shutil.disk_usage(near).free
    if size > free:
        raise LoadError(f"'{where}' has {size:,} bytes, there is room for {free:,} at {near}; give another cache_dir=")


def _bring(source: Source, file: RemoteFile, path: Path, progress: Progress) -> None:
    """Download one file, unless it is there."""
    if path.is_file() and is_whole(path, file) and (file.sha256 or file.git):
        progress(file.size)
        return
    part = path.with_name(path.name + PART)
    if part.is_file() and (part.stat().st_size > file.size or not (file.sha256 or file.git)):
        part.unlink()  # of another content; without a hash nobody could tell where two contents were joined
    idle, counted, best = 0, 0, 0
    while True:
        have = part.stat().st_size if part.is_file() else 0
        progress(have - counted)
        counted = have
        if have == file.size and part.is_file():
            break
        trouble = _append(source, file, part, have, progress)
        now = part.stat().st_size
        counted = now
        if now == file.size:
            break
        idle = 0 if now > max(have, best) else idle + 1
        best = max(best, now)
        if idle >= ATTEMPTS:
            raise LoadError(
                f"{file.name} from {source.where} is truncated: {now:,} of {file.size:,} bytes came "
                f"({trouble or 'the answer ended there'}); the same command again goes on from there"
            )
        if idle:
            time.sleep(PAUSE * 2 ** (idle - 1))
    if not is_whole(part, file):
        part.unlink()  # it may be a part of something else; the next call starts anew
        raise LoadError(
            f"{file.name} from {source.where} is not what was promised: its "
            f"{'sha256' if file.sha256 else 'git hash'} is not {file.sha256 or file.git}; nothing of it was kept"
        )
    os.replace(part, path)


def _append(source: Source, file: RemoteFile, part: Path, have: int, progress: Progress) -> str:
    """Add what the source gives from byte `have` on; returns what went wrong."""
    with part.open("ab") as out:
        try:
            for block in source.read(file.name, have):
                if not block and out.tell():  # the source starts over
                    progress(-out.tell())
                    out.truncate(0)
                    out.seek(0)
                if out.tell() + len(block) > file.size:
                    out.truncate(0)
                    raise LoadError(
                        f"{file.name} from {source.where} is longer than the {file.size:,} bytes that were promised; "
                        "nothing of it was kept"
                    )
                out.write(block)
                progress(len(block))
        except Broken as error:
            return shown(error)
        finally:
            out.flush()
            os.fsync(out.fileno())
    return ""


def is_whole(path: Path, file: RemoteFile) -> bool:
    """Whether a file has the size and hash that were promised."""
    try:
        if path.is_symlink() or path.stat().st_size != file.size:
            return False
        digest = hashlib.sha256() if file.sha256 else hashlib.sha1(usedforsecurity=False)
        if not file.sha256:
            digest.update(b"blob %d\0" % file.size)
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except OSError:
        return False
    return digest.hexdigest() == (file.sha256 or file.git or digest.hexdigest())
