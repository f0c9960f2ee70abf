"""Serving under load: many adapters in one batch, many registered, mixtures, greedy tenants, HTTP; and beside PEFT.

    python -m benchmarks.serve                          # everything, in about 10 minutes
    python -m benchmarks.serve --only decode,server --minutes 4
    python -m benchmarks.serve --only peers --vllm ~/vllm-environment
    python -m benchmarks.serve --quick                  # tiny shapes: shows that it works, measures nothing

Writes serve.json, serve.md and serve.png into benchmarks/results/serve; exits with 1 when a goal is missed. All loads
are bounded in number or time, and the server under test listens on loopback alone.
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

from . import report, serve_http, serve_peers, serve_report
from . import serve_sections as sections
from .budget import Budget, Part
from .serve_field import FULL, LARGE, QUICK, Field, Sizes, quiet


def plan(vllm: Path | None = None) -> dict[str, Part]:
    """Return the sections by name; their seconds were measured with FULL sizes on two cores."""
    return {
        "decode": Part(sections.decode, 35, 36, 30),
        "programs": Part(sections.programs, 25, 22, 15),
        "registered": Part(sections.registered, 20, 15, 15),
        "working set": Part(sections.working_set, 15, 12, 20),
        "fairness": Part(sections.fairness, 50, 0, 1),
        "peers": Part(partial(serve_peers.peers, vllm=vllm), 30, 25, 5),
        "server": Part(serve_http.server, 60, 0, 1),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", help="sections to run, by the beginnings of their names, separated by commas")
    parser.add_argument("--minutes", type=float, default=10.0, help="about how long to measure (default 10)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to show that it works")
    parser.add_argument("--large", action="store_true", help="a model of 245 M parameters; for --only server")
    parser.add_argument("--vllm", type=Path, metavar="VENV", help="an environment with vLLM, to run beside the others")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "serve", help="for the results")
    options = parser.parse_args(arguments)
    chosen = plan(options.vllm)
    if options.only:
        wanted = [name.strip() for name in options.only.split(",")]
        unknown = [name for name in wanted if not any(known.startswith(name) for known in chosen)]
        if unknown:
            parser.error(f"no section begins with {', '.join(unknown)}; there are: {', '.join(chosen)}")
        chosen = {name: part for name, part in chosen.items() if any(name.startswith(w) for w in wanted)}

    def save(run: dict[str, Any]) -> None:
        serve_report.write({**run, "quick": options.quick}, options.out)

    sizes = QUICK if options.quick else LARGE if options.large else FULL
    done = measure(sizes, chosen, 0.0 if options.quick else options.minutes, save)
    print(f"wrote serve.json, serve.md and serve.png to {options.out}")
    missed = [goal["goal"] for goal in done["goals"] if goal["met"] is False and not options.quick]
    for text in missed:
        print(f"missed: {text}", file=sys.stderr)
    return 1 if missed else 0


def measure(
    sizes: Sizes, chosen: dict[str, Part], minutes: float, save: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Run the sections inside of a budget (see budget.py); what one does not use, the next ones get.

    The results so far are saved after every section, so that a run that is cut short leaves what it measured.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    where, start = report.machine(), time.monotonic()
    budget, results, done = Budget(minutes, chosen), {}, {}
    with quiet():
        field = Field(sizes)
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
            done = {"machine": where, "minutes": took, "note": budget.note(), "model": str(sizes.shape)}
            done |= {"goals": serve_report.goals(results), "sections": results}
            save(done)
    finally:
        field.close()
        logging.disable(logging.NOTSET)
        torch.set_num_threads(threads)
    return done


if __name__ == "__main__":
    sys.exit(main())
