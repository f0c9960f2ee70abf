"""The arguments of `molora tenants ...`; the standard library only, so that help needs nothing else."""

from __future__ import annotations

import argparse

from ...subcommands import add_commands

DB_HELP = "URL or file of the database (default: $MOLORA_TENANTS, or ./tenants.db)"

ADD = """Create a tenant, or change what is given of one, and make a key for it. The key is printed once and stored as
a hash.

example:
  molora tenants add news --model headlines --model "news-*" --weight 2 --requests-per-minute 60
  molora tenants add news --expires-days 30                another key; rights and limits stay
  molora tenants add news --concurrent 4 --no-key          another limit, the same keys
  molora tenants add ops --admin                           an admin key"""
LIST = """List tenants with their rights, limits and keys; never the keys themselves.

example:
  molora tenants list
  molora tenants list --json"""
ROTATE = """Make a new key in place of one key, or of all keys of a tenant. It is printed once.

example:
  molora tenants rotate news --grace-hours 24              the old ones work for another day
  molora tenants rotate 3f1c0a9b2d4e5f60"""
REVOKE = """Make one key useless, or all keys of a tenant. Running servers notice within seconds.

example:
  molora tenants revoke 3f1c0a9b2d4e5f60
  molora tenants revoke news"""
USAGE = """Show requests and tokens by tenant, day (UTC) and program.

example:
  molora tenants usage news --since 2026-01-01 --json"""
APPLY = """Read a tenants.yaml into the database, as `molora serve --tenants` does when it starts.

example:
  molora tenants apply tenants.yaml"""


def add_tenants(command: argparse.ArgumentParser) -> None:
    """Add the commands of `molora tenants`."""
    parts = (
        ("add", _add, ADD),
        ("list", lambda command: None, LIST),
        ("rotate", _rotate, ROTATE),
        ("revoke", _revoke, REVOKE),
        ("usage", _usage, USAGE),
        ("apply", _apply, APPLY),
    )
    add_commands(command, "tenants", parts, _common)


def _common(one: argparse.ArgumentParser) -> None:
    one.add_argument("--db", metavar="URL", help=DB_HELP)


def _add(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", metavar="NAME", help="of the tenant; with --admin, what to remember the key by")
    command.add_argument("--weight", type=float, help="of its share when the server is busy (default: 1)")
    command.add_argument(
        "--model",
        action="append",
        metavar="NAME",
        help="an adapter or mixture that it may use: name, name@version, the start of names with a * behind it, or *; "
        "may be given again, and replaces those it had (default: none)",
    )
    both = argparse.BooleanOptionalAction
    command.add_argument("--base", action=both, help="it may use the base model alone (default: yes)")
    command.add_argument("--manage", action=both, help="it may load, unload and pin its models (default: no)")
    for limit, text in (
        ("requests-per-minute", "in any 60 seconds"),
        ("tokens-per-minute", "of prompts and answers together"),
        ("tokens-per-day", "from midnight to midnight, UTC"),
        ("concurrent", "requests at the same time"),
    ):
        command.add_argument(f"--{limit}", type=int, metavar="N", help=f"{text}; 0: no limit (default: 0)")
    command.add_argument("--expires-days", type=float, metavar="DAYS", help="of the key (default: never)")
    command.add_argument("--no-key", action="store_true", help="make no key")
    command.add_argument("--admin", action="store_true", help="an admin key, which belongs to no tenant")


def _rotate(command: argparse.ArgumentParser) -> None:
    command.add_argument("what", metavar="KEY_OR_TENANT", help="id of a key, or name of a tenant")
    command.add_argument("--grace-hours", type=float, default=0.0, metavar="H", help="old keys still work (default: 0)")


def _revoke(command: argparse.ArgumentParser) -> None:
    command.add_argument("what", metavar="KEY_OR_TENANT", help="id of a key, or name of a tenant")


def _usage(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", metavar="NAME", nargs="?", help="of one tenant (default: all)")
    command.add_argument("--since", metavar="DAY", help="such as 2026-01-31")


def _apply(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", metavar="FILE", help="a tenants.yaml")
