"""Tasks: named data sets that are trained together, their labels, and the split into training and evaluation.

Nothing here imports torch.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from molora.errors import DataError, did_you_mean, raise_all
from molora.train.rows import Row, parse_hub, read_rows

_NAME = re.compile(r"[A-Za-z0-9_.\-]+")
_FORMAT = 1


@dataclass(frozen=True)
class Task:
    """One named data set. Its task id is its position in the list of tasks.

    Attributes:
        name: letters, digits, dot, dash and underscore.
        rows: what `read_rows` returns.
        kind: "classification", "generation" or "lm".
    """

    name: str
    rows: list[Row]
    kind: str


def load_tasks(specs: Sequence[str], *, fields: dict[str, str] | None = None, kind: str | None = None) -> list[Task]:
    """Read several data sets that are mixed in one run; the order given is the order of task ids.

    Args:
        specs: `name=source` or just `source` (the name is then the file's stem), see `read_rows` for sources.
        fields: column names, ours to theirs, used for every source.
        kind: the kind that every source must have; by default the columns decide.

    Raises:
        DataError: all problems in one: unreadable sources, duplicate names, different kinds of data.
    """
    if not specs:
        raise DataError("no data given; pass name=path for each task, such as news=news.jsonl")
    tasks: list[Task] = []
    problems: list[str] = []
    names: list[str] = []
    for spec in specs:
        try:
            name, source = parse_spec(spec)
            names.append(name)
            rows = read_rows(source, fields=fields, kind=kind)
            tasks.append(Task(name, rows, kind or kind_of(rows)))
        except DataError as error:
            problems.append(str(error))
    for name in sorted({name for name in names if names.count(name) > 1}):
        problems.append(f"task name '{name}' is given {names.count(name)} times; tell them apart: name=path")
    if len({task.kind for task in tasks}) > 1:
        kinds = ", ".join(f"{task.name} is {task.kind}" for task in tasks)
        problems.append(f"one run takes one kind of data, but {kinds}; train them in separate runs")
    raise_all(problems, DataError, "data")
    return tasks


def parse_spec(spec: str) -> tuple[str, str]:
    """Take `name=source` or `source` apart into (task name, source)."""
    name, equals, source = spec.partition("=")
    # "runs/x=1.csv" is a path that holds an equals sign, not a task named "runs/x".
    if not equals or not _NAME.fullmatch(name) or Path(spec).is_file():
        name, source = "", spec
    if not source:
        raise DataError(f"'{spec}' names no data; write name=path, such as news=news.jsonl")
    if name:
        return name, source
    stem = parse_hub(source)[0].split("/")[-1] if source.startswith("hf:") else Path(source).stem
    if not _NAME.fullmatch(stem):
        raise DataError(f"'{stem}' cannot be a task name (letters, digits, . - _ only); write name={source}")
    return stem, source


def kind_of(rows: Sequence[Row]) -> str:
    """Return the kind of rows that `read_rows` returned."""
    first = rows[0]
    return "generation" if "prompt" in first else "classification" if "label" in first else "lm"


@dataclass(frozen=True)
class LabelMap:
    """The labels of all tasks in one numbering: the ids of a task are consecutive, tasks in their order.

    Attributes:
        labels: task name -> its labels in the order of their ids. Labels are sorted (as numbers if all are),
            so the numbering does not depend on the order of the rows.
    """

    labels: dict[str, tuple[str, ...]]

    @classmethod
    def from_tasks(cls, tasks: Iterable[Task]) -> LabelMap:
        """Collect the labels of classification tasks.

        Raises:
            DataError: a task is of another kind, or has fewer than two labels.
        """
        labels: dict[str, tuple[str, ...]] = {}
        problems = []
        for task in tasks:
            if task.kind != "classification":
                problems.append(f"task '{task.name}' is {task.kind} data and has no labels")
                continue
            found = {row["label"] for row in task.rows}
            if len(found) < 2:
                problems.append(f"task '{task.name}' has fewer than two labels ({', '.join(found)})")
            numbers = all(re.fullmatch(r"-?[0-9]+", label) for label in found)
            labels[task.name] = tuple(sorted(found, key=lambda x: (int(x), x) if numbers else x))
        raise_all(problems, DataError, "labels")
        return cls(labels)

    def __len__(self) -> int:
        """Return the number of labels over all tasks."""
        return sum(len(names) for names in self.labels.values())

    @property
    def names(self) -> list[str]:
        """All labels as "task/label", in the order of their ids; what a model config's id2label takes."""
        return [f"{task}/{label}" for task, names in self.labels.items() for label in names]

    def task_id(self, task: str) -> int:
        """Return the position of a task.

        Raises:
            DataError: the task was not there at training.
        """
        if task not in self.labels:
            raise DataError(f"task '{task}' was not trained{did_you_mean(task, self.labels)}")
        return list(self.labels).index(task)

    def slice(self, task: str) -> slice:
        """Return the range of ids that belongs to a task: `logits[:, label_map.slice(task)]`."""
        before = list(self.labels)[: self.task_id(task)]
        start = sum(len(self.labels[name]) for name in before)
        return slice(start, start + len(self.labels[task]))

    def encode(self, task: str, label: str | int, where: str | None = None) -> int:
        """Return the id of a label; `where` names the row in the error.

        Raises:
            DataError: naming row, label, task and the known labels when the label was unseen at training.
        """
        ids = self.slice(task)
        known = self.labels[task]
        if str(label) not in known:
            row = f"{where}: " if where else ""
            hint = did_you_mean(str(label), known)
            raise DataError(f"{row}label '{label}' of task '{task}' was unseen at training{hint}")
        return ids.start + known.index(str(label))

    def decode(self, index: int) -> tuple[str, str]:
        """Return (task, label) of an id; the inverse of `encode`."""
        if not 0 <= index < len(self):
            raise DataError(f"label id {index} is out of range; there are {len(self)} labels")
        task, _, label = self.names[index].partition("/")
        return task, label

    def save(self, path: str | Path) -> None:
        """Write a JSON file in one step: a reader sees the old file or the new one, never a part."""
        path = Path(path)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        text = json.dumps({"format": _FORMAT, "labels": self.labels}, indent=2, ensure_ascii=False)
        try:
            unfinished.write_text(text + "\n", encoding="utf-8")
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> LabelMap:
        """Read what `save` wrote.

        Raises:
            DataError: the file is missing or is not a label map.
        """
        try:
            saved = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(f"{path}: no such file; training writes it beside the adapter") from None
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: not a label map: {error}") from None
        if not isinstance(saved, dict) or saved.get("format") != _FORMAT:
            raise DataError(f"{path}: not a label map of format {_FORMAT}")
        labels = saved.get("labels")
        good = isinstance(labels, dict) and all(
            isinstance(names, list) and all(isinstance(n, str) for n in names) and len(set(names)) == len(names)
            for names in labels.values()
        )
        if not good:
            raise DataError(f"{path}: 'labels' must map each task to a list of different strings")
        return cls({task: tuple(names) for task, names in labels.items()})


def split(rows: Sequence[Row], eval_fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Divide rows into (training, evaluation); the same arguments always give the same parts.

    Rows with labels are divided label by label, and a label's last row always stays in training, so that no
    label of the evaluation part is unseen. Both parts keep the order of `rows`.

    Args:
        eval_fraction: at least 0 and below 1; above 0, the evaluation part holds at least one row.

    Raises:
        DataError: the fraction is out of range, or the rows are too few to divide.
    """
    if not 0 <= eval_fraction < 1:
        raise DataError(f"eval_fraction {eval_fraction} is out of range; it must be at least 0 and below 1")
    if eval_fraction == 0:
        return list(rows), []
    rng = random.Random(seed)
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.get("label", ""), []).append(i)
    spare = sum(len(group) - 1 for group in groups.values())
    if spare < 1:
        raise DataError(
            f"{len(rows)} rows with {len(groups)} labels are too few to divide: eval_fraction {eval_fraction}"
        )

    # Largest remainders: each label gives its whole share, the rest goes where the fractions are largest.
    total = min(max(1, round(len(rows) * eval_fraction)), spare)
    order = sorted(groups)
    rng.shuffle(order)  # so that ties do not always fall to the same labels
    share = {label: len(groups[label]) * eval_fraction for label in order}
    take = {label: int(share[label]) for label in order}
    while sum(take.values()) < total:
        open_ = [label for label in order if take[label] < len(groups[label]) - 1]
        most = max(open_, key=lambda label: share[label] - take[label])
        take[most] += 1
    held: set[int] = set()
    for label in order:
        held.update(rng.sample(groups[label], take[label]))
    return [r for i, r in enumerate(rows) if i not in held], [r for i, r in enumerate(rows) if i in held]
