"""Adapters that know nothing of each other become one mixture, without training, and change while it runs.

    python examples/mix_community_adapters.py            about a minute on two cores
    python examples/mix_community_adapters.py --quick    a few small steps, to see that everything works

Three people each train a small plain LoRA with PEFT on a frozen MiniLM, for a task of their own and with a rank, scale
and layers of their own; each also has a head, since MiniLM is an encoder. Then `molora.compose` puts the LoRAs side by
side, and everything that can be done with the result is done once. Read it from top to bottom.
"""
# ruff: noqa: E402 (what is said below must be said before the libraries are imported)

from __future__ import annotations

import argparse
import logging
import os
import threading
import time
import warnings
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it only says which of its kernels are not installed
warnings.filterwarnings("ignore", category=FutureWarning)

import demo_tasks
import torch
from demo_report import say
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

import molora

MAX_LENGTH = 32
# What people share differs in everything: task -> rank, alpha, layers, dtype.
SHARED = {
    "news": ({"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"]}, torch.float32),
    "medicine": ({"r": 4, "lora_alpha": 12, "target_modules": "all-linear"}, torch.bfloat16),
    "tone": (
        {"r": 6, "lora_alpha": 6, "target_modules": ["key", "intermediate.dense"], "use_rslora": True},
        torch.float16,
    ),
}
LATER = "group"  # comes while the mixture runs
LATER_LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value", "intermediate.dense"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few small steps")
    parser.add_argument("--out", type=Path, default=Path("mix_out"), help="folder for adapters (default: mix_out)")
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    steps, rows = (2, 32) if options.quick else (60, 480)
    training, evaluation = demo_tasks.build(rows, 12 if options.quick else 120, seed=0)
    data = {train.name: (train.rows, held.rows) for train, held in zip(training, evaluation, strict=True)}
    tokenizer = AutoTokenizer.from_pretrained(demo_tasks.minilm())

    say("1. Adapters", "each trained by PEFT alone, on a task of its own; molora has no part in it")
    heads: dict[str, Head] = {}
    lone: dict[str, float] = {}
    for name, (lora, dtype) in {**SHARED, LATER: (LATER_LORA, torch.float32)}.items():
        model, heads[name] = train(data[name][0], lora, tokenizer, steps)
        model.to(dtype).save_pretrained(options.out / name)
        again = PeftModel.from_pretrained(base(), options.out / name).eval()
        lone[name] = accuracy(again, heads[name], data[name][1], tokenizer)
        print(f"   {name:9s} rank {lora['r']}, {str(dtype)[6:]:9s}{lone[name]:6.1%} right on its own task", flush=True)

    say("2. One mixture", "compose: every LoRA is an expert, exactly; two slots stay free")
    folders = [options.out / name for name in SHARED]
    model = molora.compose(base(), folders, router="arrow", slots=5, max_rank=8, targets="all-linear").eval()
    live = molora.live(model)
    print(f"   experts: {', '.join(live.names)}; {live.slots} slots, {live.free} free; router: arrow")
    for name in SHARED:
        with live.using(name):  # this expert alone
            difference = (
                (states(model, data[name][1], tokenizer) - alone(options.out / name, data, tokenizer)).abs().max()
            )
            print(f"   {name:9s} alone: {difference:.0e} from what PEFT computes", flush=True)
            assert difference < 1e-4

    say("3. Who is asked", "the same texts, with no word about their task: routed, or all experts at equal weight")
    equal = {name: 1 / len(SHARED) for name in SHARED}
    for name in SHARED:
        routed = accuracy(model, heads[name], data[name][1], tokenizer)
        with live.using(equal):
            mean = accuracy(model, heads[name], data[name][1], tokenizer)
        nothing = accuracy(base(), heads[name], data[name][1], tokenizer)
        print(
            f"   {name:9s} its own {lone[name]:6.1%}   arrow {routed:6.1%}   mean {mean:6.1%}   none {nothing:6.1%}",
            flush=True,
        )

    say("4. While it runs", f"another thread asks the expert `news`; meanwhile `{LATER}` comes, and `news` is replaced")
    before, after = (alone(options.out / name, data, tokenizer, "news") for name in ("news", LATER))
    seen, stop = {"old": 0, "new": 0, "torn": 0}, threading.Event()

    def ask() -> None:
        while not stop.is_set():
            with live.using("news"):  # one request: one moment
                got = states(model, data["news"][1], tokenizer)
            kinds = {"old": before, "new": after}
            kind = next((k for k, want in kinds.items() if torch.allclose(got, want, atol=1e-4)), "torn")
            seen[kind] += 1

    worker = threading.Thread(target=ask)
    worker.start()
    while not seen["old"]:
        time.sleep(0.01)
    for what, change in (
        (f"add {LATER}", lambda: live.add(LATER, options.out / LATER)),
        (f"swap news for {LATER}", lambda: live.swap("news", options.out / LATER)),
        ("remove tone", lambda: live.remove("tone")),
    ):
        started = time.perf_counter()
        change()
        print(
            f"   {what:24s}{(time.perf_counter() - started) * 1e3:7.1f} ms, and now: {', '.join(live.names)}",
            flush=True,
        )
    asked = seen["new"]
    while seen["new"] == asked:
        time.sleep(0.01)
    stop.set()
    worker.join()
    print(f"   requests: {seen['old']} saw the old expert, {seen['new']} the new one, {seen['torn']} half of each")
    assert seen["torn"] == 0

    say("5. Out again", "saved with its router; and a fixed blend as a plain LoRA, for anyone with PEFT")
    molora.save(model, options.out / "mixture")
    loaded = molora.load(base(), options.out / "mixture").eval()
    rows_ = data["medicine"][1]
    molora.live(loaded)  # closes the free slots
    same = torch.allclose(states(loaded, rows_, tokenizer), states(model, rows_, tokenizer), atol=1e-5)
    blend = {"medicine": 0.5, LATER: 0.5}
    molora.export_peft(model, options.out / "blend", gates=live.gates(blend).flatten())
    with live.using(blend):
        want = states(model, rows_, tokenizer)
    plain = PeftModel.from_pretrained(base(), options.out / "blend").eval()
    equal_too = torch.allclose(states(plain, rows_, tokenizer), want, atol=1e-4)
    print(f"   the mixture loads and answers the same: {same}; the blend in PEFT answers the same: {equal_too}")
    assert same and equal_too
    say("Done", f"everything is in {options.out}")


# --- plain PEFT, as anyone would --------------------------------------------------------------------------------------


class Head(nn.Module):
    """A linear classifier of mean token states (B, d)."""

    def __init__(self, labels: list[str]) -> None:
        super().__init__()
        self.labels = labels
        self.linear = nn.Linear(384, len(labels))

    def forward(self, pooled: Tensor) -> Tensor:
        return self.linear(10 * pooled)  # MiniLM's features are small


def base() -> nn.Module:
    return AutoModel.from_pretrained(demo_tasks.minilm(), add_pooling_layer=False).eval()


def pooled(model: nn.Module, rows: list[dict], tokenizer) -> Tensor:
    """The mean states (B, d) of the tokens of each row."""
    texts = [[row["text"] for row in rows]] + ([[row["text_pair"] for row in rows]] if "text_pair" in rows[0] else [])
    batch = tokenizer(*texts, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
    mask = batch["attention_mask"][..., None].float()
    return (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)


def train(rows: list[dict], lora: dict, tokenizer, steps: int) -> tuple[nn.Module, Head]:
    """Train one LoRA and its head; returns both."""
    torch.manual_seed(0)
    model = get_peft_model(base(), LoraConfig(**lora)).train()
    head = Head(sorted({row["label"] for row in rows}))
    of_lora = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": of_lora, "lr": 2e-3}, {"params": head.parameters(), "lr": 2e-2}])
    for step in range(steps):
        batch = [rows[(step * 16 + i) % len(rows)] for i in range(16)]
        wanted = torch.tensor([head.labels.index(row["label"]) for row in batch])
        loss = nn.functional.cross_entropy(head(pooled(model, batch, tokenizer)), wanted)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, head.eval()


@torch.no_grad()
def states(model: nn.Module, rows: list[dict], tokenizer) -> Tensor:
    return pooled(model, rows, tokenizer)


def alone(folder: Path, data: dict, tokenizer, task: str | None = None) -> Tensor:
    """What PEFT computes with one LoRA, on the rows of a task (its own, unless told)."""
    model = PeftModel.from_pretrained(base(), folder).eval()
    return states(model, data[task or folder.name][1], tokenizer)


@torch.no_grad()
def accuracy(model: nn.Module, head: Head, rows: list[dict], tokenizer) -> float:
    found = head(pooled(model, rows, tokenizer)).argmax(-1).tolist()
    return sum(head.labels[i] == row["label"] for i, row in zip(found, rows, strict=True)) / len(rows)


if __name__ == "__main__":
    main()
