"""The commands `molora hub mix | average | negate | compress | similarity | cluster`: LoRAs by what they do.

Only the standard library is imported at the top, so that help and mistakes in the arguments need nothing else.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MIX = """Add LoRAs with a weight each, in delta space, and write the sum as one plain LoRA. It is exact, and its rank is
the sum of theirs, unless --rank or --tolerance says how much smaller it may be; the error is told.

example:
  molora hub mix news=0.7 ./law=0.3 --out blend
  molora hub mix news=1 toxic=-0.5 --rank 8 --out detoxed --json"""
AVERAGE = """Write the mean of LoRAs as one plain LoRA: of their weight changes, never of their factors.

example:
  molora hub average news law poems@2 --rank 16 --out mean"""
NEGATE = """Write a LoRA that takes away what another adds.

example:
  molora hub negate toxic --out not_toxic"""
COMPRESS = """Write the nearest LoRA of a lower rank, and show layer by layer how near it is.

example:
  molora hub compress news --rank 4 --out news_small
  molora hub compress ./news --tolerance 0.01 --out news_small"""
SIMILARITY = """Show the cosines between the weight changes of LoRAs.

example:
  molora hub similarity
  molora hub similarity news law ./poems --json"""
CLUSTER = """Group LoRAs that do alike: k-means on the directions of their weight changes (MBC, arXiv 2405.11157).

example:
  molora hub cluster --groups 3
  molora hub cluster news sport law tax --groups 2 --out groups      the average of each group, as a plain LoRA"""

DTYPES = ("float32", "bfloat16", "float16")


def add_mix(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `molora hub mix`, but for --root and --json."""
    command.add_argument(
        "adapters",
        metavar="ADAPTER=WEIGHT",
        nargs="+",
        help="folder of a LoRA, or its name in the library, and a number",
    )
    _add_smaller(command)
    _add_written(command)


def add_average(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `molora hub average`, but for --root and --json."""
    command.add_argument("adapters", metavar="ADAPTER", nargs="+", help="folders of LoRAs, or names in the library")
    _add_smaller(command)
    _add_written(command)


def add_negate(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `molora hub negate`, but for --root and --json."""
    command.add_argument("adapter", metavar="ADAPTER", help="folder of a LoRA, or its name in the library")
    _add_written(command)


def add_compress(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `molora hub compress`, but for --root and --json."""
    command.add_argument("adapter", metavar="ADAPTER", help="folder of a LoRA, or its name in the library")
    _add_smaller(command)
    _add_written(command)


def add_similarity(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `molora hub similarity`, but for --root and --json."""
    _add_several(command)


def add_cluster(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `molora hub cluster`, but for --root and --json."""
    _add_several(command)
    command.add_argument("--groups", type=int, required=True, metavar="K", help="how many")
    command.add_argument("--seed", type=int, default=0, help="of the first centres (default: 0)")
    command.add_argument("--out", metavar="DIR", help="a new folder for the average of each group: DIR/group_0, ...")
    command.add_argument("--rank", type=int, metavar="R", help="of the averages at most (default: what is exact)")


def _add_several(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "adapters",
        metavar="ADAPTER",
        nargs="*",
        help="folders of LoRAs, or names in the library (default: every LoRA of the library)",
    )


def _add_smaller(command: argparse.ArgumentParser) -> None:
    command.add_argument("--rank", type=int, metavar="R", help="of a layer at most (default: as many as are needed)")
    command.add_argument(
        "--tolerance", type=float, metavar="X", help="relative error that a layer may have (default: 0, but rounding)"
    )


def _add_written(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", required=True, metavar="DIR", help="the folder to write; replaced as a whole")
    command.add_argument("--dtype", choices=DTYPES, default="float32", help="of what is written (default: float32)")


# --- what they do -----------------------------------------------------------------------------------------------------


def mix(args: argparse.Namespace, hub: Any) -> int:
    """Run `molora hub mix`; returns the exit code."""
    from ..errors import ConfigError, raise_all
    from .arithmetic import mix as weighted

    sources, weights, problems = [], [], []
    for text in args.adapters:
        source, _, number = text.rpartition("=")
        try:
            weights.append(float(number))
            sources.append(source)
        except ValueError:
            source = ""
        if not source:
            problems.append(f"'{text}' is not ADAPTER=WEIGHT; write {text.partition('=')[0] or 'news'}=0.7")
    raise_all(problems, ConfigError, "every adapter needs a weight")
    changes = _changes(sources, hub)
    parts = {label: weight for label, weight in zip(sources, weights, strict=True)}
    if len(parts) < len(sources):
        raise ConfigError("an adapter is there twice; give it once, with the sum of its weights")
    return _write(args, weighted(changes, weights, name=Path(args.out).name), {"weights": parts})


def average(args: argparse.Namespace, hub: Any) -> int:
    """Run `molora hub average`; returns the exit code."""
    from .arithmetic import average as mean

    changes = _changes(args.adapters, hub)
    return _write(args, mean(changes, name=Path(args.out).name), {"average_of": list(args.adapters)})


def negate(args: argparse.Namespace, hub: Any) -> int:
    """Run `molora hub negate`; returns the exit code."""
    from .arithmetic import negate as less

    (change,) = _changes([args.adapter], hub)
    return _write(args, less(change, name=Path(args.out).name), {"negation_of": args.adapter})


def compress(args: argparse.Namespace, hub: Any) -> int:
    """Run `molora hub compress`; returns the exit code."""
    (change,) = _changes([args.adapter], hub)
    return _write(args, change, {"compressed_from": args.adapter}, by_layer=True)


def similarity(args: argparse.Namespace, hub: Any) -> int:
    """Run `molora hub similarity`; returns the exit code."""
    from ..reports.tables import table
    from .arithmetic import similarity as cosines

    sources = _sources(args, hub)
    found = cosines(_changes(sources, hub)).tolist()
    if args.json:
        print(json.dumps({"adapters": sources, "similarity": found}, indent=1))
    else:
        print(table(["cosine", *sources], [[name, *row] for name, row in zip(sources, found, strict=True)]))
    return 0


def cluster(args: argparse.Namespace, hub: Any) -> int:
    """Run `molora hub cluster`; returns the exit code."""
    from ..errors import ConfigError
    from ..reports.tables import table
    from .arithmetic import average as mean
    from .arithmetic import compress as smaller
    from .arithmetic import save_change
    from .clusters import cluster as grouped

    target = Path(args.out).expanduser() if args.out is not None else None
    if target is not None and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"'{target}' exists and is not an empty folder; give a new one to --out")
    if args.rank is not None and target is None:
        raise ConfigError("--rank is of the averages that --out writes; give --out DIR too, or leave --rank out")
    sources = _sources(args, hub)
    changes = _changes(sources, hub)
    found = grouped(changes, args.groups, seed=args.seed)
    groups: list[dict[str, Any]] = []
    for number, members in enumerate(found.members):
        inside = [found.similarity[i, j].item() for i in members for j in members if i < j]
        groups.append(
            {"group": number, "adapters": [sources[i] for i in members], "least_cosine": min(inside, default=1)}
        )
    centres = []
    if target is not None:  # all are made before one is written
        centres = [smaller(mean([changes[i] for i in members]), args.rank) for members in found.members]
    for group, centre in zip(groups, centres, strict=bool(centres)):
        group |= {"out": str(save_change(centre.change, target / f"group_{group['group']}")), "error": centre.error}
    if args.json:
        print(json.dumps({"groups": groups, "spread": found.spread}, indent=1))
        return 0
    header = ["group", "adapters", "least cosine", *(["rank error", "average in"] if groups and centres else [])]
    rows = [
        [g["group"], ", ".join(g["adapters"]), float(g["least_cosine"]), *([g["error"], g["out"]] if centres else [])]
        for g in groups
    ]
    print(table(header, rows, left=(0, 1, 4)))
    print(f"\nspread {found.spread:.3f}: squared distances to the mean of each group, of changes with norm 1")
    return 0


def _sources(args: argparse.Namespace, hub: Any) -> list[str]:
    """Return what was named, or the newest version of every LoRA of the library."""
    from ..errors import ConfigError

    found = args.adapters or [str(entry.ref) for entry in hub.list() if entry.kind == "lora" and not entry.problems]
    if not found:
        raise ConfigError(f"the library {hub.where} holds no LoRA; name adapters, or say where they are with --root")
    if len(set(found)) < len(found):
        raise ConfigError(f"'{next(name for name in found if found.count(name) > 1)}' is there twice")
    return list(found)


def _changes(sources: Sequence[str], hub: Any) -> list[Any]:
    """Return what LoRAs do, each called as it was given; lists all that cannot be read."""
    from dataclasses import replace

    from ..errors import ConfigError, LoadError, raise_all
    from .arithmetic import read_change
    from .ingredients import contents_of

    found, problems = [], []
    for source in sources:
        try:
            found.append(replace(read_change(contents_of(source, hub).folder), name=source))
        except (ConfigError, LoadError) as error:
            problems.append(str(error))
    raise_all(problems, LoadError, "not every adapter can be read")
    return found


def _write(args: argparse.Namespace, change: Any, origin: Mapping[str, Any], by_layer: bool = False) -> int:
    """Write a change, of a lower rank where that was asked for, and tell what it is."""
    import torch

    from ..reports.tables import short_names, table
    from .arithmetic import compress as smaller
    from .arithmetic import save_change

    before, error, errors = change.ranks, 0.0, {}
    rank, tolerance = getattr(args, "rank", None), getattr(args, "tolerance", None)
    if by_layer or rank is not None or tolerance is not None:
        made = smaller(change, rank, tolerance or 0.0)
        change, error, errors = made.change, made.error, made.errors
    save_change(change, Path(args.out).expanduser(), dtype=getattr(torch, args.dtype))
    ranks = change.ranks
    facts = {"out": args.out, **origin, "layers": len(ranks), "norm": change.norm, "error": error, "ranks": ranks}
    if args.json:
        print(json.dumps(facts | ({"errors": dict(errors)} if errors else {}), indent=1))
        return 0
    if by_layer:
        names = short_names(list(ranks))
        rows = [[names[path], before[path], ranks[path], f"{errors[path]:.2g}"] for path in ranks]
        print(table(["layer", "rank", "now", "error"], rows) + "\n")
    spread = "-".join(map(str, sorted({min(ranks.values()), max(ranks.values())})))
    print(f"{len(ranks)} layers of rank {spread}, norm {change.norm:.4g}, relative error {error:.2g}")
    print(f"saved to {args.out}, a plain LoRA; keep it in the library: molora hub add {args.out} NAME")
    return 0
