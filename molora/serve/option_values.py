"""What the options of `molora serve` and of `molora route` have in common: how they are read, and what they may be.

Both are dataclasses that tell every mistake at once: what is wrong with values comes from the generators here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from accelerate.utils import convert_file_size_to_int

from ..errors import ConfigError, did_you_mean

LOG_LEVELS = ("debug", "info", "warning", "error")
FEEDBACK = ("folder", "policy", "frozen")
Options = TypeVar("Options")


def read_options(
    cls: type[Options], path: str | Path | None, flags: Mapping[str, Any], paths: Iterable[str]
) -> Options:
    """Return the options of a YAML, with flags that are not None in their place.

    Args:
        cls: of the options; its argument `unknown` takes what is wrong already.
        path: the file; None: there are flags alone.
        flags: by name.
        paths: names of options that may be paths; those in the file that start with ./, ../ or ~ are relative to it.

    Raises:
        ConfigError: the file cannot be read, or a key or value is wrong; all problems at once.
    """
    told: dict[str, Any] = {} if path is None else _file(Path(path), paths)
    known = {one.name for one in fields(cls)}  # type: ignore[arg-type]
    unknown = [f"'{key}' is unknown{did_you_mean(str(key), known)}" for key in told if key not in known]
    told = {key: value for key, value in told.items() if key in known}
    return cls(**{**told, **{key: value for key, value in flags.items() if value is not None}}, unknown=unknown)


def _file(path: Path, paths: Iterable[str]) -> dict[str, Any]:
    try:
        told = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"the options in '{path}' cannot be read: {error}") from error
    if not isinstance(told, dict):
        raise ConfigError(f"'{path}' must hold options as `key: value`, got {type(told).__name__}")
    selectors = told.get("selectors")
    inner = [told.get("feedback"), *(selectors.values() if isinstance(selectors, dict) else ())]
    places = [(told, key) for key in ("feedback", *paths)]
    for place, key in [*places, *((one, "folder") for one in inner if isinstance(one, dict))]:
        value = place.get(key)
        if isinstance(value, str) and value.startswith(("./", "../", "~")):
            place[key] = os.path.normpath(path.parent / Path(value).expanduser())
    return told


def listening_problems(options: Any) -> Iterator[str]:
    """Yield what is wrong with the options of whatever takes HTTP requests of tenants."""
    yield from size_problems(options, ("max_body",))
    yield from count_problems(options, {"port": 0})
    if isinstance(options.port, int) and options.port > 65535:
        yield f"port must be at most 65535, got {options.port}"
    yield from second_problems(options, ("timeout", "drain"))
    yield from truth_problems(options, ("docs", "open_metrics"))
    yield from choice_problems(options, {"log_level": LOG_LEVELS})
    if not (isinstance(options.host, str) and options.host):
        yield f"host must be a text, got {options.host!r}"
    yield from text_problems(options, ("tenants", "database"))
    if isinstance(options.feedback, Mapping):
        strange = sorted(str(key) for key in options.feedback if key not in FEEDBACK)
        yield from (f"feedback has no option '{key}'; it has {', '.join(FEEDBACK)}" for key in strange)
    elif not isinstance(options.feedback, (bool, str, type(None))):
        yield f"feedback must be a folder, true, or options, got {options.feedback!r}"


def size_problems(options: Any, names: Iterable[str]) -> Iterator[str]:
    """Put bytes in the place of sizes such as `2GiB`; yield what is wrong with them."""
    for name in names:
        value = getattr(options, name)
        try:
            size = as_bytes(value)
        except (ValueError, TypeError, AttributeError):  # the last is what it makes of 1.5
            yield f"{name} must be bytes or a size such as 2GiB, got {value!r}"
            continue
        setattr(options, name, size)
        if size < 1:
            yield f"{name} must be above 0, got {size}"


def as_bytes(size: int | str) -> int:
    """Return a size in bytes, given as a number, its digits (as a flag gives them), or a text such as `2GiB`."""
    if isinstance(size, str) and size.isdigit():
        return int(size)
    return convert_file_size_to_int(size)


def count_problems(options: Any, least: Mapping[str, int]) -> Iterator[str]:
    """Yield which options are no whole numbers from the least that each may be."""
    for name, low in least.items():
        value = getattr(options, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            yield f"{name} must be a whole number from {low}, got {value!r}"


def second_problems(options: Any, names: Iterable[str]) -> Iterator[str]:
    """Yield which options are no seconds."""
    for name in names:
        value = getattr(options, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            yield f"{name} must be seconds above 0, got {value!r}"


def truth_problems(options: Any, names: Iterable[str]) -> Iterator[str]:
    """Yield which options are neither true nor false."""
    for name in names:
        if not isinstance(getattr(options, name), bool):
            yield f"{name} must be true or false, got {getattr(options, name)!r}"


def choice_problems(options: Any, choices: Mapping[str, tuple[Any, ...]]) -> Iterator[str]:
    """Yield which options are none of their choices."""
    for name, known in choices.items():
        if getattr(options, name) not in known:
            told = ", ".join(str(choice) for choice in known)
            yield f"{name} must be one of {told}, got {getattr(options, name)!r}"


def text_problems(options: Any, names: Iterable[str]) -> Iterator[str]:
    """Yield which options are neither None nor texts."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not (isinstance(value, str) and value):
            yield f"{name} must be a text, got {value!r}"
