"""Adapters that know nothing of each other become one mixture, without training, and change while it runs.

    python examples/mix_community_adapters.py            about a minute on two cores
    python examples/mix_community_adapters.py --quick    a few small steps, to see that everything works

Three LoRAs come from the library in `adapters_hub/`; a fourth is trained here with PEFT, with a rank, scale, layers and
dtype of its own, as someone else would. `molora.compose` puts them side by side on a frozen MiniLM, and everything that
can be done with the result is done once. A text is answered by pointing at one of a few candidates (see pointing.py),
so no adapter needs a head. Read it from top to bottom.
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

import library_tasks
import pointing
import torch
from demo_report import say
from library_tasks import Row
from peft import LoraConfig, PeftModel, get_peft_model
from pointing import Batch, Pointer
from torch import Tensor
from transformers.utils import logging as transformers_logging

import molora
from molora.hub.store import Hub
from molora.paths import adapters_hub_dir

LIBRARY = ("news", "units", "threat")  # from the shipped library
OWN = "tone"  # trained here
OWN_LORA = {"r": 8, "lora_alpha": 12, "target_modules": "all-linear"}
LATER = "group"  # comes while the mixture runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few small steps")
    parser.add_argument("--out", type=Path, default=Path("mix_out"), help="folder for adapters (default: mix_out)")
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    if missing := pointing.demo_tasks.missing_packages():
        raise SystemExit(f"packages are missing: {', '.join(missing)}; install them with: make setup")
    steps, held_out = (2, 12) if options.quick else (30, 120)
    tasks = {task.name: task for task in library_tasks.build((*LIBRARY, OWN, LATER), held_out=held_out)}
    pointer = Pointer(pointing.base_model(), pointing.load_tokenizer())
    rows = {name: pointer.batches(task.held_out) for name, task in tasks.items()}

    say("1. Adapters", f"{', '.join(LIBRARY)} from the library; {OWN} is trained by PEFT alone, in bfloat16")
    hub = Hub(adapters_hub_dir())
    folders = {name: hub.get(name).folder for name in (*LIBRARY, LATER)}
    train(tasks[OWN].train, pointer, steps).to(torch.bfloat16).save_pretrained(options.out / OWN)
    folders[OWN] = options.out / OWN
    lone: dict[str, float] = {}
    for name, folder in folders.items():
        lone[name] = accuracy(PeftModel.from_pretrained(pointing.base_model(), folder).eval(), rows[name])
        print(f"   {name:9s}{lone[name]:6.1%} right on its own task", flush=True)

    say("2. One mixture", "compose: every LoRA is an expert, exactly; two slots stay free")
    mixed = (*LIBRARY, OWN)
    adapters = {name: name for name in LIBRARY} | {OWN: folders[OWN]}  # names in the library, and a folder
    room = {"slots": len(mixed) + 2, "max_rank": 8, "targets": "all-linear"}
    model = molora.compose(pointing.base_model(), adapters, router="arrow", hub=hub, **room).eval()
    live = molora.live(model)
    print(f"   experts: {', '.join(live.names)}; {live.slots} slots, {live.free} free; router: arrow")
    for name in mixed:
        with live.using(name):  # this expert alone
            difference = (vectors(model, rows[name][0]) - alone(folders[name], rows[name][0])).abs().max()
        print(f"   {name:9s} alone: {difference:.0e} from what PEFT computes", flush=True)
        assert difference < 1e-4

    say("3. Who is asked", "the same texts, with no word about their task: routed, or all experts at equal weight")
    equal = {name: 1 / len(mixed) for name in mixed}
    for name in mixed:
        routed = accuracy(model, rows[name])
        with live.using(equal):
            mean = accuracy(model, rows[name])
        nothing = accuracy(pointer.base, rows[name])
        print(
            f"   {name:9s} its own {lone[name]:6.1%}   arrow {routed:6.1%}   mean {mean:6.1%}   none {nothing:6.1%}",
            flush=True,
        )

    say("4. While it runs", f"another thread asks the expert `news`; meanwhile `{LATER}` comes, and `news` is replaced")
    asked_for = rows["news"][0]
    before, after = (alone(folders[name], asked_for) for name in ("news", LATER))
    assert not torch.allclose(before, after, atol=1e-3)
    seen, stop = {"old": 0, "new": 0, "torn": 0}, threading.Event()

    def ask() -> None:
        while not stop.is_set():
            with live.using("news"):  # one request: one moment
                got = vectors(model, asked_for)
            kinds = {"old": before, "new": after}
            kind = next((k for k, want in kinds.items() if torch.allclose(got, want, atol=1e-4)), "torn")
            seen[kind] += 1

    worker = threading.Thread(target=ask)
    worker.start()
    while not seen["old"]:
        time.sleep(0.01)
    for what, change in (
        (f"add {LATER}", lambda: live.add(LATER, folders[LATER])),
        (f"swap news for {LATER}", lambda: live.swap("news", folders[LATER])),
        ("remove threat", lambda: live.remove("threat")),
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
    loaded = molora.load(pointing.base_model(), options.out / "mixture").eval()
    some = rows[OWN][0]
    molora.live(loaded)  # closes the free slots
    same = torch.allclose(vectors(loaded, some), vectors(model, some), atol=1e-5)
    blend = {OWN: 0.5, LATER: 0.5}
    molora.export_peft(model, options.out / "blend", gates=live.gates(blend).flatten())
    with live.using(blend):
        want = vectors(model, some)
    equal_too = torch.allclose(alone(options.out / "blend", some), want, atol=1e-4)
    print(f"   the mixture loads and answers the same: {same}; the blend in PEFT answers the same: {equal_too}")
    assert same and equal_too
    say("Done", f"everything is in {options.out}")


# --- plain PEFT, as anyone would --------------------------------------------------------------------------------------


def train(rows: list[Row], pointer: Pointer, steps: int) -> PeftModel:
    """Train a LoRA of one's own."""
    torch.manual_seed(0)
    model = get_peft_model(pointing.base_model(), LoraConfig(**OWN_LORA))
    pointing.fit(model, pointer.endless(rows, 20, seed=0), steps=steps, lr=2e-3)
    return model


@torch.no_grad()
def vectors(model: torch.nn.Module, batch: Batch) -> Tensor:
    """The vectors (B, d) of the texts of a batch."""
    return pointing.mean_vectors(model, batch.inputs)


def alone(folder: Path, batch: Batch) -> Tensor:
    """The same by PEFT, with one LoRA."""
    return vectors(PeftModel.from_pretrained(pointing.base_model(), folder).eval(), batch)


def accuracy(model: torch.nn.Module, batches: list[Batch]) -> float:
    """Which share of the rows is answered right."""
    return float(pointing.hits(model, batches).float().mean())


if __name__ == "__main__":
    main()
