"""How long it takes to swap an adapter of about 10 MB in a model that runs, beside PEFT's two ways, in one run.

    python -m benchmarks.swap          under a minute; writes benchmarks/results/swap.json and swap.md

The model is a Llama of random weights (12 layers, hidden size 512), the adapters are LoRAs of rank 20 on all its linear
layers, in safetensors folders on disk. Each contender reads a folder and puts it to work:

- `live.swap`: molora, as users call it: header and config checked, values checked for NaN and Inf, written into a free
  slot, made current. Requests go on meanwhile.
- `live.swap, from memory`: the same for tensors that are in memory already.
- `write_expert, from memory`: molora's plain write into a slot, without a table of names.
- `hotswap_adapter`: PEFT's in-place swap; requests must be kept away meanwhile.
- `load_adapter`: PEFT's usual way: a new adapter is added, made active, and the old one deleted.
- `read and check the file`: what reading alone costs, of what is in all of those that read.

All take turns in rounds, the next round backwards; what counts is wall-clock time, and the median over the rounds. The
processor time of the thread is noted, too, since other work on the machine does not count in it. After every swap the
model must answer as the adapter that was swapped in says, or the run fails.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file

import molora
from molora.files import CONFIG, WEIGHTS

RESULTS = Path(__file__).parent / "results"
GOAL = 0.5  # of hotswap_adapter's time
SIZES = {"layers": 12, "hidden": 512, "rank": 20}
QUICK = {"layers": 2, "hidden": 32, "rank": 2}


def base_model(sizes: dict[str, int]) -> torch.nn.Module:
    """Return a Llama of random weights, the same on every call."""
    torch.manual_seed(0)
    hidden = sizes["hidden"]
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=sizes["layers"],
        num_attention_heads=hidden // 16,
        num_key_value_heads=hidden // 16,
    )
    return transformers.LlamaForCausalLM(config).eval()


def make_adapters(folder: Path, sizes: dict[str, int]) -> list[Path]:
    """Write two LoRAs with random factors; returns their folders."""
    made = []
    for seed in (1, 2):
        options = {"r": sizes["rank"], "lora_alpha": 2 * sizes["rank"], "target_modules": "all-linear"}
        model = get_peft_model(base_model(sizes), LoraConfig(**options, task_type="CAUSAL_LM"))
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(folder / str(seed))
        made.append(folder / str(seed))
    return made


Contender = tuple[Callable[[int], None], Callable[[], torch.Tensor]]


def contenders(folders: list[Path], sizes: dict[str, int]) -> dict[str, Contender]:
    """Return, by name, what swaps adapter number i in, and what the model answers then."""
    ids = torch.arange(8)[None]

    def answer(model: Any) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            with torch.no_grad():
                return model(ids).logits

        return run

    held = [(json.loads((f / CONFIG).read_text()), load_file(f / WEIGHTS)) for f in folders]
    found: dict[str, Contender] = {}
    for name, sources in (("live.swap", folders), ("live.swap, from memory", held)):
        model = molora.compose(base_model(sizes), {"one": folders[0]}, slots=2).eval()
        mixture = molora.live(model)
        found[name] = (lambda i, m=mixture, s=sources: m.swap("one", s[i])), answer(model)

    model = molora.import_peft(base_model(sizes), folders[:1]).eval()
    pairs = []
    for _, tensors in held:
        ends = {"A": ".lora_A.weight", "B": ".lora_B.weight"}
        paths = {key.removeprefix("base_model.model.").removesuffix(ends["A"]) for key in tensors if ends["A"] in key}
        pairs.append({p: tuple(tensors[f"base_model.model.{p}{ends[part]}"] for part in "AB") for p in paths})
    scale = held[0][0]["lora_alpha"] / held[0][0]["r"]
    found["write_expert, from memory"] = (lambda i: molora.write_expert(model, 0, pairs[i], scale)), answer(model)

    hot = PeftModel.from_pretrained(base_model(sizes), folders[0]).eval()
    found["hotswap_adapter"] = (lambda i: hotswap_adapter(hot, str(folders[i]), "default", "cpu")), answer(hot)

    plain = PeftModel.from_pretrained(base_model(sizes), folders[0], adapter_name="at0").eval()
    count = [0]

    def load(i: int) -> None:
        old, count[0] = f"at{count[0]}", count[0] + 1
        plain.load_adapter(str(folders[i]), adapter_name=f"at{count[0]}", torch_device="cpu")
        plain.set_adapter(f"at{count[0]}")
        plain.delete_adapter(old)

    found["load_adapter"] = load, answer(plain)
    return found


def read(folder: Path) -> None:
    """Read a folder's tensors once and look at every value."""
    for tensor in load_file(folder / WEIGHTS).values():
        tensor.sum().item()


def run(rounds: int, sizes: dict[str, int]) -> dict[str, Any]:
    """Time all contenders in turns; returns the record of the run.

    Raises:
        RuntimeError: a model answers otherwise than the adapter that was swapped in.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folders = make_adapters(Path(scratch), sizes)
        size = (folders[0] / WEIGHTS).stat().st_size
        ids = torch.arange(8)[None]
        want = []
        for folder in folders:
            with torch.no_grad():
                want.append(PeftModel.from_pretrained(base_model(sizes), folder).eval()(ids).logits)
        if torch.allclose(want[0], want[1], atol=1e-2):
            raise RuntimeError("the two adapters do the same, so a swap could not be seen")
        works = contenders(folders, sizes)
        seconds: dict[str, list[float]] = {name: [] for name in [*works, "read and check the file"]}
        busy: dict[str, list[float]] = {name: [] for name in seconds}
        worst = 0.0
        for turn in range(rounds + 1):
            number = (turn + 1) % 2
            order = list(seconds)[:: 1 if turn % 2 else -1]
            for name in order:
                swap, answer = works.get(name, (lambda number: read(folders[number]), None))
                gc.collect()
                start, start_busy = time.perf_counter(), time.thread_time()
                swap(number)
                took, took_busy = time.perf_counter() - start, time.thread_time() - start_busy
                if answer is not None:
                    worst = max(worst, float((answer() - want[number]).abs().max() / want[number].abs().max()))
                    if worst > 1e-4:
                        raise RuntimeError(f"after {name} the model answers otherwise than adapter {number} does")
                if turn:  # the first round warms up
                    seconds[name].append(took)
                    busy[name].append(took_busy)
    rows = {
        name: {
            "median_ms": statistics.median(taken) * 1e3,
            "quartiles_ms": _quartiles(taken),
            "processor_ms": statistics.median(busy[name]) * 1e3,
            "seconds": taken,
        }
        for name, taken in seconds.items()
    }
    ratios = [a / b for a, b in zip(seconds["live.swap"], seconds["hotswap_adapter"], strict=True)]
    versions = {"torch": torch.__version__, "peft": peft.__version__, "transformers": transformers.__version__}
    return {
        "what": "swap of one adapter, wall-clock time, contenders in turns",
        "adapter_mb": size / 1e6,
        "sizes": sizes,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "versions": {"python": sys.version.split()[0], **versions},
        "rows": rows,
        "largest_relative_difference": worst,
        "goal": {
            "what": "live.swap / hotswap_adapter, median of the ratios of each round",
            "at_most": GOAL,
            "measured": statistics.median(ratios),
            "met": statistics.median(ratios) <= GOAL,
        },
    }


def _quartiles(values: list[float]) -> list[float]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low * 1e3, high * 1e3]


def to_markdown(record: dict[str, Any]) -> str:
    """Return the record as a page."""
    goal, sizes = record["goal"], record["sizes"]
    reference = record["rows"]["hotswap_adapter"]["median_ms"]
    lines = [
        "# Swapping an adapter in a running model",
        "",
        f"`make bench-swap`: a LoRA of {record['adapter_mb']:.1f} MB (rank {sizes['rank']} on all linear layers of a "
        f"Llama with {sizes['layers']} layers of size {sizes['hidden']}), {record['rounds']} rounds in turns, "
        f"{record['threads']} thread{'s' if record['threads'] > 1 else ''}, wall-clock time. What each contender does "
        "is said at the top of benchmarks/swap.py.",
        "",
        "| | median ms | quartiles ms | of hotswap_adapter | processor ms |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in sorted(record["rows"].items(), key=lambda item: item[1]["median_ms"]):
        low, high = row["quartiles_ms"]
        ratio = row["median_ms"] / reference
        lines.append(
            f"| {name} | {row['median_ms']:.1f} | {low:.1f} to {high:.1f} | {ratio:.2f} | {row['processor_ms']:.1f} |"
        )
    met = "met" if goal["met"] else "not met"
    lines += [
        "",
        f"Goal: {goal['what']}, at most {goal['at_most']}: measured {goal['measured']:.2f}, {met}.",
        "",
        f"After every swap each model answered as the adapter does in PEFT (largest relative difference "
        f"{record['largest_relative_difference']:.1e}). Versions: "
        + ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        + ".",
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark and write its files; exits with 1 when the goal is not met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it works")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    record = run(options.rounds, QUICK if options.quick else SIZES)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "swap.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    page = to_markdown(record)
    (options.out / "swap.md").write_text(page, encoding="utf-8")
    print(page)
    return 0 if record["goal"]["met"] or options.quick else 1


if __name__ == "__main__":
    sys.exit(main())
