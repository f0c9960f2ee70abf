"""What the commands of the command line do: call the library and print."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import warnings
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

from .config import recipe_names
from .errors import ConfigError, LoadError


def run(args: argparse.Namespace) -> int:
    """Run one command; returns the exit code."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # what matters is said by molora
    getLogger("bitsandbytes").setLevel(ERROR)
    commands = {"train": train, "eval": evaluate, "inspect": inspect, "recipes": recipes, "doctor": doctor, "hub": hub}
    commands |= {"compose": compose, "export": export, "prompts": prompts, "migrate": migrate, "tenants": tenants}
    commands |= {"serve": serve, "route": route}
    command = commands[args.command]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=UserWarning, module=r"molora\.")
        warnings.showwarning = lambda message, *rest, **more: note(str(message))
        return command(args)


def note(text: str) -> None:
    """Print a remark on stderr."""
    print(f"note: {text}", file=sys.stderr)


def _fields(pairs: list[str]) -> dict[str, str]:
    fields = {}
    for pair in pairs:
        ours, equals, theirs = pair.partition("=")
        if not (equals and ours and theirs):
            raise ConfigError(f"--field '{pair}' is not OURS=THEIRS; write text=headline")
        fields[ours] = theirs
    return fields


# --- train ------------------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> int:
    """Train and save an adapter."""
    from .reports.tables import metrics_table
    from .train.run import train as run_training
    from .train.settings import TrainSettings

    names = {f.name for f in dataclasses.fields(TrainSettings)} - {"fields", "output"}
    given = {name: value for name, value in vars(args).items() if name in names}
    output = args.output or str(Path("runs", Path(args.recipe).stem))
    talks = os.environ.get("RANK", "0") == "0"  # one of the processes that torchrun starts
    settings = TrainSettings(**given, fields=_fields(args.field), output=output)
    result = run_training(settings, tell=note if talks else lambda text: None)
    if not talks:
        return 0
    print(
        f"{result.steps} step{'s' * (result.steps != 1)} in {result.seconds:.1f} s; "
        f"{result.trainable:,} of {result.total:,} parameters trained"
        + ("" if result.train_loss is None else f"; mean training loss {result.train_loss:.4f}")
    )
    if result.metrics:
        print("\n" + metrics_table(result.metrics) + "\n")
    print(f"saved to {result.output}; look inside with: molora inspect {result.output}")
    return 0


# --- eval and inspect -------------------------------------------------------------------------------------------------


def _read(args: argparse.Namespace, max_new_tokens: int) -> Any:
    from .train.evaluate import evaluate_adapter

    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"--limit must be at least 1, got {args.limit}")
    return evaluate_adapter(
        args.adapter,
        args.data,
        model=args.model,
        fields=_fields(args.field),
        quantize=args.quantize,
        dtype=args.dtype,
        batch_size=args.batch_size,
        limit=args.limit,
        max_new_tokens=max_new_tokens,
    )


def evaluate(args: argparse.Namespace) -> int:
    """Evaluate a saved adapter on data."""
    from .reports.tables import metrics_table

    result = _read(args, args.max_new_tokens)
    print(
        json.dumps({"adapter": args.adapter, "tasks": result.tasks}, indent=1)
        if args.json
        else metrics_table(result.tasks)
    )
    return 0


def inspect(args: argparse.Namespace) -> int:
    """Show the routing of a saved adapter."""
    from .errors import did_you_mean
    from .files import local_folder
    from .reports.heatmap import write_png
    from .reports.tables import routing_table
    from .routing.metrics import Usage
    from .train.disk import ROUTING, read_json

    if args.data:
        usage, origin = _read(args, max_new_tokens=0).usage, "fresh data"
    else:
        path = local_folder(args.adapter) / ROUTING
        if not path.is_file():
            raise LoadError(f"adapter '{args.adapter}' holds no {ROUTING}, where training records routing; give --data")
        content = read_json(path, "routing statistics")
        usage, origin = Usage.from_dict(content), f"{content.get('data', 'recorded')} data of the training run"
    if args.task is not None and args.task not in usage.counted_tasks:
        raise ConfigError(f"task '{args.task}' was not counted{did_you_mean(args.task, usage.counted_tasks)}")
    if args.png:
        write_png(usage, args.png, f"{Path(args.adapter).name}: {origin}")
    if args.json:
        print(json.dumps(_usage_json(usage, args.task, origin), indent=1))
    else:
        print(routing_table(usage, args.task))
        print(f"counted on {origin}")
    if args.png:
        note(f"wrote {args.png}")
    return 0


def _usage_json(usage: Any, task: str | None, origin: str) -> dict[str, Any]:
    def figures(site: str, one: str | None) -> Any:
        found = usage.figures(site, one)
        return None if found is None else dataclasses.asdict(found)

    return {
        "data": origin,
        "dead_below": usage.dead_below,
        "sites": {
            site: {
                "shared": usage.group(site) is not None,
                "all": figures(site, None),
                "tasks": {one: figures(site, one) for one in usage.counted_tasks if task in (None, one)},
            }
            for site in usage.sites
        },
    }


# --- recipes ----------------------------------------------------------------------------------------------------------


def recipes(args: argparse.Namespace) -> int:
    """List recipes or components."""
    from .listing import components, recipe_facts
    from .reports.tables import table

    if args.components:
        found = components()
        if args.json:
            print(json.dumps(found, indent=1))
            return 0
        for kind, entries in found.items():
            print(f"{kind}")
            for entry in entries:
                options = ", ".join(entry["options"])
                print(f"  {entry['name']:<23} {entry['summary']}" + (f"\n{'':26}options: {options}" if options else ""))
        return 0
    listed = [recipe_facts(name) for name in recipe_names()]
    if args.json:
        print(json.dumps(listed, indent=1))
    else:
        print(
            table(
                ["recipe", "arXiv", "what"], [[r["name"], r["arxiv"] or "-", r["what"]] for r in listed], left=(0, 1, 2)
            )
        )
    return 0


# --- doctor -----------------------------------------------------------------------------------------------------------


def doctor(args: argparse.Namespace) -> int:
    """Examine a recipe on a model."""
    from .reports.tables import findings_text
    from .train.checkup import checkup

    findings = checkup(
        args.recipe,
        args.model,
        args.data or (),
        adapter=args.adapter,
        task_type=args.task_type,
        quantize=args.quantize,
        dtype=args.dtype,
        overrides=args.set,
        fields=_fields(args.field),
        max_length=args.max_length,
        grad_accum=args.grad_accum,
        checkpointing=args.gradient_checkpointing,
    )
    print(json.dumps([dataclasses.asdict(f) for f in findings], indent=1) if args.json else findings_text(findings))
    return int(any(finding.level == "fail" for finding in findings))


# --- hub --------------------------------------------------------------------------------------------------------------


def hub(args: argparse.Namespace) -> int:
    """Run a command on a library of adapters."""
    from .hub.commands import run

    return run(args)


def compose(args: argparse.Namespace) -> int:
    """Make a mixture of finished LoRAs."""
    from .hub.compose_commands import compose as run

    return run(args)


def export(args: argparse.Namespace) -> int:
    """Write an expert, or a fixed mixture, as a plain LoRA."""
    from .hub.compose_commands import export as run

    return run(args)


def prompts(args: argparse.Namespace) -> int:
    """Fit a selector on example prompts, or ask it."""
    from .prompts.command import run

    return run(args)


def migrate(args: argparse.Namespace) -> int:
    """Bring what other libraries have saved into molora."""
    from .hub.migrate_commands import run

    return run(args)


def tenants(args: argparse.Namespace) -> int:
    """Say who may use a server."""
    try:
        from .serve.tenants.command import run
    except ModuleNotFoundError as error:
        raise ConfigError(f"package '{error.name}' is missing: pip install 'molora[serve]'") from None
    return run(args)


def serve(args: argparse.Namespace) -> int:
    """Serve a model until told to stop."""
    from .serve.command import run as run_server

    return run_server(args)


def route(args: argparse.Namespace) -> int:
    """Pick adapters for another server until told to stop."""
    try:
        from .serve.proxy.command import run as run_router
    except ModuleNotFoundError as error:
        raise ConfigError(f"package '{error.name}' is missing: pip install 'molora[serve]'") from None
    return run_router(args)
