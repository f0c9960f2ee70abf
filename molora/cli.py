"""The `molora` command: parse, call, print.

This file imports the standard library only, so that help and mistakes in the arguments need nothing else; the work is
in commands.py. Exit codes: 0 good, 1 molora failed or a check (doctor, hub verify, hub diff) found something, 2 bad
input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

MODEL_HELP = "folder or Hub name of the base model"
DATA_HELP = (
    "one or more tasks: a .jsonl, .json or .csv file, or hf:name[:config][:split] from the Hub; rows hold text + label "
    "(and text_pair), prompt + answer, or text alone"
)

TRAIN = """Train routed experts in a frozen model, and save them as an adapter.

example:
  molora train dynmole --model ./minilm --data news=news.jsonl toxicity=tox.csv --output runs/two --epochs 2
  molora train mola --model ./llama --data qa.jsonl --set experts.num=[2,4] --set train.warmup_steps=50 --quantize 4bit
  molora train dynmole ... --resume                      go on after a crash, to the same weights"""
EVAL = """Evaluate a saved adapter: accuracy of classifiers among each task's labels; loss, perplexity and exact match
of generators.

example:
  molora eval runs/two --data news=news_test.jsonl toxicity=tox_test.csv --json"""
INSPECT = """Show what the routers of an adapter do, layer by layer: as recorded in training, or on fresh data.

example:
  molora inspect runs/two --png routing.png
  molora inspect runs/two --data news=news_test.jsonl"""
RECIPES = """List the recipes that come with molora, or the components that recipes are made of.

example:
  molora recipes
  molora recipes --components"""
DOCTOR = """Take real training steps on a small batch and say whether routers and experts learn, and what stands in
their way. Exits with 1 when something fails.

example:
  molora doctor dynmole --model ./minilm --data news=news.jsonl --grad-accum 4"""

HUB = """Keep a library of adapters: add, check, find, compare, and bring them from elsewhere.

example:
  molora hub list
  molora hub add runs/news news --task topic --licence apache-2.0
  molora hub search headlines
  molora hub verify"""

COMPOSE = """Make one mixture of finished LoRAs, with a router that needs no training, and save it as an adapter.

example:
  molora compose --model ./llama ./news ./law poems@2 --router arrow --out mixed
  molora compose --model ./llama news=./a law=./b --router arrow --option top_k=1 --slots 4 --max-rank 32 --out mixed"""
EXPORT = """Write one expert of a mixture, or fixed weights of several, as a plain LoRA that any PEFT loads.

example:
  molora export mixed --expert news --out news_lora
  molora export mixed --weight news=0.7 --weight law=0.3 --out blend"""

MIGRATE = """Bring what other libraries have saved into molora: X-LoRA, MixLoRA of MoE-PEFT, experts of mttl, and gates
that mergekit starts from prompts.

example:
  molora migrate xlora ./xlora --model ./llama --out mixed
  molora migrate mttl ./library --out loras"""

TENANTS = """Say who may use a server: tenants with keys, rights, limits and weights, and what they have used.

example:
  molora tenants add news --model headlines --requests-per-minute 60
  molora tenants list
  molora tenants usage --since 2026-01-01"""

SERVE = """Serve one base model to many tenants, each with adapters or mixtures of their own, over OpenAI's HTTP API.

example:
  molora serve --model ./llama --hub adapters_hub
  molora serve --config serve.yaml --tenants tenants.yaml --port 8000
  molora serve --config serve.yaml --check                 start, print what was started, and stop"""

ROUTE = """Pick the adapter by the prompt for another OpenAI-compatible server: vLLM, SGLang, LoRAX, molora serve.

example:
  molora route --upstream http://127.0.0.1:8000 --selector selector
  molora route --config route.yaml --tenants tenants.yaml --port 8080
  molora route --config route.yaml --check                 start, print what was started, and stop"""

PROMPTS = """Choose adapters by the prompt: fit a selector on example prompts, and ask it.

example:
  molora prompts fit --hub adapters_hub --out selector
  molora prompts ask "Who won the cup final?" --selector selector"""


class UsageError(Exception):
    """A mistake in the arguments."""


class Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line, and takes no abbreviations."""

    def __init__(self, *args: object, **options: object) -> None:
        options.setdefault("allow_abbrev", False)
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.fill: Callable[[], None] | None = None  # adds arguments once they are needed

    def parse_known_args(self, *args: Any, **options: Any) -> Any:
        """Add the arguments of a command that has many, then parse."""
        fill, self.fill = self.fill, None
        if fill is not None:
            fill()
        return super().parse_known_args(*args, **options)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving."""
        raise UsageError(f"{message}; see {self.prog} --help")


class Version(argparse.Action):
    """Prints the version of the installed package; looked up only when asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        """Print it and leave."""
        from importlib.metadata import version

        print(f"molora {version('molora')}")
        parser.exit()


def build_parser() -> Parser:
    """Return the parser of all commands."""
    parser = Parser(prog="molora", description="Routed LoRA experts: train, evaluate, look inside.")
    parser.add_argument("--version", action=Version, nargs=0, help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, add, text in (
        ("train", _train, TRAIN),
        ("eval", _eval, EVAL),
        ("inspect", _inspect, INSPECT),
        ("recipes", _recipes, RECIPES),
        ("doctor", _doctor, DOCTOR),
        ("hub", _hub, HUB),
        ("compose", _compose, COMPOSE),
        ("export", _export, EXPORT),
        ("prompts", _prompts, PROMPTS),
        ("migrate", _migrate, MIGRATE),
        ("serve", _serve, SERVE),
        ("route", _route, ROUTE),
        ("tenants", _tenants, TENANTS),
    ):
        command = commands.add_parser(name, help=text.partition(".")[0].replace("\n", " "), description=text)
        if add in LATE:
            command.fill = functools.partial(add, command)
        else:
            add(command)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _train(command: Parser) -> None:
    command.add_argument("recipe", metavar="RECIPE", help="a name (see molora recipes) or the path of a .yaml")
    command.add_argument("--model", required=True, help=MODEL_HELP)
    command.add_argument("--data", required=True, nargs="+", action="extend", metavar="NAME=SOURCE", help=DATA_HELP)
    command.add_argument("--output", metavar="DIR", help="folder of the adapter (default: runs/RECIPE)")
    command.add_argument("--epochs", type=float, help="passes over the data (default: the recipe's)")
    command.add_argument("--max-steps", type=int, help="optimizer steps, instead of --epochs")
    command.add_argument("--batch-size", type=int, help="rows per step and device (default: the recipe's)")
    command.add_argument("--grad-accum", type=int, help="batches per optimizer step (default: the recipe's, or 1)")
    command.add_argument("--learning-rate", type=float, help="(default: the recipe's)")
    command.add_argument("--seed", type=int, default=0, help="of new weights, data order, dropout, split (default: 0)")
    command.add_argument("--eval-fraction", type=float, default=0.1, help="rows held out per task (default: 0.1)")
    command.add_argument("--gradient-checkpointing", action="store_true", help="less memory, about a third slower")
    command.add_argument("--save-steps", type=int, default=500, help="steps between checkpoints (default: 500)")
    command.add_argument("--keep", type=int, default=2, help="checkpoints that stay (default: 2)")
    command.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint in DIR")
    command.add_argument("--overwrite", action="store_true", help="replace an earlier run in DIR")
    command.add_argument("--quiet", action="store_true", help="no progress bar")
    _add_set(command)
    _add_base(command)
    _add_task_type(command)
    _add_fields(command)


def _eval(command: Parser) -> None:
    command.add_argument("adapter", metavar="ADAPTER", help="folder or Hub name of a saved adapter")
    command.add_argument("--data", required=True, nargs="+", action="extend", metavar="NAME=SOURCE", help=DATA_HELP)
    command.add_argument("--max-new-tokens", type=int, default=32, help="for exact match; 0 skips it (default: 32)")
    command.add_argument("--json", action="store_true", help="print JSON")
    _add_reading(command)
    _add_base(command, saved=True)
    _add_fields(command)


def _inspect(command: Parser) -> None:
    command.add_argument("adapter", metavar="ADAPTER", help="folder of a saved adapter")
    command.add_argument(
        "--data",
        nargs="+",
        action="extend",
        metavar="NAME=SOURCE",
        help=DATA_HELP + " (default: what training recorded)",
    )
    command.add_argument("--task", help="the table of one task only")
    command.add_argument("--png", metavar="FILE", help="write a heat-map of experts by layer and by task")
    command.add_argument("--json", action="store_true", help="print JSON")
    _add_reading(command)
    _add_base(command, saved=True)
    _add_fields(command)


def _recipes(command: Parser) -> None:
    command.add_argument("--components", action="store_true", help="list scorers, selectors, losses, ... with options")
    command.add_argument("--json", action="store_true", help="print JSON")


def _doctor(command: Parser) -> None:
    command.add_argument("recipe", metavar="RECIPE", help="a name (see molora recipes) or the path of a .yaml")
    command.add_argument("--model", required=True, help=MODEL_HELP)
    command.add_argument(
        "--data", nargs="+", action="extend", metavar="NAME=SOURCE", help=DATA_HELP + " (default: a random batch)"
    )
    command.add_argument("--adapter", metavar="DIR", help="a saved adapter whose tensors must fit")
    command.add_argument("--grad-accum", type=int, default=1, help="accumulation steps you plan (default: 1)")
    command.add_argument(
        "--gradient-checkpointing", choices=("non-reentrant", "reentrant"), help="the kind you plan (default: none)"
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    _add_set(command)
    _add_base(command)
    _add_task_type(command)
    _add_fields(command)


# The arguments of these are added when they are asked for, since each has files of its own.


def _hub(command: Parser) -> None:
    from molora.hub.parser import add_hub

    add_hub(command)


def _compose(command: Parser) -> None:
    from molora.hub.compose_commands import add_compose

    add_compose(command)


def _export(command: Parser) -> None:
    from molora.hub.compose_commands import add_export

    add_export(command)


def _migrate(command: Parser) -> None:
    from molora.hub.migrate_commands import add_migrate

    add_migrate(command)


def _tenants(command: Parser) -> None:
    from molora.serve.tenants.parser import add_tenants

    add_tenants(command)


def _serve(command: Parser) -> None:
    from molora.serve.parser import add_serve

    add_serve(command)


def _route(command: Parser) -> None:
    from molora.serve.proxy.parser import add_route

    add_route(command)


def _prompts(command: Parser) -> None:
    from molora.prompts.command import add_prompts

    add_prompts(command)


LATE = (_hub, _compose, _export, _prompts, _migrate, _serve, _route, _tenants)


def _add_set(command: Parser) -> None:
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change the recipe: experts.num=4, selector.k=1, losses.0.weight=0.1, train.optim=adamw_torch, ...",
    )


def _add_task_type(command: Parser) -> None:
    command.add_argument(
        "--task-type",
        default="auto",
        choices=("auto", "seq_cls", "causal_lm", "seq2seq_lm"),
        help="(default: auto, by data and model)",
    )
    command.add_argument("--max-length", type=int, help="tokens per row (default: 512, or what the model can take)")


def _add_base(command: Parser, saved: bool = False) -> None:
    if saved:
        command.add_argument("--model", help=MODEL_HELP + " (default: as in training)")
    command.add_argument(
        "--quantize",
        choices=("none", "4bit", "8bit"),
        help=f"load the base through bitsandbytes (default: {'as in training' if saved else 'none'})",
    )
    command.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the base (default: auto, float32 on a CPU, else the model's own)",
    )


def _add_reading(command: Parser) -> None:
    command.add_argument("--batch-size", type=int, default=16, help="rows at once (default: 16)")
    command.add_argument("--limit", type=int, metavar="ROWS", help="at most so many rows per task")


def _add_fields(command: Parser) -> None:
    command.add_argument(
        "--field", action="append", default=[], metavar="OURS=THEIRS", help="a column with another name: text=headline"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        args = build_parser().parse_args(argv)
    except UsageError as error:
        return _say(str(error), 2)
    except SystemExit as done:  # --help
        return int(done.code or 0)
    try:
        # only here: this imports torch, transformers and PEFT
        from molora import commands
        from molora.errors import MoloraError
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    try:
        return commands.run(args)
    except KeyboardInterrupt:
        hint = "; the same command with --resume goes on from the last checkpoint" if args.command == "train" else ""
        return _say(f"interrupted{hint}", 130)
    except BrokenPipeError:  # the reader of a pipe has left, as in `molora recipes | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except MoloraError as error:
        if args.debug:
            raise
        return _say(str(error), 2)
    except Exception as error:
        if args.debug:
            raise
        return _say(f"{type(error).__name__}: {error} (--debug shows where)", 1)


def _say(message: str, code: int) -> int:
    """Print one line on stderr: lists of problems are put behind each other."""
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    print("molora: " + "; ".join(line for line in lines if line).replace("problems; ", "problems: "), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
