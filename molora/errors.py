"""The errors that molora raises on purpose, and the one helper that writes their "did you mean" tail.

Each names the thing, the value, the valid choices and the next step. All problems of one config or one file are
collected first and raised once.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MoloraError(Exception):
    """Base of every error that molora raises on purpose."""


class ConfigError(MoloraError, ValueError):
    """A recipe, a config or an argument is wrong; the message lists every problem found."""


class LoadError(MoloraError, ValueError):
    """A saved adapter cannot be trusted or does not fit the model; the message lists every problem found."""


class DataError(MoloraError, ValueError):
    """Training or evaluation data is unreadable; the message names the file and the line."""


class AuxLossError(MoloraError, RuntimeError):
    """An auxiliary loss was collected but cannot reach the optimizer as it should."""


class RoutingError(MoloraError, RuntimeError):
    """A routing decision cannot be taken or reused in this forward."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return the tail of an error about an unknown name: the nearest choice, then all of them."""
    known = sorted(choices)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"; did you mean '{close[0]}'?" if close else ";"
    return f"{hint} known: {', '.join(known) if known else '(none)'}"


def raise_all(problems: list[str], error: type[MoloraError], head: str) -> None:
    """Raise one `error` that lists every problem under `head`; do nothing when there is none."""
    if not problems:
        return
    if len(problems) == 1:
        raise error(f"{head}: {problems[0]}")
    raise error(f"{head}: {len(problems)} problems\n" + "\n".join(f"  - {problem}" for problem in problems))
