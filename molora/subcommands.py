"""Commands below a command, such as `molora hub add`; the standard library only, so that help needs nothing else."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

Add = Callable[[argparse.ArgumentParser], None]


def add_commands(
    command: argparse.ArgumentParser, name: str, parts: Sequence[tuple[str, Add, str]], common: Add | None = None
) -> None:
    """Add the commands of `molora NAME`; the parsed arguments name the chosen one as `NAME_command`.

    Args:
        command: the parser of `molora NAME`.
        name: of that command.
        parts: of each, its name, what adds its arguments, and its description, whose first sentence is its help.
        common: adds the arguments that all of them have besides --json and --debug.
    """
    commands = command.add_subparsers(
        dest=f"{name}_command",
        metavar="COMMAND",
        required=True,
        parser_class=type(command),
        help=f"see molora {name} COMMAND --help",
    )
    for part, add, text in parts:
        one = commands.add_parser(part, help=text.partition(".")[0].replace("\n", " "), description=text)
        add(one)
        if common is not None:
            common(one)
        one.add_argument("--json", action="store_true", help="print JSON")
        # not given here, it must not hide a --debug that was given before
        one.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
