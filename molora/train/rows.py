"""Rows of training data from files and Hub datasets, checked one by one.

A row is a dict of one of three kinds:

    classification   {"text": str, "label": str} and optionally "text_pair": str
    generation       {"prompt": str, "answer": str}
    lm               {"text": str}

and carries `"where"`, such as "news.csv line 12", so that a problem found much later can name its origin.
Nothing here imports torch.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from molora.errors import DataError, did_you_mean

Row = dict[str, str]

NEEDED = {"classification": ("text", "label"), "generation": ("prompt", "answer"), "lm": ("text",)}
OPTIONAL = {"classification": ("text_pair",), "generation": (), "lm": ()}
FIELDS = ("text", "text_pair", "label", "prompt", "answer")

# hf:name[:config][:split]; a split may hold a slice with a colon, as in train[:1000].
_HUB = re.compile(r"hf:(?P<name>[^:\[\]]+)(:(?P<config>[^:\[\]]*))??(:(?P<split>[^:\[\]]+(\[.*\])?))?")
_SPLITS = {"train", "training", "validation", "valid", "val", "dev", "test"}


def read_rows(source: str, *, fields: dict[str, str] | None = None, kind: str | None = None) -> list[Row]:
    """Read and check all rows of one data set.

    Args:
        source: a `.jsonl`, `.json` (a list, or one object a line) or `.csv` file in UTF-8, or
            `hf:name[:config][:split]` for a dataset of the Hugging Face Hub. A single part after the name is
            a split when it reads like one (train, validation[:100], ...) and a config otherwise; the default
            split is train.
        fields: where the columns have other names, ours to theirs: `{"text": "headline"}`.
        kind: "classification", "generation" or "lm"; by default the columns of the first row decide, with
            prompt + answer before text + label before text alone.

    Returns:
        the rows in order, other columns left out. Labels are strings: 1 becomes "1", true becomes "true".

    Raises:
        DataError: naming the file and line: unreadable or empty file, bad JSON, ragged CSV, a missing field,
            a value that is not a string, rows of different kinds, an unknown option.
    """
    fields = fields or {}
    for name in fields:
        if name not in FIELDS:
            raise DataError(f"fields: '{name}' is no field of molora{did_you_mean(name, FIELDS)}")
    if kind is not None and kind not in NEEDED:
        raise DataError(f"kind of data '{kind}' is unknown{did_you_mean(kind, NEEDED)}")

    located = _hub_rows(source) if source.startswith("hf:") else _file_rows(Path(source))
    rows: list[Row] = []
    names: tuple[str, ...] = ()
    for where, raw in located:
        if not isinstance(raw, dict):
            raise DataError(f'{where}: a row must be an object such as {{"text": ...}}, not {_show(raw)}')
        row = {ours: raw[fields.get(ours, ours)] for ours in FIELDS if fields.get(ours, ours) in raw}
        if not rows:
            absent = [f"'{name}' ('{column}')" for name, column in fields.items() if name not in row]
            if absent:
                columns = _list(raw)
                raise DataError(f"{where}: no column for field {', '.join(absent)}; columns here: {columns}")
            kind = kind or _guess_kind(row, raw, where)
            names = (*NEEDED[kind], *(name for name in OPTIONAL[kind] if name in row))
        rows.append(_check(row, raw, names, kind, where, fields))
    if not rows:
        raise DataError(f"{source}: no rows; a data set needs at least one")
    return rows


# ---- one row ----


def _guess_kind(row: dict[str, Any], raw: dict[str, Any], where: str) -> str:
    """The first kind whose fields the first row has."""
    for kind in ("generation", "classification", "lm"):
        if all(name in row for name in NEEDED[kind]):
            return kind
    raise DataError(
        f"{where}: columns {_list(raw)} are no kind of data that molora knows; needed: text + label, "
        "prompt + answer, or text alone; map other names with fields such as text=headline"
    )


def _check(
    row: dict[str, Any],
    raw: dict[str, Any],
    names: tuple[str, ...],
    kind: str,
    where: str,
    fields: dict[str, str],
) -> Row:
    """The row with exactly the fields `names`, all of them strings, and where it came from."""
    kept: Row = {}
    for name in names:
        shown = f"'{name}'" if name not in fields else f"'{name}' (column '{fields[name]}')"
        if name not in row:
            raise DataError(
                f"{where}: field {shown} is missing; this is {kind} data; columns here: {_list(raw)}; "
                f"map other names with fields such as {name}=their_name"
            )
        value = row[name]
        if name == "label":
            value = _label(value, where)
        elif not isinstance(value, str):
            raise DataError(f"{where}: field {shown} must be a string, not {_show(value)}")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise DataError(f"{where}: field {shown} is not valid Unicode (half a surrogate pair)") from None
        kept[name] = value
    for name in ("label", "text_pair"):
        if name in row and name not in names and kind == "classification":
            raise DataError(f"{where}: field '{name}' is here but not in the first row; give it in all or none")
    kept["where"] = where
    return kept


def _label(value: Any, where: str) -> str:
    """A label as a string: true -> "true" as JSON writes it, 1 -> "1"."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"{where}: field 'label' must be a string or a whole number, not {_show(value)}")
    if not value.strip():
        raise DataError(f"{where}: field 'label' is empty; every row needs a label")
    return value


def _show(value: Any) -> str:
    """A value in an error: its JSON type and a short look at it."""
    if value is None:
        return "null"
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    text = repr(value)
    return f"{names.get(type(value), type(value).__name__)} {text[:40] + '...' if len(text) > 40 else text}"


def _list(raw: dict[str, Any]) -> str:
    """The column names of a row, for an error."""
    return ", ".join(f"'{name}'" for name in raw) or "(none)"


# ---- files ----


def _file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, raw row) for each row of a local file."""
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv}
    if path.suffix.lower() not in readers:
        ending = f"'{path.suffix}' files" if path.suffix else "a name without an ending"
        raise DataError(f"{path}: cannot read {ending}; use .jsonl, .json, .csv, or hf:<name>")
    return readers[path.suffix.lower()](path, _read_text(path))


def _read_text(path: Path) -> str:
    """The whole file as text; a byte order mark is dropped."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        folder = path.parent
        beside = [p.name for p in folder.iterdir() if p.is_file()] if folder.is_dir() else []
        close = did_you_mean(path.name, beside).partition("; known")[0].partition(" known:")[0]
        raise DataError(f"{path}: no such file{close.rstrip(';')}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        byte = data[error.start]
        raise DataError(f"{path} line {line}: not UTF-8 (byte 0x{byte:02x}); save the file as UTF-8") from None
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    return text


def _jsonl(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """One JSON object a line; blank lines are skipped."""
    # Not splitlines(): U+2028 and others may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path} line {number}"
            yield where, _parse(line, where)


def _json(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """A list of objects; or, as many tools write it, one object a line."""
    start = text.lstrip()[0]
    if start == "{":
        yield from _jsonl(path, text)
        return
    items = _parse(text, str(path))
    if not isinstance(items, list):
        raise DataError(f"{path}: must hold a list of rows, not {_show(items)}")
    for number, item in enumerate(items, start=1):
        yield f"{path} row {number}", item


def _parse(text: str, where: str) -> Any:
    """JSON, or an error that says where it breaks."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise DataError(f"{where}: bad JSON at {place}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: bad JSON: {error}") from None


def _csv(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Comma-separated with a header line; quoted cells may hold commas and line ends."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    line = 1
    try:
        for cells in reader:
            where, line = f"{path} line {line}", reader.line_num + 1
            if not cells:
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                if len(set(header)) < len(header):
                    raise DataError(f"{where}: the header names a column twice: {', '.join(header)}")
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{where}: {len(cells)} cells where the header has {len(header)} ({', '.join(header)}); "
                    "put cells that hold commas or line ends in double quotes"
                )
            yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{path} line {line}: bad CSV: {error}; .jsonl has no such limits") from None


# ---- the Hub ----


def parse_hub(source: str) -> tuple[str, str | None, str]:
    """Take `hf:name[:config][:split]` apart into (name, config or None, split)."""
    match = _HUB.fullmatch(source)
    if match is None:
        raise DataError(f"'{source}' is not hf:name[:config][:split], such as hf:glue:sst2:train")
    name, config, split = match["name"], match["config"], match["split"]
    if config is None and split is not None and re.split(r"[\[+]", split)[0] not in _SPLITS:
        config, split = split, None
    return name, config or None, split or "train"


def _hub_rows(source: str) -> Iterator[tuple[str, Any]]:
    """(where, raw row) of a Hub dataset; class numbers become class names."""
    import datasets

    name, config, split = parse_hub(source)
    try:
        data = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # of many kinds: network, access, unknown name, config or split
        reason = " ".join(str(error).split())[:300]
        offline = "; HF_HUB_OFFLINE is set" if datasets.config.HF_HUB_OFFLINE else ""
        raise DataError(
            f"{source}: cannot load dataset '{name}' (config {config or 'default'}, split {split}){offline}: "
            f"{type(error).__name__}: {reason}; check the name and the network, or save the rows as .jsonl "
            "and pass that file"
        ) from error
    classes = {n: f.names for n, f in data.features.items() if isinstance(f, datasets.ClassLabel)}
    for number, raw in enumerate(data, start=1):
        where = f"{source} row {number}"
        for column, names in classes.items():
            index = raw[column]
            # -1 is how hidden labels of test splits are published.
            raw[column] = names[index] if index is not None and 0 <= index < len(names) else None
        yield where, raw
