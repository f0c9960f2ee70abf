"""The command `molora hub train-gates`: one gate per layer of a finished LoRA, for PHATGOOSE and GLIDER mixtures.

Only the standard library is imported at the top, so that help and mistakes in the arguments need nothing else.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

TRAIN_GATES = """Train the gates of a LoRA on its own data, everything else frozen (PHATGOOSE, arXiv 2402.05859), and
write them beside it as molora_gates.safetensors.

example:
  molora hub train-gates ./news_lora --model ./llama --data news=news.jsonl
  molora hub train-gates news@2 --model ./llama --data news=news.jsonl --output gates/news.safetensors"""


def add_train_gates(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `molora hub train-gates`, but for --root and --json."""
    command.add_argument("adapter", metavar="ADAPTER", help="folder of a PEFT LoRA, or its name in the library")
    command.add_argument("--model", required=True, help="folder or Hub name of its base model")
    command.add_argument(
        "--data",
        required=True,
        nargs="+",
        action="extend",
        metavar="NAME=SOURCE",
        help="what the LoRA was trained on, as for molora train: rows of prompt + answer, or of text",
    )
    command.add_argument("--output", metavar="PATH", help="folder or .safetensors file (default: beside the LoRA)")
    command.add_argument("--steps", type=int, default=100, help="(default: 100)")
    command.add_argument("--lr", type=float, default=5e-3, help="learning rate (default: 0.005)")
    command.add_argument("--batch-size", type=int, default=16, help="rows at once (default: 16)")
    command.add_argument("--grad-accum", type=int, default=1, help="batches per step (default: 1)")
    command.add_argument("--max-length", type=int, help="tokens per row (default: 512, or what the model can take)")
    command.add_argument("--seed", type=int, default=0, help="of the order of the data (default: 0)")
    command.add_argument("--quiet", action="store_true", help="say nothing while training")


def train_gates(args: argparse.Namespace, hub: Any) -> int:
    """Run `molora hub train-gates` on a library; returns the exit code."""
    from ..errors import ConfigError
    from ..posthoc.gates import save_gates
    from ..posthoc.phatgoose import train_gates as train

    folder = Path(args.adapter).expanduser()
    if not folder.is_dir():
        folder = hub.get(args.adapter).folder
        if args.output is None:
            raise ConfigError(f"'{args.adapter}' is in a library, whose versions never change; say where with --output")
    if args.batch_size < 1:
        raise ConfigError(f"--batch-size must be at least 1, got {args.batch_size}")
    model, batches, rows = _data(args)
    losses: list[float] = []

    def tell(step: int, loss: float) -> None:
        losses.append(loss)
        if not args.quiet and (step == 1 or step % 10 == 0):
            print(f"step {step} of {args.steps}: loss {loss:.4f}", file=sys.stderr)

    options = {"steps": args.steps, "lr": args.lr, "accumulate": args.grad_accum}
    gates = train(model, folder, batches, tell=tell, **options)
    file = save_gates(gates, Path(args.output).expanduser() if args.output else folder)
    found = {"gates": str(file), "layers": len(gates), "steps": len(losses), "rows": rows}
    found |= {"first_loss": losses[0], "last_loss": losses[-1]}
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        print(f"{len(gates)} gates in {file}; loss {losses[0]:.4f} at first, {losses[-1]:.4f} at last")
    return 0


def _data(args: argparse.Namespace) -> tuple[Any, Any, int]:
    """Return the base model, batches that start anew each time, and how many rows there are."""
    import torch
    from torch.utils.data import DataLoader

    from ..errors import ConfigError
    from ..train.data import Collator, encode_generation
    from ..train.models import load_base, load_config, longest
    from ..train.settings import DEFAULT_MAX_LENGTH
    from ..train.task_types import resolve_task_type
    from ..train.tasks import load_tasks

    tasks = load_tasks(args.data)
    if tasks[0].kind == "classification":
        raise ConfigError(
            "gates of classifiers need the head that the LoRA was trained with; call molora.posthoc.train_gates(model, "
            "folder, batches) with a model that has it"
        )
    config = load_config(args.model)
    task_type = resolve_task_type("auto", tasks[0].kind, config)
    base = load_base(args.model, task_type, config=config)
    limit = args.max_length or min(DEFAULT_MAX_LENGTH, longest(base.tokenizer, config) or DEFAULT_MAX_LENGTH)
    rows = encode_generation(tasks, base.tokenizer, limit, encoder_decoder=task_type == "seq2seq_lm")
    order, collate = torch.Generator().manual_seed(args.seed), Collator(base.tokenizer)

    def batch(some: list[Any]) -> dict[str, Any]:
        return {k: v.to(base.model.device) for k, v in collate(some).items() if k != "task_ids"}

    size = min(args.batch_size, len(rows))
    loader = DataLoader(rows, batch_size=size, shuffle=True, drop_last=True, generator=order, collate_fn=batch)
    return base.model, loader, len(rows)
