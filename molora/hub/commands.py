"""What the commands `molora hub ...` do: call the library and print.

`pull` and `push` are in remote_commands.py, `train-gates` is in gates_command.py, `mix` and the like are in
arithmetic_commands.py.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import CONFIG, replacing
from ..paths import adapters_hub_dir
from ..reports.tables import table
from . import arithmetic_commands, gates_command, remote_commands
from .address import is_address
from .bases import base_model
from .compare import Difference
from .entry import Entry
from .names import Ref
from .search import Hit
from .store import Hub

WRITES = ("add", "remove", "alias", "pull")


def run(args: argparse.Namespace) -> int:
    """Run one command; returns the exit code."""
    commands = {
        **{"add": add, "get": get, "list": list_, "search": search, "verify": verify, "diff": diff, "remove": remove},
        **{"alias": alias, "pull": remote_commands.pull, "push": remote_commands.push},
        "train-gates": gates_command.train_gates,
    }
    sums = ("mix", "average", "negate", "compress", "similarity", "cluster")
    commands |= {name: getattr(arithmetic_commands, name) for name in sums}
    return commands[args.hub_command](args, Hub(root_of(args.root, args.hub_command in WRITES)))


def root_of(given: str | None, writes: bool) -> Path | str:
    """Return the library's folder or address: as given, of $MOLORA_HUB, ./adapters_hub, or to read the shipped one."""
    given = given or os.environ.get("MOLORA_HUB")
    if given:
        return given if is_address(given) else Path(given)
    here = Path("adapters_hub")
    return here if writes or here.is_dir() else adapters_hub_dir()


def add(args: argparse.Namespace, hub: Hub) -> int:
    """Add an adapter."""
    given = {
        "task": args.task,
        "base": args.base,
        "description": args.description,
        "licence": args.licence,
        "authors": args.author,
        "data": args.trained_on,
        "prompts": args.prompt,
        "metrics": _metrics(args.metric),
    }
    fields = {key: value for key, value in given.items() if value is not None}
    model = base_model(args.model, Path(args.source).expanduser()) if args.model is not None else None
    entry = hub.add(
        args.source, args.name, args.card, version=args.version, alias=args.alias, base_model=model, **fields
    )
    missing = [name for name in ("task", "description", "licence", "base") if not getattr(entry.card, name)]
    if args.json:
        return _print(entry.to_dict())
    print(f"{entry.ref} is in {hub.root}, {_size(entry.bytes)}, sha256 {entry.digest[:12]}")
    if missing:
        print(f"its card does not say: {', '.join(missing)}")
    return 0


def _metrics(pairs: list[str] | None) -> dict[str, float] | None:
    if pairs is None:
        return None
    found = {}
    for pair in pairs:
        name, _, number = pair.partition("=")
        try:
            found[name] = float(number)
        except ValueError:
            raise ConfigError(f"--metric '{pair}' is not NAME=NUMBER; write accuracy=0.91") from None
    return found


def get(args: argparse.Namespace, hub: Hub) -> int:
    """Show an adapter, or copy it out."""
    entry = hub.get(args.ref)
    if args.to is not None:
        target = Path(args.to).expanduser()
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ConfigError(f"'{target}' exists and is not an empty folder; give a new one to --to")
        with replacing(target) as draft:
            for path in entry.folder.iterdir():
                shutil.copyfile(path, draft / path.name)
    if args.json:
        return _print(entry.to_dict() | ({"copied_to": args.to} if args.to is not None else {}))
    facts = [("adapter", f"{entry.ref}  {entry.kind}, {_rank(entry)}, {entry.parameters:,} parameters")]
    facts += [("aliases", ", ".join(entry.aliases))] if entry.aliases else []
    facts += [("folder", str(entry.folder)), ("files", _size(entry.bytes)), ("digest", entry.digest)]
    card = entry.card.to_dict()
    for key in ("task", "base", "description", "licence", "authors", "data", "metrics", "prompts"):
        value = card.get(key)
        if isinstance(value, list):
            value = "\n".join(value)
        elif isinstance(value, dict):
            value = "\n".join(f"{name}: {_number(number)}" for name, number in value.items())
        facts += [(key, value)] if value else []
    if entry.card.embedding is not None:
        facts.append(("embedding", f"{len(entry.card.embedding.values)} numbers by {entry.card.embedding.embedder}"))
    for key, value in facts:
        lines = value.splitlines()
        print("\n".join([f"{key:<12} {lines[0]}", *(f"{'':12} {line}" for line in lines[1:])]))
    if args.to is not None:
        print(f"copied to {args.to}")
    return 0


def _number(value: Any) -> str:
    return ", ".join(f"{k} {v:g}" for k, v in value.items()) if isinstance(value, dict) else f"{value:g}"


def list_(args: argparse.Namespace, hub: Hub) -> int:
    """List the adapters."""
    wanted = {"task": args.task, "base": args.base, "kind": args.kind}
    entries = hub.list(all_versions=args.all_versions)
    if any(value is not None for value in wanted.values()):
        found = {hit.entry.ref for hit in hub.search(**wanted, all_versions=args.all_versions, limit=len(entries) or 1)}
        entries = [entry for entry in entries if entry.ref in found]
    if args.json:
        return _print([entry.to_dict() for entry in entries])
    if not entries:
        print(_none(hub, {key: value for key, value in wanted.items() if value is not None}))
        return 0
    print(table(_HEADER, [_row(entry) for entry in entries], left=_LEFT))
    total, damaged = sum(entry.bytes for entry in entries), sum(bool(entry.problems) for entry in entries)
    print(f"\n{len(entries)} in {hub.where}, {_size(total)}")
    if damaged:
        print(f"{damaged} damaged; see molora hub verify")
    return 0


def _none(hub: Hub, wanted: dict[str, str]) -> str:
    """Return why a list is empty, and what there is."""
    asked = ", ".join(f"{key} '{value}'" for key, value in wanted.items())
    every = [entry for entry in hub.list() if not entry.problems]
    if every:
        known = {"task": {e.card.task for e in every}, "base": {e.card.base for e in every}}
        known["kind"] = {e.kind for e in every}
        there = "; ".join(f"{key}s there: {', '.join(sorted(known[key] - {''})) or '(none)'}" for key in wanted)
        return f"no adapters in {hub.where} of {asked}; {there}"
    if (hub.root / CONFIG).is_file():
        return f"'{hub.where}' is an adapter and no library; put it into one: molora hub add {hub.where} NAME"
    return f"no adapters in {hub.where}; molora hub add FOLDER NAME puts one there"


_HEADER = ["adapter", "aliases", "kind", "rank", "size", "task", "base", "licence", "metrics"]
_LEFT = (0, 1, 2, 5, 6, 7, 8)


def _row(entry: Entry) -> list[Any]:
    if entry.problems:
        return [str(entry.ref), ", ".join(entry.aliases) or None, "damaged", *[None] * 6]
    card = entry.card
    metrics = ", ".join(f"{k} {v:.3g}" for k, v in card.metrics.items() if not isinstance(v, dict))
    texts = [card.task, card.base.rpartition("/")[2], card.licence, _short(metrics, 30)]
    shown = [", ".join(entry.aliases) or None, entry.kind, _rank(entry), _size(entry.bytes)]
    return [str(entry.ref), *shown, *(text or None for text in texts)]


def _rank(entry: Entry) -> str:
    if entry.rank is None:
        return "-"
    return f"{entry.rank} experts" if entry.kind == "mixture" else f"r {entry.rank}"


def _short(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def search(args: argparse.Namespace, hub: Hub) -> int:
    """Find adapters."""
    hits: list[Hit] = hub.search(
        " ".join(args.text) or None,
        task=args.task,
        base=args.base,
        kind=args.kind,
        like=args.like,
        all_versions=args.all_versions,
        limit=args.limit,
    )
    if args.json:
        return _print([hit.to_dict() for hit in hits])
    if not hits:
        print(f"nothing was found in {hub.where}; molora hub list shows what is there")
        return 0
    title = {"words": "words", "deltas": "cosine", "filter": "score"}[hits[0].by]
    rows = [[str(h.entry.ref), f"{h.score:.3g}", h.entry.kind, h.entry.card.task or None, _said(h.entry)] for h in hits]
    print(table(["adapter", title, "kind", "task", "description"], rows, left=(0, 2, 3, 4)))
    return 0


def _said(entry: Entry) -> str | None:
    return _short(entry.card.description, 70) or None


def verify(args: argparse.Namespace, hub: Hub) -> int:
    """Check adapters."""
    found = hub.verify(args.ref)
    bad = {ref: problems for ref, problems in found.items() if problems}
    if args.json:
        _print({"root": hub.where, "checked": len([r for r in found if r.name]), "problems": _by_name(bad)})
        return int(bool(bad))
    for ref, problems in found.items():
        name = str(ref) if ref.name else f"library {hub.where}"
        print(f"{'FAIL' if problems else 'ok  '}  {name}")
        for problem in problems:
            print("\n".join(f"      {line}" for line in problem.splitlines()))
    print(f"\n{len([r for r in found if r.name])} checked, {len(bad)} with problems")
    return int(bool(bad))


def _by_name(found: dict[Ref, list[str]]) -> dict[str, list[str]]:
    return {str(ref) if ref.name else "library": problems for ref, problems in found.items()}


def diff(args: argparse.Namespace, hub: Hub) -> int:
    """Show how two adapters differ."""
    if args.limit < 1:
        raise ConfigError(f"--limit must be at least 1, got {args.limit}")
    found = hub.diff(args.a, args.b)
    if args.json:
        _print(found.to_dict())
    else:
        print(difference_text(found, args.limit))
    return int(bool(found))


def difference_text(found: Difference, limit: int = 20) -> str:
    """Return a difference as text for people."""
    parts = []
    for title, pairs in (("config", found.config), ("card", found.card)):
        if pairs:
            rows = [[key, _short(str(a), 40), _short(str(b), 40)] for key, (a, b) in pairs.items()]
            parts.append(table([title, found.a, found.b], rows, left=(0, 1, 2)))
    rows: list[list[Any]] = [[name, f"only in {found.a}", None, None] for name in found.only_a]
    rows += [[name, f"only in {found.b}", None, None] for name in found.only_b]
    rows += [[name, f"{a} -> {b}", None, None] for name, (a, b) in found.reshaped.items()]
    rows += [[c.name, "other values", f"{c.largest:.3g}", f"{c.relative:.3g}"] for c in found.changed]
    if rows:
        more = f"\n… and {len(rows) - limit} more" if len(rows) > limit else ""
        parts.append(table(["tensor", "what", "largest", "relative"], rows[:limit], left=(0, 1)) + more)
    what = "the same" if not found else "the same weights" if not found.changes_weights else f"{len(rows)} differ"
    parts.append(f"{found.equal} tensors are equal; {what}")
    return "\n\n".join(parts)


def remove(args: argparse.Namespace, hub: Hub) -> int:
    """Remove a version, an adapter or an alias."""
    gone = [str(ref) for ref in hub.remove(args.ref, all_versions=args.all_versions)]
    if args.json:
        return _print({"removed": gone})
    print(f"removed {', '.join(gone)} from {hub.root}")
    return 0


def alias(args: argparse.Namespace, hub: Hub) -> int:
    """Make an alias."""
    target = hub.alias(args.alias, args.ref)
    if args.json:
        return _print({"alias": args.alias, "ref": str(target)})
    print(f"'{args.alias}' stands for {target}")
    return 0


def _print(content: Any) -> int:
    print(json.dumps(content, indent=1))
    return 0
