"""Examples of what adapters are asked: from the cards of a library, or from a file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DataError, raise_all
from ..hub.store import Hub

MAX_LINE = 1_000_000


@dataclass(frozen=True)
class Examples:
    """Examples by adapter.

    Attributes:
        texts: name -> what it is asked.
        sources: name -> digest of the adapter, where it is known.
        silent: adapters without examples, which therefore cannot be chosen.
        damaged: adapters that cannot be read.
    """

    texts: dict[str, tuple[str, ...]]
    sources: dict[str, str] = field(default_factory=dict)
    silent: tuple[str, ...] = ()
    damaged: tuple[str, ...] = ()

    def with_more(self, other: Examples) -> Examples:
        """Return these and those of another source; texts of the same adapter are put behind each other."""
        texts = {name: self.texts.get(name, ()) + other.texts.get(name, ()) for name in {**self.texts, **other.texts}}
        silent = tuple(
            name for name in {**dict.fromkeys(self.silent), **dict.fromkeys(other.silent)} if name not in texts
        )
        return Examples(texts, {**self.sources, **other.sources}, silent, self.damaged + other.damaged)


def of_hub(hub: Hub) -> Examples:
    """Return the example prompts in the cards of a library, of the newest version of every adapter."""
    entries = hub.list()
    sound = [entry for entry in entries if not entry.problems]
    given = {entry.name: tuple(text for text in entry.card.prompts if text.strip()) for entry in sound}
    return Examples(
        {name: texts for name, texts in given.items() if texts},
        {entry.name: entry.digest for entry in sound if given[entry.name]},
        tuple(name for name, texts in given.items() if not texts),
        tuple(entry.name for entry in entries if entry.problems),
    )


def of_file(path: str | Path) -> Examples:
    """Return the examples of a .jsonl file whose rows are {"adapter": name, "prompt": text}.

    Raises:
        DataError: the file cannot be read, or rows are something else; all of them at once.
    """
    file = Path(path).expanduser()
    texts: dict[str, tuple[str, ...]] = {}
    problems: list[str] = []
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"examples '{path}' cannot be read: {error.strerror or error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line) if len(line) <= MAX_LINE else None
        except (ValueError, RecursionError):
            row = None
        name, text = (row.get("adapter"), row.get("prompt")) if isinstance(row, dict) else (None, None)
        if isinstance(name, str) and name and isinstance(text, str) and text.strip():
            texts[name] = (*texts.get(name, ()), text)
        elif len(problems) < 20:
            problems.append(f'line {number} is not {{"adapter": name, "prompt": text}}')
    if not texts and not problems:
        problems.append("it holds no rows")
    raise_all(problems, DataError, f"examples '{path}' cannot be used")
    return Examples(texts)
