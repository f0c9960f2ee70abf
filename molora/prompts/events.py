"""EventLog: an append-only file of what a bandit chose and what it was told, one JSON object per line.

A kill in the middle of a write loses at most the line that was being written; the rest is read as it was. One process
writes a log at a time.
"""

from __future__ import annotations

import json
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError, LoadError

BLOCK = 65_536  # bytes
KEPT = 10_000  # events, where there is no file


class EventLog:
    """Events in a file; without one, the latest in memory.

    A server runs for months, so a log without a file keeps its latest 10,000 events alone (`kept`), and forgets the
    oldest with each further one. A file keeps them all.

    Args:
        path: of the file; None: in memory only.
        sync: whether every event is on the disk before `append` returns, which also survives a power cut.
        kept: how many events are kept where there is no file.

    Raises:
        LoadError: the file holds something else than events.
        ConfigError: none shall be kept.
    """

    def __init__(self, path: str | Path | None = None, *, sync: bool = False, kept: int = KEPT) -> None:
        if kept < 1:
            raise ConfigError(f"a log keeps at least 1 event, got kept={kept}")
        self.path, self.sync = None if path is None else Path(path).expanduser(), sync
        self._memory: deque[str] = deque(maxlen=kept)  # lines, which take less than what they say
        self._lock = threading.Lock()
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._cut_tail(self.path)

    @staticmethod
    def _cut_tail(path: Path) -> None:
        """Remove a last line that was not finished, so that the next event does not continue it."""
        if not path.exists():
            return
        with path.open("r+b") as file:
            end = file.seek(0, os.SEEK_END)
            while end > 0:
                start = max(0, end - BLOCK)
                file.seek(start)
                last = file.read(end - start).rfind(b"\n")
                if last >= 0:
                    file.truncate(start + last + 1)
                    return
                end = start
            file.truncate(0)

    def append(self, event: Mapping[str, Any]) -> None:
        """Add one event; the oldest goes where there is no file and no room."""
        line = json.dumps(dict(event), separators=(",", ":"), allow_nan=False)
        with self._lock:
            if self.path is None:
                self._memory.append(line)
                return
            with self.path.open("ab") as file:
                file.write(line.encode() + b"\n")
                file.flush()
                if self.sync:
                    os.fsync(file.fileno())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield all events that are kept, in order; raise LoadError for a line that is none."""
        if self.path is None:
            with self._lock:
                lines = list(self._memory)
            yield from map(json.loads, lines)
            return
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    return  # being written now
                try:
                    event = json.loads(line)
                except ValueError:
                    event = None
                if not isinstance(event, dict):
                    raise LoadError(f"line {number} of '{self.path}' is no event of a bandit")
                yield event
