"""The files that a benchmark leaves: what was measured (JSON), what it says (Markdown), and a picture."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def write_files(folder: Path, name: str, run: Mapping[str, Any], page: str, draw: Callable[[Path], None]) -> None:
    """Write NAME.json, NAME.md and NAME.png, each in place of the former one only when it is whole.

    Args:
        folder: where to; made when it is not there.
        name: of the files.
        run: what was measured.
        page: the Markdown.
        draw: writes the picture to a path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for ending, content in (("json", json.dumps(run, indent=1) + "\n"), ("md", page)):
        draft = folder / f".{name}.tmp.{ending}"
        draft.write_text(content, encoding="utf-8")
        os.replace(draft, folder / f"{name}.{ending}")
    draft = folder / f".{name}.tmp.png"
    draw(draft)
    os.replace(draft, folder / f"{name}.png")
