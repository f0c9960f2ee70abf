"""The command `molora prompts`: fit a selector on examples, and ask which adapter it would choose.

Only the standard library is imported at the top, so that help and mistakes in the arguments need nothing else.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from pathlib import Path
from typing import Any

from ..subcommands import add_commands

FIT = """Fit a selector that chooses adapters by the prompt, on the example prompts in the cards of a library, and save
it as a folder.

example:
  molora prompts fit --hub adapters_hub --out selector
  molora prompts fit --examples asked.jsonl --out selector --method knn --option neighbours=5 --guard mahalanobis
  molora prompts fit --hub adapters_hub --out selector --embedder base --model ./llama"""
ASK = """Ask a selector which adapter it would choose for a prompt, and why.

example:
  molora prompts ask "Who won the cup final?"
  molora prompts ask "Who won the cup final?" --selector selector --allow sports --allow news --json"""
HUB_HELP = "folder of the library (default: $MOLORA_HUB, ./adapters_hub, or the one that comes with molora)"
MODEL_HELP = "folder or Hub name of the model whose hidden states --embedder base reads"
SELECTOR = "selector"


def add_prompts(command: argparse.ArgumentParser) -> None:
    """Add the commands of `molora prompts`."""
    add_commands(command, "prompts", (("fit", _add_fit, FIT), ("ask", _add_ask, ASK)), _common)


def _common(one: argparse.ArgumentParser) -> None:
    one.add_argument("--model", metavar="NAME", help=MODEL_HELP)


def _add_fit(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", required=True, metavar="DIR", help="the folder to write; replaced as a whole")
    command.add_argument("--hub", metavar="DIR", help=HUB_HELP)
    command.add_argument(
        "--examples",
        metavar="FILE",
        help='.jsonl of {"adapter": name, "prompt": text}; instead of the library, or with --hub besides it',
    )
    command.add_argument(
        "--embedder",
        default="sentence",
        metavar="NAME",
        help="sentence (all-MiniLM-L6-v2, or --encoder), base (with --model), words (default: sentence)",
    )
    command.add_argument("--encoder", metavar="DIR", help="folder of a sentence encoder, for --embedder sentence")
    command.add_argument(
        "--method", default="centroid", help="centroid, knn, pilots, classifier, contrastive (default: centroid)"
    )
    command.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="of the method")
    command.add_argument("--guard", default="nearest", help="nearest, mahalanobis, none (default: nearest)")
    command.add_argument(
        "--rate", type=float, default=0.05, help="of false abstentions that the guard may make (default: 0.05)"
    )
    command.add_argument("--top-k", type=int, default=1, help="adapters that may act on a prompt (default: 1)")
    command.add_argument("--limit", type=int, default=200, help="examples per adapter at most (default: 200)")


def _add_ask(command: argparse.ArgumentParser) -> None:
    command.add_argument("prompt", metavar="TEXT", help="the prompt")
    command.add_argument(
        "--selector", default=SELECTOR, metavar="DIR", help=f"folder of the selector (default: {SELECTOR})"
    )
    command.add_argument(
        "--allow", action="append", metavar="NAME", help="only among these adapters; give it once for each"
    )


def run(args: argparse.Namespace) -> int:
    """Run `molora prompts ...`; returns the exit code."""
    return {"fit": fit, "ask": ask}[args.prompts_command](args)


def fit(args: argparse.Namespace) -> int:
    """Fit a selector and save it."""
    from ..errors import ConfigError
    from .embed import build_embedder
    from .saving import save_selector
    from .selector import PromptSelector

    found = _examples(args)
    if not found.texts:
        raise ConfigError(
            f"no adapter has example prompts; add them to the cards (molora hub add ... --prompt TEXT), or give "
            f"--examples{'' if not found.silent else '; without: ' + ', '.join(found.silent)}"
        )
    if args.encoder is not None and args.embedder != "sentence":
        raise ConfigError(f"--encoder is for --embedder sentence, not for '{args.embedder}'")
    spec: dict[str, Any] = {"name": args.embedder} | ({"path": args.encoder} if args.encoder is not None else {})
    guard = None if args.guard == "none" else {"name": args.guard, "rate": args.rate}
    method = {"name": args.method, **_options(args.option)}
    # options are looked at before a model is loaded
    PromptSelector(lambda texts: texts, method, guard=guard, top_k=args.top_k, limit=args.limit)
    embedder = build_embedder(spec, *_model(args.model, args.embedder))
    selector = PromptSelector(embedder, method, guard=guard, top_k=args.top_k, limit=args.limit)
    selector.fit(found.texts, found.sources)
    save_selector(selector, args.out)
    counts = {name: len(group) for name, group in zip(selector.names, selector.groups, strict=True)}
    is_blind = selector.whole.guard is not None and selector.whole.guard.is_blind
    facts = {"out": args.out, "version": selector.version, "adapters": counts, "silent": list(found.silent)}
    facts |= {"damaged": list(found.damaged), "embedder": embedder.name, "method": method, "guard": guard}
    if args.json:
        print(json.dumps(facts | {"guard_is_blind": is_blind}, indent=1))
        return 0
    for names, what in ((found.silent, "no example prompts"), (found.damaged, "damaged")):
        if names:
            print(f"note: {what}, so never chosen: {', '.join(names)}", file=sys.stderr)
    if is_blind:
        print(f"note: there are too few examples to abstain at a rate of {args.rate:g}", file=sys.stderr)
    print(f"{args.out}: {args.method} over {len(counts)} adapters, {sum(counts.values())} examples, "
          f"version {selector.version}")  # fmt: skip
    return 0


def ask(args: argparse.Namespace) -> int:
    """Ask a saved selector."""
    from .saving import load_selector, wants_model

    if args.model is None and wants_model(args.selector):
        from ..errors import ConfigError

        raise ConfigError(f"'{args.selector}' reads the hidden states of a model; name it with --model")
    model, tokenizer = _model(args.model, "base")
    choice = load_selector(args.selector, model=model, tokenizer=tokenizer).select([args.prompt], args.allow)[0]
    if args.json:
        print(json.dumps(choice.to_dict(), indent=1))
        return 0
    print(", ".join(f"{name} {weight:.3f}" for name, weight in choice.weights.items()) or "(base model)")
    print(choice.why)
    return 0


def _examples(args: argparse.Namespace) -> Any:
    from ..hub.commands import root_of
    from ..hub.store import Hub
    from .examples import of_file, of_hub

    if args.examples is None:
        return of_hub(Hub(root_of(args.hub, writes=False)))
    given = of_file(args.examples)
    return of_hub(Hub(root_of(args.hub, writes=False))).with_more(given) if args.hub is not None else given


def _model(name: str | None, embedder: str) -> tuple[Any, Any]:
    """Return the model and its tokenizer for an embedder that reads one."""
    if name is None or embedder != "base":
        return None, None
    from transformers import AutoModel

    from ..errors import ConfigError
    from ..train.models import load_config, load_tokenizer, quiet_transformers

    folder = Path(name).expanduser()
    load_config(name)  # says what is wrong with the name
    with quiet_transformers():
        try:
            return AutoModel.from_pretrained(folder if folder.is_dir() else name), load_tokenizer(name)
        except (OSError, ValueError) as error:
            raise ConfigError(f"model '{name}' cannot be loaded: {str(error).strip().partition(chr(10))[0]}") from error


def _options(pairs: list[str]) -> dict[str, Any]:
    from ..errors import ConfigError

    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise ConfigError(f"--option '{pair}' is not KEY=VALUE")
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = value
    return found
