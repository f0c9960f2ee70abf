"""AdapterCard: what a person and a program have to know about an adapter, as `card.yaml` beside its weights.

    format: 1
    task: sentiment                        what it is for, in a word or two
    base: sentence-transformers/all-MiniLM-L6-v2
    description: Rates film reviews.
    licence: apache-2.0
    authors: [A. Person]
    data: [imdb]                           what it was trained on
    metrics: {accuracy: 0.91}              or by task: {imdb: {accuracy: 0.91}}
    prompts: [This film was a joy.]        examples of what it is asked
    embedding: {embedder: name, values: [...]}    of the description, for search by meaning
    fingerprint: {structure: ..., samples: ...}   of the base, see molora/fingerprint.py
    files: {adapter_model.safetensors: sha256, ...}

Reading is strict: unknown keys, wrong types, repeated keys and YAML anchors are errors, all listed at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError, LoadError, did_you_mean, raise_all
from ..fingerprint import is_well_formed
from .plain_yaml import read_yaml, write_yaml

CARD = "card.yaml"
FORMAT = 1
MAX_CARD = 2_000_000  # bytes
MAX_TEXT = 20_000  # characters of one text
MAX_ITEMS = 1_000
MAX_EMBEDDING = 16_384
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Embedding:
    """A description as a vector, and who made it: vectors of different embedders do not compare."""

    embedder: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class AdapterCard:
    """What is known about an adapter.

    Attributes:
        task: what it is for, in a word or two.
        base: name or path of the base model.
        description: a sentence or more.
        licence: of the adapter, such as an SPDX id.
        authors: who made it.
        data: what it was trained on.
        metrics: numbers by name, or by task and name.
        prompts: examples of its inputs.
        embedding: of the description.
        fingerprint: of the base, as molora/fingerprint.py makes it.
        files: sha256 of every other file of the folder, by name.

    Raises:
        ConfigError: a value is wrong; all of them are listed.
    """

    task: str = ""
    base: str = ""
    description: str = ""
    licence: str = ""
    authors: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    metrics: Mapping[str, Any] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    embedding: Embedding | None = None
    fingerprint: Mapping[str, Any] | None = None
    files: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("authors", "data", "prompts"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, (list, tuple)) else value)
        if isinstance(self.embedding, Mapping):
            object.__setattr__(self, "embedding", _embedding(self.embedding))
        problems = []
        for part in dataclasses.fields(self):
            problems += [f"{part.name} {problem}" for problem in _CHECKS[part.name](getattr(self, part.name))]
        raise_all(problems, ConfigError, "this card cannot be used")

    @property
    def digest(self) -> str:
        """sha256 over names and hashes of the files: the same for the same adapter, whatever its card says."""
        lines = "".join(f"{name}\0{sha}\n" for name, sha in sorted(self.files.items()))
        return hashlib.sha256(lines.encode()).hexdigest()

    def replace(self, **changes: Any) -> AdapterCard:
        """Return a card with other values."""
        unknown = [f"'{key}'{did_you_mean(key, _CHECKS)}" for key in changes if key not in _CHECKS]
        raise_all(unknown, ConfigError, "a card has no such key")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data in the order of the file, without what is empty."""
        plain: dict[str, Any] = {"format": FORMAT}
        for part in dataclasses.fields(self):
            value = getattr(self, part.name)
            if value is None or (not value and part.name != "files"):
                continue
            if isinstance(value, Embedding):
                value = {"embedder": value.embedder, "values": list(value.values)}
            plain[part.name] = _plain(value)
        return plain

    def to_yaml(self) -> str:
        """Return the text of card.yaml."""
        return write_yaml(self.to_dict())

    @classmethod
    def from_dict(cls, content: Any) -> AdapterCard:
        """Build a card from plain data; raise ConfigError with everything that is wrong."""
        if not isinstance(content, Mapping):
            raise ConfigError(f"a card is a mapping of keys, got {type(content).__name__}")
        content = dict(content)
        version = content.pop("format", FORMAT)
        if version != FORMAT or isinstance(version, bool):
            raise ConfigError(f"the card has format {version!r}, this molora reads format {FORMAT}; update molora")
        problems = [f"key {key!r}{did_you_mean(str(key), _CHECKS)}" for key in content if key not in _CHECKS]
        try:
            card = cls(**{key: value for key, value in content.items() if key in _CHECKS})
        except ConfigError as error:
            text = str(error).removeprefix("this card cannot be used: ")
            problems += [line.removeprefix("  - ") for line in text.splitlines() if not line.endswith(" problems")]
        raise_all(problems, ConfigError, "this card cannot be used")
        return card

    @classmethod
    def from_yaml(cls, text: str) -> AdapterCard:
        """Build a card from the text of card.yaml; raise ConfigError with everything that is wrong."""
        return cls.from_dict(read_yaml(text, CARD))


def read_card(folder: Path) -> AdapterCard:
    """Read the card of an adapter folder.

    Raises:
        LoadError: it is missing, too large, unreadable or wrong.
    """
    path = folder / CARD
    try:
        if path.is_symlink() or not path.is_file():
            raise LoadError(f"{CARD} is missing; write one, or add the adapter with: molora hub add")
        if path.stat().st_size > MAX_CARD:
            raise LoadError(f"{CARD} has {path.stat().st_size:,} bytes, {MAX_CARD:,} are allowed")
        return AdapterCard.from_yaml(path.read_bytes().decode("utf-8"))
    except (ConfigError, UnicodeDecodeError, OSError) as error:
        raise LoadError(f"{CARD} cannot be read: {error}") from None


def hash_file(path: Path) -> str:
    """Return the sha256 of a file's content in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_files(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file of a folder but the card, by name in order."""
    return {path.name: hash_file(path) for path in sorted(folder.iterdir()) if path.name != CARD}


# --- checks -----------------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def _text(value: Any) -> list[str]:
    if not isinstance(value, str):
        return [f"must be text, got {value!r:.60}"]
    if len(value) > MAX_TEXT:
        return [f"has {len(value):,} characters, {MAX_TEXT:,} are allowed"]
    odd = sorted({repr(c) for c in value if (not c.isprintable() and c not in "\n\t")})
    return [f"holds characters that cannot be shown: {', '.join(odd[:5])}"] if odd else []


def _texts(value: Any) -> list[str]:
    if not isinstance(value, (list, tuple)):
        return [f"must be a list of texts, got {value!r:.60}"]
    if len(value) > MAX_ITEMS:
        return [f"has {len(value):,} entries, {MAX_ITEMS:,} are allowed"]
    return [f"[{i}] {problem}" for i, one in enumerate(value) for problem in _text(one)]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _metrics(value: Any) -> list[str]:
    if not isinstance(value, Mapping):
        return [f"must map names to numbers, got {value!r:.60}"]
    found = []
    for name, number in value.items():
        inner = number.items() if isinstance(number, Mapping) else [(None, number)]
        found += [f"has the key {name!r:.60}, which is no text"] if not isinstance(name, str) else []
        for key, one in inner:
            where = f"{name!r:.60}" if key is None else f"{name!r:.60}, {key!r:.60}"
            if not _is_number(one) or not isinstance(key, (str, type(None))):
                found.append(f"[{where}] must be a finite number under a text, got {one!r:.60}")
    return found


def _embedding(value: Mapping[str, Any]) -> Any:
    """Return an Embedding, or the value as it is when its keys or values are wrong."""
    if set(value) != {"embedder", "values"} or not isinstance(value["values"], (list, tuple)):
        return value
    return Embedding(value["embedder"], tuple(value["values"]))


def _check_embedding(value: Any) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, Embedding):
        return [f"must be {{embedder: name, values: [numbers]}}, got {value!r:.60}"]
    found = [f"embedder {problem}" for problem in _text(value.embedder)]
    if not value.embedder:
        found.append("embedder must not be empty: vectors of different embedders do not compare")
    if not 1 <= len(value.values) <= MAX_EMBEDDING:
        found.append(f"has {len(value.values):,} values, 1 to {MAX_EMBEDDING:,} are allowed")
    elif not all(_is_number(one) for one in value.values):
        found.append("values must be finite numbers")
    elif not any(value.values):
        found.append("values are all zero, which has no direction")
    return found


def _fingerprint(value: Any) -> list[str]:
    return [] if value is None or is_well_formed(value) else ["is no fingerprint of a base model"]


def _files(value: Any) -> list[str]:
    if not isinstance(value, Mapping):
        return [f"must map file names to sha256, got {value!r:.60}"]
    found = []
    for name, sha in value.items():
        if not isinstance(name, str) or not name or name.startswith(".") or re.search(r"[/\\\x00-\x1f:]", name):
            found.append(f"names {name!r:.80}, which is no plain file name")
        if not isinstance(sha, str) or not _SHA256.fullmatch(sha):
            found.append(f"[{name!r:.80}] must be a sha256 in hexadecimal, got {sha!r:.80}")
    return found


_CHECKS: dict[str, Callable[[Any], list[str]]] = {
    **dict.fromkeys(("task", "base", "description", "licence"), _text),
    **dict.fromkeys(("authors", "data", "prompts"), _texts),
    "metrics": _metrics,
    "embedding": _check_embedding,
    "fingerprint": _fingerprint,
    "files": _files,
}
