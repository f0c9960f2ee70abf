"""The sections of the speed benchmark: what is measured against what. Each returns rows for the report.

Every section takes the sizes, the models of the run, and the moment until which it may measure.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import molora
from molora.control import routed_layers

from . import models
from .models import RANK, Shape, mixture, top_k
from .timing import Plain, Result, Work, race, saved_bytes

BASE = "frozen base"
OURS = "molora E=8 k=2"
LEAST = 3  # rounds: fewer have no quartiles to speak of


@dataclass(frozen=True)
class Sizes:
    """How large everything is; `QUICK` only shows that the benchmark works."""

    narrow: Shape
    wide: Shape
    decode_layers: int = 30
    tokens: int = 512
    context: int = 128  # tokens in the cache when a step is decoded
    experts: tuple[int, ...] = (4, 8, 16, 64)
    batches: tuple[tuple[int, int], ...] = ((16, 30), (64, 12))  # rows of a batch of tenants, blocks of the model
    layer: int = 1024  # width of the single layer that the scaling section looks at
    lengths: tuple[int, ...] = (1, 8, 32, 128, 512, 2048)
    loaded: tuple[int, ...] = (3, 65)
    recipes: tuple[str, ...] = ()  # which recipes the sections of single recipes time; none: all
    least: int = LEAST  # rounds
    sample: float = 0.04  # seconds

    def race(self, works: dict[str, Work], until: float) -> list[dict[str, Any]]:
        """Time works and return their rows."""
        return rows_of(race(works, until, least=self.least, sample=self.sample))


FULL = Sizes(Shape(576, 1536, 9, 3, 12, 49_152), Shape(1024, 2816, 16, 4, 8, 32_000))
QUICK = Sizes(
    narrow=Shape(64, 96, 2, 1, 2, 128),
    wide=Shape(96, 128, 2, 1, 1, 128),
    decode_layers=2,
    tokens=16,
    context=8,
    experts=(4, 8),
    batches=((4, 2),),
    layer=64,
    lengths=(1, 16),
    loaded=(2, 3),
    recipes=("lora", "mola", "mixlora", "remix"),
    least=2,
    sample=0.0,
)


class Field:
    """The models of one run, each built when it is first asked for."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.folder = Path(tempfile.mkdtemp(prefix="molora-speed-"))
        self.base = functools.cache(models.base_model)
        self._files: dict[Shape, list[str]] = {}

    def close(self) -> None:
        shutil.rmtree(self.folder)

    def loras(self, shape: Shape) -> list[str]:
        """Return the folders of eight saved LoRAs of rank 8, which X-LoRA and Arrow read."""
        if shape not in self._files:
            folder = self.folder / str(len(self._files))
            self._files[shape] = models.lora_files(self.base(shape), folder, 8)
        return self._files[shape]

    def contenders(self, shape: Shape, mode: str) -> dict[str, nn.Module]:
        """Return what takes part in `training`, `prefill` or `decode`."""
        base, files = self.base(shape), self.loras(shape)
        full = shape.hidden == self.sizes.narrow.hidden
        found: dict[str, nn.Module] = {BASE: base}
        if mode == "decode":
            found["PEFT LoRA r=8"] = models.lora(base, RANK)
        found["PEFT LoRA r=16"] = models.lora(base, 2 * RANK)
        found["PEFT LoRA r=64"] = models.lora(base, 8 * RANK)
        if mode == "training":
            found["PEFT X-LoRA, frozen experts"] = models.xlora(base, files, trainable=False)
            if full:
                found["PEFT X-LoRA, trained experts"] = models.xlora(base, files, trainable=True)
        elif mode == "prefill":
            found["PEFT X-LoRA"] = models.xlora(base, files, trainable=False)
        if mode != "training":
            found["PEFT Arrow k=2"] = models.arrow(base, files, 2)
        found["per-expert loop E=8 k=2"] = models.loop(base, 8, 2)
        for experts in self.sizes.experts if full else self.sizes.experts[1::2]:
            found[f"molora E={experts} k=2"] = mixture(base, experts, top_k(2))
        if full:
            for k in (1, 4):
                found[f"molora E=8 k={k}"] = mixture(base, 8, top_k(k))
            found["molora per rank, 16 of 64"] = mixture(base, 64, top_k(16), rank=1, form="rank")
            found["molora top-p 0.75, E=8"] = mixture(base, 8, {"name": "top_p", "p": 0.75})
            found["molora entropy switch, E=8"] = mixture(base, 8, "entropy_switch")
        return found


def rows_of(results: dict[str, Result]) -> list[dict[str, Any]]:
    return [
        {"name": name, "ms": r.ms, "ratio": r.ratio, "quartiles": r.quartiles, "ratios": r.ratios}
        for name, r in results.items()
    ]


def section(title: str, shape: object, rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"title": title, "shape": str(shape), "rows": rows, **more}


# --- whole models -----------------------------------------------------------------------------------------------------


def training_step(model: nn.Module, ids: Tensor, embedded: Tensor) -> Callable[[], None]:
    def step() -> None:
        # inputs with gradients, so that the frozen base goes backward through all of its layers as well
        loss = model(inputs_embeds=embedded.detach().requires_grad_(), labels=ids, use_cache=False).loss
        loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def training(field: Field, shape: Shape, until: float) -> dict[str, Any]:
    """A training step and the memory that it keeps for backward."""
    entries, base = field.contenders(shape, "training"), field.base(shape)
    ids = torch.randint(0, shape.vocab, (1, field.sizes.tokens))
    embedded = base.get_input_embeddings()(ids)
    works: dict[str, Work] = {}
    for name, model in entries.items():
        model.train()
        works[name] = Plain(training_step(model, ids, embedded))
    rows = field.sizes.race(works, until)
    for row in rows:
        model = entries[row["name"]]
        forward = functools.partial(
            model, inputs_embeds=embedded.detach().requires_grad_(), labels=ids, use_cache=False
        )
        row["saved_mib"] = saved_bytes(model, forward) / 2**20
        row["saved_ratio"] = row["saved_mib"] / rows[0]["saved_mib"]
    base.eval()
    return section(f"Training step, {field.sizes.tokens} tokens", shape, rows)


def prefill(field: Field, shape: Shape, until: float) -> dict[str, Any]:
    """A forward over a prompt without gradient."""
    ids = torch.randint(0, shape.vocab, (1, field.sizes.tokens))
    works: dict[str, Work] = {}
    for name, model in field.contenders(shape, "prefill").items():
        model.eval()
        works[name] = Plain(torch.no_grad()(functools.partial(model, input_ids=ids, use_cache=False)))
    return section(f"Prefill, {ids.shape[1]} tokens", shape, field.sizes.race(works, until))


class Decoding:
    """One token for each row of a batch, after a prefill; `around` returns a context for each step."""

    def __init__(self, model: nn.Module, ids: Tensor, around: Callable[[], Any] = nullcontext, **own: Any) -> None:
        self.model, self.token, self.length, self.around, self.own = (
            model.eval(),
            ids[:, -1:],
            ids.shape[1],
            around,
            own,
        )
        with torch.no_grad(), around():
            self.cache = model(input_ids=ids, use_cache=True, **own).past_key_values

    def prepare(self) -> None:
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[:, :, : self.length], layer.values[:, :, : self.length]

    def __call__(self) -> None:
        with torch.no_grad(), self.around():
            self.model(input_ids=self.token, past_key_values=self.cache, use_cache=True, **self.own)


def decode(field: Field, shape: Shape, until: float) -> dict[str, Any]:
    """One decoding step of one sequence."""
    ids = torch.randint(0, shape.vocab, (1, field.sizes.context))
    works: dict[str, Work] = {n: Decoding(m, ids) for n, m in field.contenders(shape, "decode").items()}
    note = "PEFT X-LoRA refuses key-value caches, so that each of its tokens costs a whole prefill."
    rows = field.sizes.race(works, until)
    return section(f"Decode step, batch 1, {ids.shape[1]} tokens in the cache", shape, rows, note=note)


# --- tenants ----------------------------------------------------------------------------------------------------------


def tenants(field: Field, rows: int, layers: int, until: float) -> dict[str, Any]:
    """A batch of sequences that each use one of several adapters, decoding."""
    shape = field.sizes.narrow.with_layers(layers)
    base = field.base(shape)
    peft_model = models.many_loras(base, rows, lambda number, add: add())
    ours = mixture(base, rows, top_k(1)).eval()
    ids = torch.randint(0, shape.vocab, (rows, min(field.sizes.context, 64)))
    works: dict[str, Work] = {BASE: Decoding(base, ids)}
    distinct = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= rows]
    if rows > 16:
        distinct = [n for n in distinct if n in (1, 8, 64)]
    for count in distinct:
        who = [row % count for row in range(rows)]
        gates = torch.eye(rows)[who][:, None]
        works[f"molora, {count} distinct"] = Decoding(ours, ids, functools.partial(molora.pin, ours, gates))
        names = [f"t{number}" for number in who]
        works[f"PEFT adapter_names, {count} distinct"] = Decoding(peft_model, ids, adapter_names=names)
    found = field.sizes.race(works, until)
    for row in found:
        row["tokens_per_second"] = rows / row["ms"] * 1e3
        row["distinct"] = int(row["name"].split()[-2]) if "distinct" in row["name"] else None
    return section(f"Tenants: decode step of a batch of {rows}, {rows} adapters loaded", shape, found)


# --- one adapter into a live model ------------------------------------------------------------------------------------


def slots(field: Field, until: float) -> dict[str, Any]:
    """Writing one adapter into a live model, against PEFT's add_adapter, by the number of adapters loaded."""
    shape, found = field.sizes.narrow, []
    base, taken = field.base(shape), {}

    def added(number: int, add: Callable[[], None]) -> None:
        start = time.thread_time()
        add()
        taken[number] = time.thread_time() - start

    models.many_loras(base, max(field.sizes.loaded) + 3, added)
    for loaded in field.sizes.loaded:
        model = mixture(base, loaded, top_k(1))
        pairs = {p: (torch.randn(RANK, m.d_in), torch.randn(m.d_out, RANK)) for p, m in routed_layers(model).items()}
        write = functools.partial(molora.write_expert, model, loaded // 2, pairs)
        result = race({"write": Plain(write)}, min(until, time.monotonic() + 5), least=9)["write"]
        size = sum(t.numel() * t.element_size() for pair in pairs.values() for t in pair) / 1e6
        peft_ms = sorted(taken[number] for number in range(max(1, loaded - 2), loaded + 3))[2] * 1e3
        found.append({"loaded": loaded, "megabytes": size, "molora_ms": result.ms, "peft_ms": peft_ms})
    return {"title": "One adapter into a live model", "shape": str(shape), "slots": found}
