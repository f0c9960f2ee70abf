"""Speed and memory of molora beside the frozen base, PEFT's LoRA, X-LoRA, Arrow and adapter_names, and expert loops.

    python -m benchmarks.speed                        # everything, in about 16 minutes
    python -m benchmarks.speed --only training,decode --minutes 5
    python -m benchmarks.speed --quick                # tiny shapes: shows that it works, measures nothing

Writes speed.json, speed.md and speed.png into benchmarks/results. How it measures is told in timing.py.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

# Before torch and transformers are imported: they read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from . import report, sections
from .budget import Budget, Part
from .mechanisms import SHAPE, mechanisms
from .models import Shape
from .scaling import scaling
from .sections import FULL, QUICK, Field, Sizes


def plan(sizes: Sizes) -> dict[str, Part]:
    """Return the sections by name; their seconds were measured with FULL sizes on two cores, one of them at work."""
    narrow, wide = sizes.narrow, sizes.wide
    deep = narrow.with_layers(sizes.decode_layers)
    found = {
        "training": Part(partial(_whole, sections.training, narrow), 80, 52, 26),
        "prefill": Part(partial(_whole, sections.prefill, narrow), 35, 25, 12),
        "decode": Part(partial(_whole, sections.decode, deep), 45, 1.8, 12),
        "wide training": Part(partial(_whole, sections.training, wide), 60, 37, 9),
        "wide prefill": Part(partial(_whole, sections.prefill, wide), 30, 23, 5),
        "wide decode": Part(partial(_whole, sections.decode, wide), 15, 0.7, 4),
    }
    for rows, layers in sizes.batches:
        few = rows <= 16
        costs = (40, 3, 12) if few else (60, 2.4, 10)
        found[f"tenants {rows}"] = Part(partial(_tenants, rows, layers), *costs)
    for what, setup, seconds, share in (
        ("experts", 5, 3.0, 5),
        ("active", 5, 2.5, 3),
        ("length", 5, 2.5, 3),
        ("batch", 1, 0.6, 1),
    ):
        found[f"by {what}"] = Part(partial(_scaling, what), setup, seconds, share)
    for name, decode, seconds in (("recipes training", False, 12), ("recipes decode", True, 1.5)):
        found[name] = Part(partial(_mechanisms, decode), 25, seconds, 4)
    found["slots"] = Part(sections.slots, 60, 0, 1)
    return found


def _whole(section: Callable[..., dict[str, Any]], shape: Shape, field: Field, until: float) -> dict[str, Any]:
    return section(field, shape, until)


def _tenants(rows: int, layers: int, field: Field, until: float) -> dict[str, Any]:
    return sections.tenants(field, rows, layers, until)


def _mechanisms(decode: bool, field: Field, until: float) -> dict[str, Any]:
    shape = QUICK.narrow if field.sizes is QUICK else SHAPE
    return mechanisms(field, shape, until, decode=decode)


def _scaling(what: str, field: Field, until: float) -> dict[str, Any]:
    return scaling(field, what, until)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", help="sections to run, by the beginnings of their names, separated by commas")
    parser.add_argument("--minutes", type=float, default=20.0, help="about how long to measure (default 20)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to show that it works")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="where the results go")
    options = parser.parse_args(arguments)
    sizes = QUICK if options.quick else FULL
    chosen = plan(sizes)
    if options.only:
        wanted = [name.strip() for name in options.only.split(",")]
        unknown = [name for name in wanted if not any(known.startswith(name) for known in chosen)]
        if unknown:
            parser.error(f"no section begins with {', '.join(unknown)}; there are: {', '.join(chosen)}")
        chosen = {name: part for name, part in chosen.items() if any(name.startswith(w) for w in wanted)}

    def save(run: dict[str, Any]) -> None:
        report.write({**run, "quick": options.quick}, options.out)

    measure(sizes, chosen, 0.0 if options.quick else options.minutes, save)
    print(f"wrote speed.json, speed.md and speed.png to {options.out}")
    return 0


def measure(
    sizes: Sizes,
    chosen: dict[str, Part],
    minutes: float,
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Run the sections inside of a budget (see budget.py); what one does not use, the next ones get.

    The results so far are saved after every section, so that a run that is cut short leaves what it measured.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logging.disable(logging.WARNING)
    where, field = report.machine(), Field(sizes)
    start = time.monotonic()
    budget = Budget(minutes, chosen)
    results: dict[str, dict[str, Any]] = {}
    done: dict[str, Any] = {}
    try:
        for name, part in chosen.items():
            began = time.monotonic()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                results[name] = part.run(field, budget.begin(name))
            budget.finish(name, results[name])
            gc.collect()
            print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
            took = (time.monotonic() - start) / 60
            done = {"machine": where, "minutes": took, "note": budget.note(), "goals": report.goals(results)}
            done["sections"] = results
            save(done)
    finally:
        field.close()
        logging.disable(logging.NOTSET)
    return done


if __name__ == "__main__":
    sys.exit(main())
