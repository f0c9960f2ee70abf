"""Which scorers know tasks, and how many: for those who build a recipe for the tasks of their data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..registry import Spec, split_spec
from .scorers import scorers


def tasks_in(scorer: Spec) -> int:
    """Return how many tasks a scorer knows, or the scorer inside of it; 0 when it does not look at tasks."""
    name, options = split_spec(scorer, "scorer")
    if name not in scorers:
        return 0
    if "num_tasks" in scorers.options(name):
        return int(options.get("num_tasks", 0))
    return tasks_in(options["scorer"]) if isinstance(options.get("scorer"), (str, Mapping)) else 0


def with_tasks(scorer: Spec, num_tasks: int) -> dict[str, Any]:
    """Return a scorer, and the scorer inside of it, made for `num_tasks` tasks where it looks at tasks at all."""
    name, options = split_spec(scorer, "scorer")
    if name in scorers and "num_tasks" in scorers.options(name):
        options["num_tasks"] = num_tasks
    elif isinstance(options.get("scorer"), (str, Mapping)):
        inner = with_tasks(options["scorer"], num_tasks)
        if tasks_in(inner):
            options["scorer"] = inner
    return {"name": name, **options}
