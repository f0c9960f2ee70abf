"""Listing: which adapters a library elsewhere holds and what tells their contents apart, by the names of its files.

Adapters are <name>/<version>/, as a library is on disk; a folder without versions, or the root itself, is version 1.
The last listing of a library is kept beside the cache, for when there is no network (see mirror.py).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import LoadError
from ..files import CONFIG
from .names import Ref, is_version, why_not_name
from .sources import FILES
from .web import Unreachable


@dataclass(frozen=True)
class Listing:
    """What a library elsewhere holds: where, the folder and a content key of each version, and what is no adapter."""

    where: str
    versions: dict[Ref, tuple[str, str]]
    strays: list[str]
    state: str = ""  # the text of its library.yaml


def versions_of(keys: Mapping[str, str], name: str) -> tuple[dict[Ref, tuple[str, str]], list[str]]:
    """Return folder and content key of every version, by path -> key of each file, and what is none."""
    homes = {path.rpartition("/")[0] for path in keys if path.rpartition("/")[2] == CONFIG}
    found, strays = dict[Ref, tuple[str, str]](), list[str]()
    # versions first: a folder of that name beside them, or around them, is no version of its own
    for home in sorted(homes, key=lambda home: (-home.count("/") if home else 1, home)):
        parts = [*home.split("/")] if home else []
        numbered = bool(parts) and is_version(parts[-1])
        own = (parts[:-1] if numbered else parts) or [name]
        ref, problem = Ref(own[0], int(parts[-1]) if numbered else 1), why_not_name(own[0])
        if len(own) > 1:
            problem = "a library holds <name>/<version>/, not folders of folders"
        elif problem is None and ref in found:
            problem = f"'{found[ref][0]}' is {ref} already"
        if problem is not None:
            strays.append(f"folder '{home}': {problem}")
            continue
        prefix = f"{home}/" if home else ""
        found[ref] = home, content_key({file: keys[prefix + file] for file in FILES if prefix + file in keys})
    return found, strays


def content_key(files: Mapping[str, str]) -> str:
    """Return what tells the content of an adapter from any other, by the keys of its files."""
    return hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()


def promised_key(file: Mapping[str, Any]) -> str:
    """Return the hash that the Hub tells for a file."""
    lfs = file.get("lfs") if isinstance(file.get("lfs"), dict) else {}
    return f"{lfs.get('sha256') or file.get('blobId')}"


def told_key(info: Mapping[str, Any]) -> str:
    """Return what a file system tells about the content of a file."""
    marks = ("size", "ETag", "etag", "md5Hash", "content_settings", "LastModified", "last_modified", "mtime", "created")
    return json.dumps([str(info.get(mark)) for mark in marks])


def remember(listing: Listing, note: Path) -> None:
    """Keep a listing in a file, which is replaced as a whole."""
    plain = asdict(listing) | {"versions": [[*ref, *found] for ref, found in listing.versions.items()]}
    note.parent.mkdir(parents=True, exist_ok=True)
    draft = note.with_name(f"{note.name}.{os.getpid()}")
    draft.write_text(json.dumps(plain), encoding="utf-8")
    os.replace(draft, note)


def recall(note: Path, error: Unreachable, root: str) -> Listing:
    """Return the listing that `remember` kept; raise LoadError, with why it is needed, when there is none."""
    try:
        plain = json.loads(note.read_text(encoding="utf-8"))
        versions = {Ref(str(n), int(v)): (str(path), str(key)) for n, v, path, key in plain["versions"]}
        return Listing(str(plain["where"]), versions, [str(s) for s in plain["strays"]], str(plain["state"]))
    except (OSError, ValueError, KeyError, TypeError):
        raise LoadError(f"{error}; and the library '{root}' was not read before, so nothing of it is here") from error
