"""The commands `molora migrate xlora | moe-peft | mttl | mergekit`: their arguments, and what they print.

Only the standard library is imported at the top, so that help and mistakes in the arguments need nothing else.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..subcommands import add_commands

XLORA = """Make a mixture of an X-LoRA folder, as PEFT or the authors' package has written it, that computes the same.

example:
  molora migrate xlora ./xlora --model ./llama --out mixed
  molora migrate xlora ./xlora --model ./llama --expert news=./news --expert law=./law --out mixed"""
MOE_PEFT = """Make a mixture (the recipe mixlora) of a MixLoRA checkpoint of MoE-PEFT. Its pickle is read as tensors
alone: no code of it is run.

example:
  molora migrate moe-peft ./mixlora_0 --model ./llama --out mixed"""
MTTL = """Write experts of a library of mttl as plain LoRAs that any PEFT loads, each in a folder of its name.

example:
  molora migrate mttl ./library --out loras
  molora migrate mttl ./library cook bake --out loras"""
MERGEKIT = """Make a mixture of the LoRAs that a mergekit-moe file names, its routers started from the file's prompts.

example:
  molora migrate mergekit moe.yaml --model ./llama --out mixed

The file holds gate_mode (hidden or hidden_avg), experts_per_token, and for each of its experts source_model (a LoRA),
positive_prompts and perhaps negative_prompts."""


def add_migrate(command: argparse.ArgumentParser) -> None:
    """Add the commands of `molora migrate`."""
    parts = (
        ("xlora", _xlora, XLORA),
        ("moe-peft", _moe_peft, MOE_PEFT),
        ("mttl", _mttl, MTTL),
        ("mergekit", _mergekit, MERGEKIT),
    )
    add_commands(command, "migrate", parts)


def _xlora(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", metavar="FOLDER", help="what X-LoRA has saved")
    command.add_argument(
        "--expert",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="a LoRA that it was trained with, in that order (default: those inside FOLDER)",
    )
    _model_and_out(command)


def _moe_peft(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", metavar="FOLDER", help="of adapter_config.json and adapter_model.bin")
    _model_and_out(command)


def _mttl(command: argparse.ArgumentParser) -> None:
    command.add_argument("library", metavar="LIBRARY", help="folder of .ckpt and .meta files")
    command.add_argument("names", metavar="NAME", nargs="*", help="of an expert (default: all that are not deleted)")
    command.add_argument("--out", required=True, metavar="DIR", help="where to write DIR/NAME for each expert")


def _mergekit(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", metavar="FILE", help="the YAML that mergekit-moe would read")
    command.add_argument("--hub", metavar="DIR", help="folder of the library in which LoRAs are looked up by name")
    _model_and_out(command, "(default: base_model of FILE)")


def _model_and_out(command: argparse.ArgumentParser, default: str | None = None) -> None:
    what = "folder or Hub name of the base model"
    command.add_argument("--model", required=default is None, help=f"{what} {default}" if default else what)
    command.add_argument("--out", required=True, metavar="DIR", help="the folder to write; replaced as a whole")


# --- what they do -----------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    """Run one command; returns the exit code."""
    return {"xlora": xlora, "moe-peft": moe_peft, "mttl": mttl, "mergekit": mergekit}[args.migrate_command](args)


def xlora(args: argparse.Namespace) -> int:
    """Run `molora migrate xlora`; returns the exit code."""
    from ..errors import ConfigError, raise_all
    from .bases import base_model
    from .migrate import from_xlora

    given = [text.partition("=")[::2] for text in args.expert]
    names = [name for name, _ in given]
    problems = [f"--expert '{text}' is not NAME=FOLDER; write news=./news" for text in args.expert if "=" not in text]
    problems += [f"two experts are called '{name}'" for name in sorted({n for n in names if names.count(n) > 1})]
    raise_all(problems, ConfigError, "these experts cannot be used")
    model = base_model(args.model, _folder(args.folder), "CAUSAL_LM")
    return _save(args, from_xlora(model, _folder(args.folder), dict(given) or None))


def moe_peft(args: argparse.Namespace) -> int:
    """Run `molora migrate moe-peft`; returns the exit code."""
    from .bases import base_model
    from .migrate import from_mixlora

    folder = _folder(args.folder)
    return _save(args, from_mixlora(base_model(args.model, folder, "CAUSAL_LM"), folder))


def mttl(args: argparse.Namespace) -> int:
    """Run `molora migrate mttl`; returns the exit code."""
    import shutil
    import tempfile

    from ..errors import LoadError, raise_all
    from ..files import replacing
    from .migrate.mttl import experts_of, from_mttl

    library, target = _folder(args.library), Path(args.out).expanduser()
    names = args.names or experts_of(library)
    problems = [] if names else [f"'{library}' holds no expert; an expert is NAME.meta and NAME.ckpt"]
    written: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:  # all are read before one is written
        for name in names:
            try:
                from_mttl(library, name, Path(scratch, name))
            except LoadError as error:
                problems.append(str(error))
        raise_all(problems, LoadError, "nothing was written")
        for name in names:
            with replacing(target / name) as draft:
                for path in Path(scratch, name).iterdir():
                    shutil.copyfile(path, draft / path.name)
            written[name] = str(target / name)
    if args.json:
        print(json.dumps({"written": written}, indent=1))
    else:
        for name, folder in written.items():
            print(f"{name} is in {folder}, a plain LoRA; keep it in a library: molora hub add {folder} {name}")
    return 0


def mergekit(args: argparse.Namespace) -> int:
    """Run `molora migrate mergekit`; returns the exit code."""
    from ..errors import ConfigError
    from .bases import base_model
    from .commands import root_of
    from .compose import compose, live
    from .ingredients import contents_of
    from .migrate.gates import gates_from_prompts
    from .migrate.mergekit import read_mergekit

    plan = read_mergekit(Path(args.file).expanduser())
    name = args.model or plan.base_model
    if not name:
        raise ConfigError(f"'{args.file}' names no base_model; give --model")
    hub = root_of(args.hub, writes=False)
    model = base_model(name, contents_of(plan.sources[0], hub).folder, "CAUSAL_LM")
    mixture = compose(model, plan.sources, hub=hub)
    names = live(mixture).names
    positive = dict(zip(names, plan.positive, strict=True))
    negative = {name: texts for name, texts in zip(names, plan.negative, strict=True) if texts}
    tokenize = _tokenizer(name)
    gates_from_prompts(mixture, tokenize, positive, negative, pool=plan.pool, top_k=plan.top_k)
    return _save(args, mixture)


def _tokenizer(name: str) -> Callable[[str], Any]:
    from transformers import AutoTokenizer

    from ..errors import ConfigError

    path = Path(name).expanduser()
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path) if path.is_dir() else name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"prompts need the tokenizer of '{name}', which cannot be loaded: {reason}") from error
    return lambda text: tokenizer(text, return_tensors="pt", return_token_type_ids=False)


def _folder(given: str) -> Path:
    from ..errors import ConfigError

    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"there is no folder '{given}'")
    return folder


def _save(args: argparse.Namespace, mixture: Any) -> int:
    """Save a mixture, and tell what it is."""
    from ..checkpoint import save
    from ..control import routed_layers

    config = mixture.peft_config["default"]
    config.base_model_name_or_path = config.base_model_name_or_path or args.model
    save(mixture, args.out)
    layers, experts = routed_layers(mixture), config.experts
    names = list(experts.get("names") or [])
    facts = {"out": args.out, "experts": names or experts["num"], "layers": len(layers), "recipe": config.recipe}
    if args.json:
        print(json.dumps(facts, indent=1))
        return 0
    said = f": {', '.join(names)}" if names else ""
    print(f"{len(names) or experts['num']} experts in {len(layers)} layers{said}")
    print(f"saved to {args.out}; keep it in a library: molora hub add {args.out} NAME")
    return 0
