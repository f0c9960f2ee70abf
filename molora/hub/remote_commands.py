"""The commands `molora hub pull` and `molora hub push`: their arguments, and what they print.

Only the standard library is imported at the top, so that help and mistakes in the arguments need nothing else.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

PULL = """Bring an adapter from a Hugging Face Hub or S3-like storage into a library: checked, whole, or not at all.

example:
  molora hub pull owner/news-lora                          the newest commit
  molora hub pull owner/news-lora@3f2a9c... --name news    this commit, a branch or a tag
  molora hub pull s3://bucket/library/news --digest 9b1e...
An interrupted pull goes on where it stopped, with the same command."""
PUSH = """Send an adapter of a library to a Hugging Face Hub or S3-like storage.

example:
  molora hub push news owner/news-lora --private
  molora hub push news@2 s3://bucket/library/news"""


def add_pull(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `molora hub pull`, but for --root and --json."""
    command.add_argument("address", metavar="ADDRESS", help="owner/name[@revision], hf://owner/name/folder, s3://...")
    command.add_argument("--all", action="store_true", help="every adapter of the library at ADDRESS, newest versions")
    command.add_argument("--name", help="what to call it (default: the last part of the address)")
    command.add_argument("--revision", help="branch, tag or commit of a repository (default: main)")
    command.add_argument("--digest", metavar="SHA256", help="refuse any other content (see molora hub get --json)")
    command.add_argument("--alias", help="also let this name stand for it")
    command.add_argument("--max-bytes", type=int, metavar="BYTES", help="refuse larger weights (default: 8 GiB)")
    command.add_argument("--max-rank", type=int, metavar="R", help="refuse larger ranks (default: 1024)")
    command.add_argument("--allow-host", action="append", default=[], metavar="HOST", help="the Hub may redirect there")
    command.add_argument("--cache", metavar="DIR", help="of downloads (default: molora in HF_HOME)")
    _add_shared(command)


def add_push(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `molora hub push`, but for --root and --json."""
    command.add_argument("ref", metavar="NAME", help="name, name@version or alias in the library")
    command.add_argument("target", metavar="ADDRESS", help="owner/name[@branch], hf://owner/name/folder, s3://...")
    command.add_argument("--private", action="store_true", help="when the repository is new")
    command.add_argument("--message", help="of the commit")
    command.add_argument("--replace", action="store_true", help="write over another adapter in storage")
    _add_shared(command)


def _add_shared(command: argparse.ArgumentParser) -> None:
    command.add_argument("--endpoint", help="of the Hub (default: HF_ENDPOINT, or huggingface.co)")
    command.add_argument("--quiet", action="store_true", help="no progress bar")


def pull(args: argparse.Namespace, hub: Any) -> int:
    """Run `molora hub pull` on a library; returns the exit code."""
    from dataclasses import replace

    from ..errors import ConfigError
    from .limits import Limits
    from .remote import adapters_at
    from .web import Web

    limits = Limits()
    if args.max_bytes is not None:
        limits = replace(limits, weights=args.max_bytes)
    if args.max_rank is not None:
        limits = replace(limits, rank=args.max_rank)
    web = Web(args.endpoint, hosts=args.allow_host)
    if args.all and (args.name or args.alias or args.digest):
        raise ConfigError("--name, --alias and --digest are for one adapter; leave out --all, or them")
    every = adapters_at(args.address, web=web, revision=args.revision) if args.all else [args.address]
    results = []
    for address in every:
        results.append(_pull(args, hub, address, limits, web))
    if args.json:
        print(json.dumps(results if args.all else results[0], indent=1))
    elif not results:
        print(f"there is no adapter at {args.address}")
    return 0


def _pull(args: argparse.Namespace, hub: Any, address: str, limits: Any, web: Any) -> dict[str, Any]:
    """Pull one adapter; returns the facts, and prints them for people."""
    from .remote import pull as run

    result = run(
        address,
        hub,
        name=args.name,
        revision=None if args.all else args.revision,
        alias=args.alias,
        limits=limits,
        cache_dir=args.cache,
        digest=args.digest,
        progress=False if args.quiet else None,
        web=web,
    )
    entry = result.entry
    facts = {"ref": str(entry.ref), "folder": str(entry.folder), "from": result.where, "digest": entry.digest}
    if not args.json:
        print(f"{entry.ref} is in {hub.root}, from {result.where}" + (" (offline, from the cache)" * result.offline))
        pin = f"--revision {result.revision}" if result.revision else f"--digest {entry.digest}"
        if not args.all:
            print(f"the same again: molora hub pull {args.address.partition('@')[0]} {pin}")
    return {**facts, "revision": result.revision, "offline": result.offline}


def push(args: argparse.Namespace, hub: Any) -> int:
    """Run `molora hub push` on a library; returns the exit code."""
    from .remote import push as run

    result = run(
        hub,
        args.ref,
        args.target,
        private=args.private,
        message=args.message,
        replace=args.replace,
        endpoint=args.endpoint,
        progress=False if args.quiet else None,
    )
    facts = {"ref": str(result.entry.ref), "to": result.where, "revision": result.revision, "sent": list(result.sent)}
    if args.json:
        print(json.dumps(facts, indent=1))
        return 0
    sent = ", ".join(Path(name).name for name in result.sent) or "nothing new"
    print(f"{result.entry.ref} is at {result.where}; sent: {sent}")
    return 0
