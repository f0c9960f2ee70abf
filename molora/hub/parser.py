"""The arguments of `molora hub ...`; the standard library only, so that help needs nothing else."""

from __future__ import annotations

import argparse

from ..subcommands import add_commands
from .arithmetic_commands import (
    AVERAGE,
    CLUSTER,
    COMPRESS,
    MIX,
    NEGATE,
    SIMILARITY,
    add_average,
    add_cluster,
    add_compress,
    add_mix,
    add_negate,
    add_similarity,
)
from .gates_command import TRAIN_GATES, add_train_gates
from .remote_commands import PULL, PUSH, add_pull, add_push

ROOT_HELP = (
    "folder of the library, or to read hf://owner/name[@revision], s3://... (default: $MOLORA_HUB, ./adapters_hub, or "
    "to read the one that comes with molora)"
)
REF_HELP = "name (its newest version), name@version or alias"

ADD = """Check an adapter and add it to a library as a new version: all of it or nothing.

example:
  molora hub add runs/news news --task topic --licence apache-2.0 --description "Sorts headlines into topics."
  molora hub add ./lora news --card card.yaml --alias best --json"""
GET = """Show an adapter of a library, or copy its folder out of it.

example:
  molora hub get news
  molora hub get news@2 --to ./news_lora"""
LIST = """List the adapters of a library.

example:
  molora hub list
  molora hub list --all-versions --task topic --json"""
SEARCH = """Find adapters by words, and by what they do.

example:
  molora hub search headlines of newspapers
  molora hub search --like news@1 --base all-MiniLM-L6-v2"""
VERIFY = """Check adapters down to every byte: card, hashes, headers, config, values, names and links. Exits with 1 when
something is wrong.

example:
  molora hub verify
  molora hub verify news@2 --json"""
DIFF = """Show how two adapters, or two versions of one, differ. Exits with 1 when they do.

example:
  molora hub diff news@1 news@2"""
REMOVE = """Remove a version, an alias, or with --all-versions a whole adapter. Numbers are never given again.

example:
  molora hub remove news@1"""
ALIAS = """Let another name stand for an adapter (always its newest version) or for one version.

example:
  molora hub alias best news@2"""


def add_hub(command: argparse.ArgumentParser) -> None:
    """Add the commands of `molora hub`."""
    parts = (
        ("add", _add, ADD),
        ("get", _get, GET),
        ("list", _list, LIST),
        ("search", _search, SEARCH),
        ("verify", _verify, VERIFY),
        ("diff", _diff, DIFF),
        ("remove", _remove, REMOVE),
        ("alias", _alias, ALIAS),
        ("pull", add_pull, PULL),
        ("push", add_push, PUSH),
        ("train-gates", add_train_gates, TRAIN_GATES),
        ("mix", add_mix, MIX),
        ("average", add_average, AVERAGE),
        ("negate", add_negate, NEGATE),
        ("compress", add_compress, COMPRESS),
        ("similarity", add_similarity, SIMILARITY),
        ("cluster", add_cluster, CLUSTER),
    )
    add_commands(command, "hub", parts, _common)


def _common(one: argparse.ArgumentParser) -> None:
    one.add_argument("--root", metavar="DIR", help=ROOT_HELP)


def _add(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", metavar="FOLDER", help="of a PEFT LoRA or a mixture of molora")
    command.add_argument("name", metavar="NAME", help="what to call it")
    command.add_argument("--card", metavar="FILE", help="a card.yaml (default: the one in FOLDER); these go before it:")
    command.add_argument("--task", help="what it is for, in a word or two")
    command.add_argument("--base", help="name of the base model (default: as in its config)")
    command.add_argument("--description", help="a sentence or more")
    command.add_argument("--licence", help="such as apache-2.0")
    command.add_argument("--author", action="append", metavar="NAME", help="who made it; may be given again")
    command.add_argument("--trained-on", action="append", metavar="DATA", help="a data set; may be given again")
    command.add_argument("--prompt", action="append", metavar="TEXT", help="an example of its input; again for more")
    command.add_argument("--metric", action="append", metavar="NAME=NUMBER", help="such as accuracy=0.91")
    command.add_argument("--version", type=int, metavar="N", help="its number (default: the next one)")
    command.add_argument("--alias", help="also let this name stand for it")
    command.add_argument("--model", metavar="MODEL", help="folder or Hub name of the base: the adapter must fit it")


def _get(command: argparse.ArgumentParser) -> None:
    command.add_argument("ref", metavar="NAME", help=REF_HELP)
    command.add_argument("--to", metavar="DIR", help="copy its files into this new folder")


def _filters(command: argparse.ArgumentParser) -> None:
    command.add_argument("--task", help="only of this task")
    command.add_argument("--base", help="only for this base model: its name, or what follows its last /")
    command.add_argument("--kind", choices=("lora", "mixture"), help="only of this kind")
    command.add_argument("--all-versions", action="store_true", help="also older versions")


def _list(command: argparse.ArgumentParser) -> None:
    _filters(command)


def _search(command: argparse.ArgumentParser) -> None:
    command.add_argument("text", metavar="WORD", nargs="*", help="words, any of which is found by its first letters")
    command.add_argument("--like", metavar="NAME", help="rank by how alike weight changes are to those of this LoRA")
    command.add_argument("--limit", type=int, default=20, metavar="N", help="at most so many (default: 20)")
    _filters(command)


def _verify(command: argparse.ArgumentParser) -> None:
    command.add_argument("ref", metavar="NAME", nargs="?", help=REF_HELP + " (default: everything)")


def _diff(command: argparse.ArgumentParser) -> None:
    command.add_argument("a", metavar="A", help=REF_HELP)
    command.add_argument("b", metavar="B", help=REF_HELP)
    command.add_argument("--limit", type=int, default=20, metavar="N", help="tensors to show (default: 20)")


def _remove(command: argparse.ArgumentParser) -> None:
    command.add_argument("ref", metavar="NAME", help="name@version, the name of an adapter with one version, or alias")
    command.add_argument("--all-versions", action="store_true", help="all versions of NAME")


def _alias(command: argparse.ArgumentParser) -> None:
    command.add_argument("alias", metavar="ALIAS", help="the other name")
    command.add_argument("ref", metavar="NAME", help=REF_HELP)
