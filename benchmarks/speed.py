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
from .scaling import scaling
from .sections import FULL, QUICK, Field, Sizes

Section = Callable[[Field, float], dict[str, Any]]


def plan(sizes: Sizes) -> dict[str, tuple[float, Section]]:
    """Return the sections by name, with their shares of the time; the building of models counts in."""
    narrow, wide = sizes.narrow, sizes.wide
    found: dict[str, tuple[float, Section]] = {
        "training": (26, lambda field, until: sections.training(field, narrow, until)),
        "prefill": (12, lambda field, until: sections.prefill(field, narrow, until)),
        "decode": (12, lambda field, until: sections.decode(field, narrow.with_layers(sizes.decode_layers), until)),
        "wide training": (9, lambda field, until: sections.training(field, wide, until)),
        "wide prefill": (5, lambda field, until: sections.prefill(field, wide, until)),
        "wide decode": (4, lambda field, until: sections.decode(field, wide, until)),
    }
    for rows, layers in sizes.batches:
        share = 12 if rows <= 16 else 10
        found[f"tenants {rows}"] = (share, partial(_tenants, rows, layers))
    for what, share in (("experts", 5), ("active", 3), ("length", 3), ("batch", 1)):
        found[f"by {what}"] = (share, partial(_scaling, what))
    found["slots"] = (4, lambda field, until: sections.slots(field, until))
    return found


def _tenants(rows: int, layers: int, field: Field, until: float) -> dict[str, Any]:
    return sections.tenants(field, rows, layers, until)


def _scaling(what: str, field: Field, until: float) -> dict[str, Any]:
    return scaling(field, what, until)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", help="sections to run, by the beginnings of their names, separated by commas")
    parser.add_argument("--minutes", type=float, default=16.0, help="about how long to measure (default 16)")
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
    chosen: dict[str, tuple[float, Section]],
    minutes: float,
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Run the sections inside of a budget; what one does not use, the next ones get.

    The results so far are saved after every section, so that a run that is cut short leaves what it measured.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logging.disable(logging.WARNING)
    where, field = report.machine(), Field(sizes)
    start = time.monotonic()
    end = start + 60 * minutes
    left = sum(share for share, _ in chosen.values())
    results: dict[str, dict[str, Any]] = {}
    done: dict[str, Any] = {}
    try:
        for name, (share, run) in chosen.items():
            began = time.monotonic()
            until = began + max(0.0, end - began) * share / left
            left -= share
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                results[name] = run(field, until)
            gc.collect()
            print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
            took = (time.monotonic() - start) / 60
            done = {"machine": where, "minutes": took, "goals": report.goals(results), "sections": results}
            save(done)
    finally:
        field.close()
        logging.disable(logging.NOTSET)
    return done


if __name__ == "__main__":
    sys.exit(main())
