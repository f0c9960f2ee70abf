"""docs/hub.md: every command in it can be typed, every command that there is stands in it, and links lead somewhere."""

import argparse
import re
import shlex
from pathlib import Path

from molora import cli

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "hub.md"
TEXT = PAGE.read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", TEXT, re.S)
    for line in block.splitlines()
    if line.startswith("molora")
]


def choices(parser):
    if parser.fill is not None:
        parser.fill()
    return next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices


def test_every_command_can_be_typed():
    assert len(COMMANDS) > 15
    for line in COMMANDS:
        cli.build_parser().parse_args(shlex.split(line, comments=True)[1:])  # raises UsageError


def test_every_command_of_the_library_is_there():
    typed = {tuple(shlex.split(line)[1:3]) for line in COMMANDS}
    top = choices(cli.build_parser())
    wanted = {(group, name) for group in ("hub", "migrate") for name in choices(top[group])}
    assert wanted - typed == {("hub", "add")}  # the page shows that in Python
    assert "hub.add(" in TEXT


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)", TEXT):
        assert (PAGE.parent / target).is_file(), target
