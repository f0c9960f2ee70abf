"""The commands `molora compose` and `molora export`: their arguments, and what they print.

Only the standard library is imported at the top, so that help and mistakes in the arguments need nothing else.
"""

from __future__ import annotations

import argparse
import ast
import json
from typing import Any

HUB_HELP = "folder of the library that names are looked up in (default: $MOLORA_HUB, ./adapters_hub, or molora's own)"


def add_compose(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `molora compose`."""
    command.add_argument(
        "adapters", metavar="[NAME=]ADAPTER", nargs="+", help="folders of LoRAs, names in the library, or on the Hub"
    )
    command.add_argument("--model", required=True, help="folder or Hub name of the base model")
    command.add_argument("--router", default="uniform", help="uniform, arrow, ..., or a recipe (default: uniform)")
    command.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="of the router")
    command.add_argument("--slots", type=int, help="room for experts to come (default: as many as there are)")
    command.add_argument("--max-rank", type=int, metavar="R", help="of experts to come (default: the largest here)")
    command.add_argument("--target", action="append", metavar="NAME", help="further layers, such as q_proj")
    _add_shared(command)


def add_export(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `molora export`."""
    command.add_argument(
        "adapter", metavar="ADAPTER", help="folder or Hub name of a mixture, or its name in the library"
    )
    command.add_argument("--model", help="folder or Hub name of the base model (default: as the adapter says)")
    command.add_argument("--expert", help="name or number of the one expert to write")
    command.add_argument(
        "--weight", action="append", default=[], metavar="NAME=W", help="of an expert in a fixed mixture"
    )
    _add_shared(command)


def _add_shared(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", required=True, metavar="DIR", help="the folder to write; replaced as a whole")
    command.add_argument("--hub", metavar="DIR", help=HUB_HELP)
    command.add_argument("--json", action="store_true", help="print JSON")


def compose(args: argparse.Namespace) -> int:
    """Run `molora compose`; returns the exit code."""
    from ..checkpoint import save
    from ..control import routed_layers
    from ..errors import ConfigError
    from .bases import base_model
    from .commands import root_of
    from .compose import compose as make
    from .compose import live
    from .ingredients import contents_of, label_of

    hub = root_of(args.hub, writes=False)
    given = [_named(text) for text in args.adapters]
    names = [name or label_of(source, number) for number, (name, source) in enumerate(given)]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"two adapters are called '{twice}'; write NAME=ADAPTER to call one something else")
    adapters = dict(zip(names, (source for _, source in given), strict=True))
    options = _options(args.option)
    router: Any = {"name": args.router, **options} if options else args.router
    model = base_model(args.model, contents_of(given[0][1], hub).folder)
    room = {"slots": args.slots, "max_rank": args.max_rank, "targets": args.target}
    mixed = make(model, adapters, router, hub=hub, **room)
    config = mixed.peft_config["default"]
    config.base_model_name_or_path = config.base_model_name_or_path or args.model
    save(mixed, args.out)
    mixture, layers = live(mixed), routed_layers(mixed)
    ranks = sorted({rank for layer in layers.values() for rank in layer.molora_bank["default"].ranks})
    facts = {"out": args.out, "experts": mixture.names, "slots": mixture.slots, "router": args.router}
    facts |= {"layers": len(layers), "ranks": ranks}
    if args.json:
        print(json.dumps(facts, indent=1))
        return 0
    print(f"{len(mixture.names)} experts in {len(layers)} layers: {', '.join(mixture.names)}")
    print(f"router: {args.router}; slots: {mixture.slots}, {mixture.free} free; ranks: {', '.join(map(str, ranks))}")
    print(f"saved to {args.out}; one expert back as a plain LoRA: molora export {args.out} --expert {mixture.names[0]}")
    return 0


def export(args: argparse.Namespace) -> int:
    """Run `molora export`; returns the exit code."""
    import warnings

    from ..checkpoint import load
    from ..errors import ConfigError
    from ..to_peft import export_peft
    from .bases import base_model
    from .commands import root_of
    from .compose import live
    from .ingredients import contents_of

    if (args.expert is None) == (not args.weight):
        raise ConfigError("give either --expert NAME, or --weight NAME=W for each expert of a fixed mixture")
    weights = {}
    for pair in args.weight:
        name, _, number = pair.partition("=")
        try:
            weights[name] = float(number)
        except ValueError:
            raise ConfigError(f"--weight '{pair}' is not NAME=NUMBER; write news=0.7") from None
    contents = contents_of(args.adapter, root_of(args.hub, writes=False))
    named = (contents.config or {}).get("base_model_name_or_path")
    if not (args.model or named):
        raise ConfigError(f"adapter '{args.adapter}' does not say which base it is for; give --model")
    base = base_model(args.model or named, contents.folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # free slots do not matter here
        model = load(base, contents.folder)
    if args.expert is not None:
        expert = int(args.expert) if args.expert.isdigit() else args.expert
        if isinstance(expert, int) and expert >= (slots := live(model).slots):
            raise ConfigError(f"there is no expert {expert}; '{args.adapter}' has 0 to {slots - 1}")
        export_peft(model, args.out, expert=expert)
        what = f"expert {args.expert}"
    else:
        export_peft(model, args.out, gates=live(model).gates(weights).flatten())
        what = " + ".join(f"{weight:g} {name}" for name, weight in weights.items())
    if args.json:
        print(json.dumps({"out": args.out, "expert": args.expert, "weights": weights}, indent=1))
    else:
        print(f"{what} is in {args.out}, a plain LoRA; molora is not needed to load it")
    return 0


def _named(text: str) -> tuple[str | None, str]:
    name, equals, source = text.partition("=")
    return (name, source) if equals and name and "/" not in name else (None, text)


def _options(pairs: list[str]) -> dict[str, Any]:
    from ..errors import ConfigError

    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (equals and key):
            raise ConfigError(f"--option '{pair}' is not KEY=VALUE; write top_k=1")
        words = {"true": True, "false": False, "null": None, "none": None}
        try:
            options[key] = words[value.lower()] if value.lower() in words else ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value  # a plain word
    return options
