"""How well routers answer tasks that nobody names, and tasks that have no adapter, on the shipped library.

    python -m benchmarks.zero_shot            make bench-zero-shot; writes benchmarks/results/zero_shot/

The adapters, the tasks and how they are answered are those of `examples/train_library.py`: a text points at the nearest
of a few candidates. Two questions are asked of every router in `benchmarks/zero_shot_routers.py`:

- held out: for each task, the mixture of all *other* adapters answers its rows (routers that are trained go without
  two tasks and their adapters at once, so that four are trained and not eight);
- in distribution: the mixture of all adapters answers the rows of all tasks, without being told which task a row is of.

Beside them: the frozen base; the best single adapter (one for all tasks, chosen with hindsight); the uniform average;
PEFT's Arrow and X-LoRA; and an oracle that knows the task: its own adapter in distribution, and held out the other
adapter that does best on it, chosen with hindsight. No row that is measured was used to train or to choose anything but
the two that say so.
"""

from __future__ import annotations

# ruff: noqa: E402 (the folder of the tasks comes into the path before they are imported)
import argparse
import json
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))  # the tasks are part of the examples

import library_tasks
import pointing
from peft import PeftModel

from molora.hub.store import Hub

from . import zero_shot_report
from .files import write_files
from .report import machine
from .zero_shot_field import Field, Sizes
from .zero_shot_routers import IN_DISTRIBUTION_ONLY, ROUTERS, Around

RESULTS = Path(__file__).parent / "results" / "zero_shot"
QUICK = Sizes(rows=8, texts=4, router_steps=2, examples=4, budget=3, batch=4, together=1)


def load_field(hub: Hub, sizes: Sizes, only: Sequence[str] | None = None) -> Field:
    """Return the adapters of a library and their tasks; `only` some of them."""
    entries = {entry.name: entry for entry in hub.list()}
    known = [name for name in library_tasks.SOURCES if name in entries and entries[name].kind == "lora"]
    names = [name for name in known if not only or name in only]
    if len(names) < 3:
        raise SystemExit(f"the benchmark needs at least 3 adapters, '{hub.root}' has {names}; train them: make library")
    mixtures = [entry for entry in entries.values() if entry.kind == "mixture"]
    whole = mixtures[0].folder if mixtures and len(names) == len(known) else None
    tasks = {task.name: task for task in library_tasks.build(tuple(names))}
    pointer = pointing.Pointer(pointing.base_model(), pointing.load_tokenizer())
    return Field(pointer, tasks, {name: entries[name].folder for name in names}, sizes, whole)


def singles(data: Field) -> dict[str, dict[str, list[bool]]]:
    """Return, by adapter (and `base`) and task, which held-out rows are right; fills `quality` of the field."""
    held = {name: data.pointer.batches(task.held_out[: data.sizes.rows]) for name, task in data.tasks.items()}
    read = {name: data.pointer.batches(data.texts(name)) for name in data.tasks}
    found, columns = {}, []
    for adapter in ("base", *data.folders):
        model = data.pointer.base
        if adapter != "base":
            model = PeftModel.from_pretrained(pointing.base_model(), data.folders[adapter]).eval()
            columns.append(torch.cat([chances(model, batches) for batches in read.values()]))
        found[adapter] = {name: pointing.hits(model, batches).tolist() for name, batches in held.items()}
    data.quality = torch.stack(columns, 1)
    data.owners = [name for name in data.tasks for _ in data.texts(name)]
    return found


@torch.no_grad()
def chances(model: torch.nn.Module, batches: Sequence[pointing.Batch]) -> torch.Tensor:
    """Return (N,): the probability of the right answer of each row, in the order of the rows."""
    found = torch.zeros(sum(len(batch.answers) for batch in batches))
    for batch in batches:
        probs = torch.softmax(pointing.cosines(model, batch) / pointing.TEMPERATURE, -1)
        found[list(batch.order)] = probs.gather(1, batch.answers[:, None])[:, 0]
    return found


def ask(data: Field, model: torch.nn.Module, around: Around, task: str) -> list[bool]:
    """Return which of the held-out rows of a task a mixture answers right."""
    batches = data.pointer.batches(data.tasks[task].held_out[: data.sizes.rows])
    return pointing.hits(model, batches, around).tolist()


def contend(data: Field, name: str) -> dict[str, Any]:
    """Ask both questions of one router; a router that cannot run here is reported with its reason."""
    needs, make = ROUTERS[name]
    names, started = list(data.folders), time.perf_counter()
    row: dict[str, Any] = {"needs": needs, "held_out": None, "in_distribution": None, "failure": None}
    try:
        model, around = make(data, names, names)
        row["in_distribution"] = {task: ask(data, model, around, task) for task in names}
        if name not in IN_DISTRIBUTION_ONLY:
            row["held_out"] = {}
            size = data.sizes.together if needs == "training" else 1
            for some in (names[start : start + size] for start in range(0, len(names), size)):
                model, around = make(data, [other for other in names if other not in some], some)
                row["held_out"] |= {task: ask(data, model, around, task) for task in some}
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        row["failure"] = f"{type(error).__name__}: {reason}"
        row["held_out"] = row["in_distribution"] = None
        if not name.startswith("PEFT"):  # ours must run
            traceback.print_exc()
            raise
    row["seconds"] = time.perf_counter() - started
    return row


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and write its files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--library", type=Path, default=ROOT / "adapters_hub")
    parser.add_argument("--rows", type=int, help=f"held-out rows per task (default: {Sizes.rows})")
    parser.add_argument("--tasks", help="only these tasks, separated by commas")
    parser.add_argument("--only", help="only these routers, separated by commas")
    parser.add_argument("--merge", action="store_true", help="keep the routers of the run that is in the folder")
    parser.add_argument("--quick", action="store_true", help="a few rows and steps, to see that it works")
    options = parser.parse_args(argv)
    chosen = options.only.split(",") if options.only else list(ROUTERS)
    unknown = [name for name in chosen if name not in ROUTERS]
    if unknown:
        parser.error(f"unknown routers: {', '.join(unknown)}; there are: {', '.join(ROUTERS)}")
    if missing := pointing.demo_tasks.missing_packages():
        raise SystemExit(f"packages are missing: {', '.join(missing)}; install them with: make setup")
    torch.set_num_threads(1)
    sizes = QUICK if options.quick else Sizes(**({"rows": options.rows} if options.rows else {}))
    started = time.perf_counter()
    data = load_field(Hub(options.library), sizes, options.tasks.split(",") if options.tasks else None)
    run: dict[str, Any] = {
        "machine": machine(),
        "quick": options.quick,
        "sizes": vars(sizes),
        "tasks": {
            name: {"held_out_rows": len(task.held_out[: sizes.rows]), "options": len(task.held_out[0].options)}
            for name, task in data.tasks.items()
        },
        "singles": singles(data),
        "routers": {},
    }
    if options.merge:
        run["routers"] = merged(run, options.out)
    if data.mixture is None and "shipped mixture" in chosen:
        chosen.remove("shipped mixture")
    for name in chosen:
        run["routers"][name] = row = contend(data, name)
        print(f"{name:24s}{row['seconds']:6.0f} s  {row['failure'] or ''}", file=sys.stderr, flush=True)
        run["minutes"] = (time.perf_counter() - started) / 60
        write(run, options.out)  # what is there counts, whatever comes later
    print(zero_shot_report.markdown(run))
    return 0


def merged(run: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the routers of the run in a folder, which must be of the same library, tasks and sizes."""
    file = folder / "zero_shot.json"
    if not file.is_file():
        return {}
    before = zero_shot_report.unpacked(json.loads(file.read_text(encoding="utf-8")))
    if any(before[key] != run[key] for key in ("tasks", "sizes", "singles", "quick")):
        raise SystemExit(f"'{file}' is of another library or other sizes; run without --merge")
    return before["routers"]


def write(run: dict[str, Any], folder: Path) -> None:
    """Write zero_shot.json, zero_shot.md and zero_shot.png."""
    packed, page = zero_shot_report.packed(run), zero_shot_report.markdown(run)
    write_files(folder, "zero_shot", packed, page, lambda path: zero_shot_report.picture(run, path))


if __name__ == "__main__":
    sys.exit(main())
