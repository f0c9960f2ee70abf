"""Train the adapters that molora ships, and one routed mixture over them; write them into a library with cards.

    python examples/train_library.py                     make library; about ten minutes of one core
    python examples/train_library.py --quick --out x     a few steps, to see that everything works

Each adapter is a plain LoRA, trained by PEFT alone on a frozen MiniLM (see library_tasks.py for the tasks, pointing.py
for how they are answered). It is rounded to float16 first and measured then, from the files that are shipped, on rows
that took no part in training. Seeds are fixed; on another machine the last digits may differ.

Beside each LoRA lie its gates, one vector per layer, which were trained on the same rows after it (PHATGOOSE, arXiv
2402.05859). The mixture holds the same LoRAs and lets their gates compete; nothing in it was trained jointly.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import library_tasks
import pointing
import torch
from library_labels import PROMPTS
from library_tasks import Task
from peft import LoraConfig, PeftModel, get_peft_model
from pointing import BASE, Pointer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import molora
from molora.files import CONFIG, WEIGHTS
from molora.hub.card import Embedding
from molora.hub.entry import Entry
from molora.hub.store import Hub
from molora.posthoc.gates import save_gates
from molora.posthoc.phatgoose import train_gates

SHIPPED = Path(__file__).resolve().parent.parent / "adapters_hub"
STEPS, BATCH, LEARNING_RATE = 90, 20, 2e-3  # of each adapter
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value", "intermediate.dense"]}
GATE_STEPS = 30  # of each adapter's gates
MIXTURE, ACTIVE = "everyday", 2  # experts that act on a token
AUTHORS = ("the authors of molora",)
EMBEDDER = "all-MiniLM-L6-v2, mean of states"


def main(argv: Sequence[str] | None = None) -> None:
    """Train everything, and put the finished library in place of the old one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps on a few rows")
    parser.add_argument("--only", help="train only these tasks, separated by commas")
    parser.add_argument(
        "--keep", action="store_true", help="train only what the library does not have; the mixture is made anew"
    )
    parser.add_argument("--out", type=Path, default=SHIPPED, help="the library (default: the shipped one)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    names = tuple(options.only.split(",")) if options.only else tuple(library_tasks.SOURCES)
    if missing := demo_missing():
        raise SystemExit(f"packages are missing: {', '.join(missing)}; install them with: make setup")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        hub = Hub(Path(scratch, "hub"))
        there = Hub(options.out).list() if options.keep and options.out.is_dir() else []
        kept = [hub.add(entry.folder, entry.name).name for entry in there if entry.name in names]
        make_library(hub, names, kept, quick=options.quick)
        replace_versions(hub, options.out)
    size = sum(path.stat().st_size for path in options.out.rglob("*") if path.is_file() and path.name[0] != ".")
    print(f"{options.out}: {size / 1e6:.2f} MB, made in {(time.perf_counter() - started) / 60:.1f} minutes")


def demo_missing() -> list[str]:
    """Return the packages with texts and weights that are not installed."""
    return pointing.demo_tasks.missing_packages()


def make_library(hub: Hub, names: Sequence[str], kept: Sequence[str] = (), quick: bool = False) -> None:
    """Train an adapter for each task but those that are there, and the mixture, into a library."""
    rows = {"train": 48, "held_out": 12} if quick else {}
    tasks = library_tasks.build(tuple(names), **rows)
    pointer = Pointer(pointing.base_model(), pointing.load_tokenizer())
    with tempfile.TemporaryDirectory() as scratch:
        for task in tasks:
            if task.name in kept:
                continue
            started = time.perf_counter()
            folder = train(task, pointer, Path(scratch, task.name), 2 if quick else STEPS)
            train_own_gates(task, pointer, folder, 2 if quick else GATE_STEPS)
            entry = add(hub, folder, task, pointer, *measure(task, pointer, folder))
            seconds = time.perf_counter() - started
            print(f"{task.name:12s} {json.dumps(dict(entry.card.metrics))}  {seconds:.0f} s", flush=True)
        started = time.perf_counter()
        folder = make_mixture(hub, tasks, Path(scratch, MIXTURE))
        entry = add_mixture(hub, folder, tasks, pointer)
        print(
            f"{MIXTURE:12s} {json.dumps(dict(entry.card.metrics))}  {time.perf_counter() - started:.0f} s", flush=True
        )


# --- one adapter ------------------------------------------------------------------------------------------------------


def train(task: Task, pointer: Pointer, folder: Path, steps: int) -> Path:
    """Train a LoRA on a task and save it in float16; returns its folder."""
    torch.manual_seed(0)
    model = get_peft_model(pointing.base_model(), LoraConfig(**LORA))
    feed = pointer.endless(task.train, min(BATCH, len(task.train)), seed=0)
    pointing.fit(model, feed, steps=steps, lr=LEARNING_RATE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT looks for the base on the Hub
        model.half().save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # a form that nobody filled in; the card says it all
    config = json.loads((folder / CONFIG).read_text())
    config["base_model_name_or_path"] = BASE
    config["target_modules"] = sorted(config["target_modules"])  # a set: its order is another one in every process
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return folder


def train_own_gates(task: Task, pointer: Pointer, folder: Path, steps: int) -> None:
    """Train the gates of a LoRA on the task that it was trained on, and write them beside it."""
    feed = pointer.endless(task.train, min(BATCH, len(task.train)), seed=1)
    batches = [next(feed) for _ in range(steps)]
    save_gates(train_gates(pointing.base_model(), folder, batches, steps=steps, loss=pointing.loss), folder)


def measure(task: Task, pointer: Pointer, folder: Path) -> tuple[dict[str, float], Tensor]:
    """Return what goes into the card, from the saved files; and which held-out rows are right."""
    batches = pointer.batches(task.held_out)
    base = pointing.hits(pointer.base, batches)
    adapted = pointing.hits(PeftModel.from_pretrained(pointing.base_model(), folder), batches)
    found = {"accuracy": _share(adapted), "accuracy_of_base": _share(base)}
    if task.labels:
        found["accuracy_of_base_with_class_means"] = class_means(task, pointer)
    return {**found, "held_out_rows": len(task.held_out), "training_rows": len(task.train)}, adapted


def class_means(task: Task, pointer: Pointer) -> float:
    """Return the accuracy of the frozen base when candidates are the means of each class's training texts."""
    kinds = torch.tensor([row.answer for row in task.train])
    vectors = pointer.vectors(row.text for row in task.train)
    means = torch.stack([vectors[kinds == kind].mean(0) for kind in range(len(task.labels))])
    means = torch.nn.functional.normalize(means, dim=-1)
    found = (pointer.vectors(row.text for row in task.held_out) @ means.T).argmax(-1)
    return _share(found == torch.tensor([row.answer for row in task.held_out]))


def _share(right: Tensor) -> float:
    return round(float(right.double().mean()), 4)


def add(hub: Hub, folder: Path, task: Task, pointer: Pointer, metrics: dict[str, float], right: Tensor) -> Entry:
    """Add an adapter with its card; it must change what the base says of its own texts."""
    candidates = "the same for every text" if task.labels else "of its own for every text"
    description = (
        f"{task.said} Embed the text with this adapter (mean of the last states), the candidates without it; the "
        f"nearest candidate by cosine is the answer. Candidates are {candidates}."
    )
    if task.labels:
        description += " They are: " + "; ".join(task.labels) + "."
    return hub.add(
        folder,
        task.name,
        {**_shared(pointer, description), "task": task.kind, "data": task.data, "metrics": metrics}
        | {"prompts": shown(task, right)},
        base_model=pointing.base_model(),
        probes=[row.text for row in task.held_out[:2]],
        tokenize=lambda text: pointer.tokens([text]),
    )


def shown(task: Task, right: Tensor) -> list[str]:
    """Return a few short texts that the adapter is asked: held-out ones that it answers right, or made-up ones."""
    if task.name in PROMPTS:
        return list(PROMPTS[task.name])
    rows = task.held_out
    good = [row.text for row, hit in zip(rows, right.tolist(), strict=True) if hit and row.text.isprintable()]
    return [text[:160] for text in sorted(good[:30], key=len)[len(good[:30]) // 3 :][:3]]


def _shared(pointer: Pointer, description: str) -> dict[str, Any]:
    vector = pointer.vectors([description])[0].tolist()
    return {
        "base": BASE,
        "description": description,
        "licence": "Apache-2.0",
        "authors": AUTHORS,
        "embedding": Embedding(EMBEDDER, tuple(round(value, 4) for value in vector)),
    }


# --- the mixture ------------------------------------------------------------------------------------------------------


def make_mixture(hub: Hub, tasks: Sequence[Task], folder: Path) -> Path:
    """Let the adapters of a library compete by their gates; returns the folder of the mixture, in float16."""
    adapters = {task.name: hub.get(task.name).folder for task in tasks}
    router = {"name": "phatgoose", "top_k": min(ACTIVE, len(adapters))}  # by the gates beside them
    model = molora.compose(pointing.base_model(), adapters, router=router)
    model.peft_config["default"].base_model_name_or_path = BASE
    molora.save(model, folder)
    (folder / "README.md").unlink(missing_ok=True)
    halve(folder / WEIGHTS)
    return folder


def halve(path: Path) -> None:
    """Write the tensors of a file in float16; those of experts were in float16 before they were loaded."""
    with safe_open(path, "pt") as content:
        metadata = content.metadata()
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118  (not a dict)
    save_file({n: t.half() if t.dtype == torch.float32 else t for n, t in tensors.items()}, path, metadata)


def add_mixture(hub: Hub, folder: Path, tasks: Sequence[Task], pointer: Pointer) -> Entry:
    """Add the mixture with its card: what it answers right of each task, without being told the task."""
    mixture = molora.load(pointing.base_model(), folder)
    found: dict[str, Mapping[str, float]] = {}
    prompts: list[str] = []
    for task in tasks:
        batches = pointer.batches(task.held_out)
        right = pointing.hits(mixture, batches)
        own = hub.get(task.name).card.metrics
        found[task.name] = {
            "accuracy": _share(right),
            "accuracy_of_base": own["accuracy_of_base"],
            "accuracy_of_own_adapter": own["accuracy"],
        }
        prompts += shown(task, right)[:1]
    mean = {key: round(sum(one[key] for one in found.values()) / len(found), 4) for key in found[tasks[0].name]}
    names = ", ".join(task.name for task in tasks)
    description = (
        f"Answers the tasks of {len(tasks)} adapters of this library ({names}) without being "
        "told which task a text belongs to: the adapters are its experts, and in each layer those two act on a token "
        "whose gates fit it best. Each gate was trained alone, with its own adapter (PHATGOOSE)."
    )
    card = {**_shared(pointer, description), "task": "everyday texts", "metrics": {**mean, **found}}
    card |= {"data": [data for task in tasks for data in task.data], "prompts": prompts}
    return hub.add(
        folder,
        MIXTURE,
        card,
        base_model=pointing.base_model(),
        probes=prompts[:2] or [tasks[0].held_out[0].text],
        tokenize=lambda text: pointer.tokens([text]),
    )


def replace_versions(hub: Hub, target: Path) -> None:
    """Put the adapters of a fresh library in place of all that are in the target; other files there stay."""
    target.mkdir(parents=True, exist_ok=True)
    for path in list(target.iterdir()):
        if path.is_dir() or path.name == "library.yaml":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for entry in hub.list():
        shutil.copytree(entry.folder, target / entry.name / str(entry.version))
    problems = {str(ref): found for ref, found in Hub(target).verify().items() if found}
    if problems:
        raise SystemExit(f"the library is not right: {problems}")


if __name__ == "__main__":
    main()
