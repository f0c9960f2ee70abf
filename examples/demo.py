"""The demo: a frozen MiniLM learns five real text tasks at once, through one LoRA and through routed LoRA experts.

    make demo                                        one LoRA and three routed recipes, under five minutes on two cores
    python examples/demo.py --recipes lora molora    others; `molora recipes` says what they are
    python examples/demo.py --quick                  a few small steps, to see that everything works

Read it from top to bottom as an example of how to use molora. All recipes have the same number of trainable parameters
and see the same rows in the same order, for as many steps, with the same learning rate and seed.
"""
# ruff: noqa: E402 (what is said below must be said before the libraries are imported)

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it only says which of its kernels are not installed

import demo_tasks
import torch
import transformers
from demo_report import machine, results_table, say, tasks_table, write_report
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

import molora
from molora.reports.heatmap import write_png
from molora.train.data import Collator, LabelMap, Task, encode_classification, load_tasks
from molora.train.disk import LABELS, ROUTING, TRAINING, write_json
from molora.train.evaluate import Adapter, evaluate
from molora.train.models import Base
from molora.train.run import versions

# What differs from recipes/*.yaml is the size: every adapter has 1.14 million parameters, routers included. The scale
# (alpha / rank) and everything else are those of the recipe.
SIZES: dict[str, dict[str, Any]] = {
    "lora": {"experts": {"rank": 27, "alpha": 54}},
    "molora": {"experts": {"num": 6, "rank": 4}},
    "hydralora": {"experts": {"num": 4, "rank": 10, "alpha": 80}},
    "mola": {"experts": {"num": [4, 6, 8], "rank": 4, "alpha": 8}},
    "dynmole": {"experts": {"num": 6, "rank": 4, "alpha": 8}},
    "smora": {"experts": {"num": 18}},
    "milora": {"experts": {"rank": 27, "alpha": 54}},
}
RECIPES = ["lora", "mola", "dynmole", "smora"]
SEED = 0  # of the data, the new head, the adapters and the order of the rows; no other seed was looked at
# Of all adapters. On rows held out of training, one LoRA was better at 2e-3 than at 1e-3 and 4e-3, and dynmole at 2e-3
# than at 4e-3; the others were tried at 2e-3 only.
LEARNING_RATE = 2e-3
# MiniLM's features are small (they differ by 0.05 from row to row), so the new head takes larger steps.
HEAD_LEARNING_RATE = 2e-2
MAX_LENGTH = 32  # tokens per row
LOGITS = "logits.safetensors"  # of the evaluation rows, beside the adapter


def main() -> None:
    options, started = parse_arguments(), time.monotonic()
    out = Path(options.out)
    quiet_transformers()

    say("1. The tasks", f"from files that pip has installed; every row is cut at {MAX_LENGTH} tokens")
    training, evaluation = demo_tasks.build(options.train_rows, options.eval_rows, SEED)
    label_map = LabelMap.from_tasks(training)  # one head over the labels of all tasks
    tokenizer = AutoTokenizer.from_pretrained(demo_tasks.minilm())
    rows = encode_classification(training, tokenizer, label_map, MAX_LENGTH)  # with labels and task_ids
    tasks_text = tasks_table(training, evaluation, label_map)
    print(tasks_text, flush=True)

    threads = torch.get_num_threads()
    say("2. Training", f"each recipe for {options.steps} steps of {options.batch} rows, on {threads} threads")
    results: dict[str, dict] = {}
    models, usages = {}, {}
    for recipe in options.recipes:
        model = new_model(label_map)
        model = molora.wrap(model, recipe, **SIZES[recipe])  # the one line
        results[recipe] = facts = train(model, rows, Collator(tokenizer), options)
        judged = judge(model, evaluation, label_map, tokenizer)
        facts["accuracy"] = {name: figures["accuracy"] for name, figures in judged.tasks.items()}
        facts["average"] = sum(facts["accuracy"].values()) / len(evaluation)
        print(f"   {recipe}: {facts['average']:.1%} right, averaged over the tasks\n", flush=True)
        models[recipe], usages[recipe] = model, judged.usage
    majority = {name: figures["majority"] for name, figures in judged.tasks.items()}
    table = results_table(results, majority)
    print(table, flush=True)

    best = max(results, key=lambda recipe: results[recipe]["average"])
    routed = max((r for r in results if r != "lora"), key=lambda r: results[r]["average"], default=best)
    say("3. A picture", f"of the experts of {routed}, the best routed recipe, by layer and by task")
    print(f"   {write_png(usages[routed], out / 'routing.png', f'{routed} on frozen MiniLM')}")

    say("4. Save and load", "a new process loads the best adapters and predicts the evaluation rows again")
    reloads = {}
    write_rows(evaluation, out / "evaluation")
    for recipe, name in {best: "best_adapter", routed: "best_adapter" if best == routed else "routed_adapter"}.items():
        folder = save(models[recipe], recipe, label_map, usages[recipe], out / name)
        save_file({"logits": predict(models[recipe], evaluation, label_map, tokenizer)}, folder / LOGITS)
        reloads[recipe] = load_in_new_process(folder)
        print(f"   {recipe}, from {folder}: {reloads[recipe]['text']}", flush=True)

    settings = {key: getattr(options, key) for key in ("recipes", "steps", "batch")}
    settings |= {"seed": SEED, "max_length": MAX_LENGTH, "labels": len(label_map)}
    settings |= {"learning_rate": LEARNING_RATE, "head_learning_rate": HEAD_LEARNING_RATE}
    parts = zip(training, evaluation, strict=True)
    record = {
        "command": " ".join(["python examples/demo.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "settings": settings,
        "tasks": {t.name: {"train": len(t.rows), "evaluation": len(e.rows)} for t, e in parts},
        "majority": majority,
        "results": results,
        "best": best,
        "pictured": routed,
        "reload": reloads,
        "seconds": round(time.monotonic() - started, 1),
    }
    write_json(out / "results.json", record)
    write_report(out / "results.md", record, tasks_text, table)
    say("Done", f"in {record['seconds']:.0f} seconds; see {out / 'results.md'} and {out / 'routing.png'}")
    if any(found["agree"] != found["rows"] for found in reloads.values()):
        raise SystemExit("the loaded adapter predicts otherwise than the one that was saved")


# --- train and judge --------------------------------------------------------------------------------------------------


def new_model(label_map: LabelMap) -> torch.nn.Module:
    """MiniLM with a new head, which starts the same for every recipe."""
    transformers.set_seed(SEED)
    return AutoModelForSequenceClassification.from_pretrained(demo_tasks.minilm(), num_labels=len(label_map))


def train(model: torch.nn.Module, rows: Any, collator: Collator, options: argparse.Namespace) -> dict[str, Any]:
    """Train adapter and head with transformers' Trainer; returns parameters, loss and speed."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    head = [p for name, p in trained.items() if "classifier" in name]
    adapter = [p for name, p in trained.items() if "classifier" not in name]
    sizes = [sum(p.numel() for p in part) for part in (adapter, head, model.parameters())]
    print(f"   {model.active_peft_config.recipe}: {sizes[0]:,} of {sizes[2]:,} parameters are trained, and the head")
    arguments = TrainingArguments(
        output_dir=options.out,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        lr_scheduler_type="linear",
        warmup_steps=0.1,  # a share of all steps
        logging_steps=max(1, options.steps // 4),
        remove_unused_columns=False,  # task_ids is no argument of MiniLM's, but the adapter takes it
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=SEED,
        data_seed=SEED,
    )
    groups = [{"params": adapter, "lr": LEARNING_RATE}, {"params": head, "lr": HEAD_LEARNING_RATE}]
    optimizer = torch.optim.AdamW(groups)
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator, optimizers=(optimizer, None))
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress())
    molora.attach(trainer)  # the routers' own losses and prices, exact whatever Trainer does to the loss
    output = trainer.train()
    speed = output.metrics["train_runtime"] / options.steps
    sizes_by_name = {"adapter_parameters": sizes[0], "head_parameters": sizes[1]}
    return {**sizes_by_name, "loss": output.training_loss, "seconds_per_step": speed}


class Progress(TrainerCallback):
    """One line now and then."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            print(f"      step {state.global_step:3d}   loss {float(logs['loss']):.2f}", flush=True)


def judge(model: torch.nn.Module, tasks: list[Task], label_map: LabelMap, tokenizer: Any) -> Any:
    """Accuracy per task, among the task's labels, and what the routers did meanwhile."""
    base = Base(model, tokenizer, "seq_cls")
    adapter = Adapter(model.eval(), base, list(label_map.labels), label_map, MAX_LENGTH)
    return evaluate(adapter, tasks, batch_size=50)


@torch.no_grad()
def predict(model: torch.nn.Module, tasks: list[Task], label_map: LabelMap, tokenizer: Any) -> torch.Tensor:
    """Logits (rows of all tasks, labels of all tasks)."""
    rows, collator, logits = encode_classification(tasks, tokenizer, label_map, MAX_LENGTH), Collator(tokenizer), []
    for start in range(0, len(rows), 50):
        batch = collator([rows[i] for i in range(start, min(start + 50, len(rows)))])
        batch.pop("labels")
        logits.append(model.eval()(**batch).logits)
    return torch.cat(logits)


# --- save and load ----------------------------------------------------------------------------------------------------


def save(model: Any, recipe: str, label_map: LabelMap, usage: Any, folder: Path) -> Path:
    """Save an adapter, and beside it what `molora eval` and `molora inspect` read."""
    molora.save(model, folder)
    label_map.save(folder / LABELS)
    write_json(folder / ROUTING, {"data": "evaluation", **usage.to_dict()})
    facts = {"recipe": recipe, "model": str(demo_tasks.minilm()), "tasks": list(label_map.labels)}
    write_json(folder / TRAINING, {**facts, "max_length": MAX_LENGTH})
    return folder


def write_rows(tasks: list[Task], folder: Path) -> None:
    """Write one JSONL file per task."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        lines = [json.dumps({k: v for k, v in row.items() if k != "where"}, ensure_ascii=False) for row in task.rows]
        (folder / f"{task.name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def load_in_new_process(folder: Path) -> dict[str, Any]:
    """Run `check` in another Python, which knows nothing but the files."""
    command = [sys.executable, __file__, "--check", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"the new process failed:\n{result.stderr}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def check(folder: Path) -> None:
    """Load the saved adapter, predict the saved rows, compare with the saved logits, and print the result as JSON."""
    quiet_transformers()
    label_map = LabelMap.load(folder / LABELS)
    tasks = load_tasks([f"{name}={folder.parent / 'evaluation' / name}.jsonl" for name in label_map.labels])
    tokenizer = AutoTokenizer.from_pretrained(demo_tasks.minilm())
    model = AutoModelForSequenceClassification.from_pretrained(demo_tasks.minilm(), num_labels=len(label_map))
    model = molora.load(model, folder)  # the adapter with its head; the base is checked to be the same
    after = predict(model, tasks, label_map, tokenizer)
    before = load_file(folder / LOGITS)["logits"]
    agree, rows, most = (
        int((after.argmax(1) == before.argmax(1)).sum()),
        len(after),
        float((after - before).abs().max()),
    )
    text = f"{agree} of {rows} predictions are the same; the largest difference between logits is {most:g}"
    print(json.dumps({"agree": agree, "rows": rows, "largest_difference": most, "text": text}))


# --- arguments --------------------------------------------------------------------------------------------------------


def quiet_transformers() -> None:
    """No loading bars and no list of new weights: the head is new on purpose."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    choices = sorted(SIZES)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, choices=choices, help="what to compare")
    parser.add_argument("--steps", type=int, default=80, help="optimizer steps of each recipe (default: 80)")
    parser.add_argument("--out", default="demo_out", help="folder of what is written (default: demo_out)")
    parser.add_argument("--quick", action="store_true", help="a few small steps, to see that everything works")
    parser.add_argument("--check", help=argparse.SUPPRESS)  # the new process of step 4
    options = parser.parse_args()
    missing = demo_tasks.missing_packages()
    if missing:
        parser.error(f"the demo reads files of packages that are not installed: {', '.join(missing)}; run make setup")
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(os.cpu_count() or 1)
    options.batch, options.train_rows, options.eval_rows = 32, 500, 200
    if options.quick:
        options.steps, options.batch, options.train_rows, options.eval_rows = 6, 8, 60, 24
    return options


if __name__ == "__main__":
    if "--check" in sys.argv:
        check(Path(parse_arguments().check))
    else:
        main()
