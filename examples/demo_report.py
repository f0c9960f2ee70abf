"""What the demo prints and writes: tables in Markdown that can be read in a terminal, too, and results.md."""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path
from typing import Any

import torch

from molora.train.data import LabelMap, Task

QUESTIONS = {
    "news": "topic of a BBC article",
    "medicine": "subject of an exam question (MedMCQA)",
    "group": "kind of group a sentence is about (StereoSet)",
    "tone": "is a toxic comment sexual?",
    "follows": "does a second sentence follow? (StereoSet)",
}

REPORT = """# Results of the demo

{table}

`{command}` took {seconds:.0f} seconds, {date}, on {machine}.

Accuracy is on rows that were not trained on, among the labels of the row's task. By chance of the rows, an average is
uncertain by about {error:.1f} points (one standard error). Every recipe was trained once, with seed {seed}, for {steps}
steps of {batch} rows mixed from all tasks (at most {max_length} tokens each), with AdamW, a warm-up of 10% and a linear
decay from {learning_rate:g}. The head over all {labels} labels learns from {head_learning_rate:g}; its {head:,}
parameters are not counted above.

Saved, and loaded in a new process: {agreement}.

![The experts of {pictured} by layer and by task](routing.png)

## The tasks

{tasks_table}

How they are built, and how the labels were judged: examples/demo_tasks.py.

## Versions

{versions}
"""


def say(title: str, text: str) -> None:
    """Print a heading."""
    print(f"\n{title}: {text}\n", flush=True)


def tasks_table(training: list[Task], evaluation: list[Task], label_map: LabelMap) -> str:
    """What is asked, and on how many rows."""
    cells = [["task", "what is asked", "labels", "training rows", "evaluation rows"]]
    for train, held_out in zip(training, evaluation, strict=True):
        counts = [len(label_map.labels[train.name]), len(train.rows), len(held_out.rows)]
        cells.append([train.name, QUESTIONS[train.name], *map(str, counts)])
    return markdown(cells, left=2)


def results_table(results: dict[str, Any], majority: dict[str, float]) -> str:
    """Accuracy of each recipe per task, and what it cost."""
    cells = [["accuracy in %", *majority, "average", "trainable parameters", "seconds per step"]]
    for name, facts in results.items():
        scores = [f"{100 * value:.1f}" for value in (*facts["accuracy"].values(), facts["average"])]
        cells.append([name, *scores, f"{facts['adapter_parameters']:,}", f"{facts['seconds_per_step']:.2f}"])
    always = [f"{100 * value:.1f}" for value in (*majority.values(), sum(majority.values()) / len(majority))]
    cells.append(["most frequent label", *always, "0", "-"])
    return markdown(cells)


def markdown(cells: list[list[str]], left: int = 1) -> str:
    """A table whose columns are aligned; the first `left` of them hold text."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    rule = [":" + "-" * (w + 1) if i < left else "-" * (w + 1) + ":" for i, w in enumerate(widths)]
    lines = []
    for row in cells:
        padded = [row[i].ljust(w) if i < left else row[i].rjust(w) for i, w in enumerate(widths)]
        lines.append(f"| {' | '.join(padded)} |")
    return "\n".join([lines[0], f"|{'|'.join(rule)}|", *lines[1:]])


def write_report(path: Path, record: dict[str, Any], tasks: str, table: str) -> None:
    """Write results.md: everything that is needed to judge the numbers."""
    rows = [task["evaluation"] for task in record["tasks"].values()]
    best = record["results"][record["best"]]
    variance = sum(a * (1 - a) / n for a, n in zip(best["accuracy"].values(), rows, strict=True))
    text = REPORT.format(
        **{key: record[key] for key in ("command", "seconds", "date", "machine", "pictured")},
        **{key: value for key, value in record["settings"].items() if key != "recipes"},
        table=table,
        tasks_table=tasks,
        error=100 * math.sqrt(variance) / len(rows),
        head=best["head_parameters"],
        agreement="; ".join(f"`{name}`: {found['text']}" for name, found in record["reload"].items()),
        versions=", ".join(f"{name} {number}" for name, number in record["versions"].items()),
    )
    path.write_text(text, encoding="utf-8")


def machine() -> str:
    """The processor, in words."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {platform.system()}, without a GPU"
