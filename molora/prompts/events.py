"""EventLog: an append-only file of what a bandit chose and what it was told, one JSON object per line.

A kill in the middle of a write loses at most the line that was being written; the rest is read as it was. One process
writes a log at a time.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import LoadError

BLOCK = 65_536  # bytes


class EventLog:
    """Events in memory, and in a file when there is a path.

    Args:
        path: of the file; None: in memory only.
        sync: whether every event is on the disk before `append` returns, which also survives a power cut.

    Raises:
        LoadError: the file holds something else than events.
    """

    def __init__(self, path: str | Path | None = None, *, sync: bool = False) -> None:
        self.path, self.sync = None if path is None else Path(path).expanduser(), sync
        self._memory: list[dict[str, Any]] = []
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
        """Add one event."""
        line = json.dumps(dict(event), separators=(",", ":"), allow_nan=False)
        with self._lock:
            if self.path is None:
                self._memory.append(json.loads(line))
                return
            with self.path.open("ab") as file:
                file.write(line.encode() + b"\n")
                file.flush()
                if self.sync:
                    os.fsync(file.fileno())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield all events in order; raise LoadError for a line that is none."""
        if self.path is None:
            yield from list(self._memory)
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
