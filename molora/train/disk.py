"""What a training run leaves on the disk beside the adapter, and whole checkpoints told from half-written ones.

    output/
      adapter_config.json, adapter_model.safetensors   the adapter (molora.save)
      tokenizer files                                   as it was used, with its pad token
      labels.json                                       LabelMap, classifiers only
      routing.json                                      routing statistics of the final evaluation
      training.json                                     settings, versions, metrics; written last
      checkpoints/
        run.json                                        what a resumed run must have in common with this one
        checkpoint-200/ ... complete.json               Trainer's files, and the mark that all of them are there

Trainer's own checkpoint files (optimizer, scheduler, random state) are torch files. They are read only by Trainer, on
resume, from this folder, with `weights_only=True`, which builds tensors and plain containers and runs no code.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, LoadError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAINING, LABELS, ROUTING = "training.json", "labels.json", "routing.json"
CHECKPOINTS, RUN, COMPLETE = "checkpoints", "run.json", "complete.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def write_json(path: Path, content: Any) -> None:
    """Write JSON in one step: a reader, or a run after a kill, sees the old file or the new one, never a part."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=1, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON mapping; raise LoadError when it is missing or is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LoadError(f"{path}: no such file; it holds {what}, and training writes it beside the adapter") from None
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(f"{path}: not readable: {error}") from None
    if not isinstance(content, dict):
        raise LoadError(f"{path}: must hold a mapping, got {type(content).__name__}")
    return content


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer's files into `folder`, each in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tokenizer-", dir=folder) as draft:
        tokenizer.save_pretrained(draft)
        for path in sorted(p for p in Path(draft).rglob("*") if p.is_file()):
            target = folder / path.relative_to(draft)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def mark_complete(checkpoint: Path) -> None:
    """Write the mark of a whole checkpoint: the names and sizes of all of its files."""
    files = {str(p.relative_to(checkpoint)): p.stat().st_size for p in sorted(checkpoint.rglob("*")) if p.is_file()}
    files.pop(COMPLETE, None)
    write_json(checkpoint / COMPLETE, {"files": files})


def is_whole(checkpoint: Path) -> bool:
    """Tell whether a checkpoint was written to its end and all of its files still have their sizes."""
    try:
        files = read_json(checkpoint / COMPLETE, "the files of a checkpoint")["files"]
        return bool(files) and all((checkpoint / name).stat().st_size == size for name, size in files.items())
    except (LoadError, KeyError, OSError, AttributeError):
        return False


def checkpoints_in(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of all checkpoints, whole or not, oldest first."""
    found = [(_CHECKPOINT.fullmatch(path.name), path) for path in folder.glob("checkpoint-*") if path.is_dir()]
    return sorted((int(match[1]), path) for match, path in found if match)


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint (None when there is none), and a note for each newer one that is not."""
    notes = []
    for _, path in reversed(checkpoints_in(folder)):
        if is_whole(path):
            return path, notes
        notes.append(f"skipped {path.name}: it was only half written when the run was killed")
    return None, notes


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` whole checkpoints, and the half-written ones that are older than those."""
    whole = [path for _, path in checkpoints_in(folder) if is_whole(path)]
    if len(whole) <= keep:
        return
    oldest = int(whole[-keep].name.rpartition("-")[2])
    for step, path in checkpoints_in(folder):
        if step < oldest:
            (path / COMPLETE).unlink(missing_ok=True)  # first, so that a kill in here leaves no half of a "whole" one
            shutil.rmtree(path, ignore_errors=True)


def check_output(output: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise ConfigError when a run cannot write into this folder; asked early, before a model is loaded."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output '{output}' is a file; give a folder")
    if resume and overwrite:
        raise ConfigError("--resume goes on and --overwrite starts again; give one of them")
    used = [name for name in (TRAINING, "adapter_config.json") if (output / name).exists()]
    used += [path.name for _, path in checkpoints_in(output / CHECKPOINTS)]
    if used and not (resume or overwrite):
        raise ConfigError(
            f"output '{output}' is in use ({used[0]}); go on with --resume, replace it with --overwrite, or choose "
            "another --output"
        )


def begin_run(output: Path, facts: dict[str, Any], *, resume: bool, overwrite: bool) -> tuple[Path | None, list[str]]:
    """Prepare an output folder and find where to go on.

    Args:
        output: the folder of the run.
        facts: what decides the weights: settings and a digest of the data. A resumed run must have the same.
        resume: go on from the newest whole checkpoint, or start when there is none.
        overwrite: delete the checkpoints of an earlier run in this folder.

    Returns:
        (checkpoint to resume from or None, notes for the user).

    Raises:
        ConfigError: the folder is in use, or the run to resume was another one.
    """
    check_output(output, resume=resume, overwrite=overwrite)
    folder = output / CHECKPOINTS
    # what run.json will hold, so that the comparison is not misled by tuples and numbers as keys
    facts = json.loads(json.dumps(facts))
    start, notes = None, []
    if resume:
        start, notes = newest_whole(folder)
        if start is None:
            notes.append("no whole checkpoint to resume from: starting from the beginning")
        else:
            _check_same_run(folder, facts)
            notes.append(f"resuming from {start.name}")
    if start is None:
        shutil.rmtree(folder, ignore_errors=True)
        for name in (TRAINING, ROUTING, LABELS):  # a run that is interrupted must not show those of an old one
            (output / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    if start is None:
        write_json(folder / RUN, facts)
    return start, notes


def _check_same_run(folder: Path, facts: dict[str, Any]) -> None:
    before = read_json(folder / RUN, "what the run was started with")
    differing = [key for key in {**before, **facts} if before.get(key) != facts.get(key)]
    if differing:
        said = "; ".join(f"{key} was {_short(before.get(key))}, is {_short(facts.get(key))}" for key in differing)
        raise ConfigError(
            f"cannot resume, because this is another run: {said}; choose another --output, or --overwrite"
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
