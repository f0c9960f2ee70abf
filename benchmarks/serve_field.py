"""What the serving benchmark serves: a Llama of random weights, its tokenizer, LoRAs, mixtures and a large library.

All of it is made on the spot in a temporary folder, so that a server in a process of its own finds the same files.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import PreTrainedTokenizerFast

import molora
from molora.files import CONFIG, WEIGHTS
from molora.hub.card import AdapterCard, hash_files
from molora.serve.engine.engine import Engine
from molora.serve.request import Mixture, Program, Weighted
from molora.serve.store.store import AdapterStore

from .models import LINEARS, Shape, base_model, twin

RANK = 8
STD = 0.02
EXPERTS = 8


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
        shape: of the model.
        adapters: LoRAs of rank 8 on all linear layers.
        library: registered adapters, small ones.
        mixtures: routed mixtures of 8 experts.
        rows: of the batch in which distinct adapters are counted, up to as many of them.
        prompt, answer: tokens in sections about decoding alone.
        requests: of one load with answers of mixed lengths.
        seconds: of one load that lasts for a time.
        kv_bytes: of keys and values.
        least: rounds of everything that is compared.
    """

    shape: Shape
    adapters: int
    library: int
    mixtures: int
    rows: int
    prompt: int
    answer: int
    requests: int
    seconds: float
    kv_bytes: int
    least: int


FULL = Sizes(Shape(576, 1536, 9, 3, 12, 4096), 64, 1000, 4, 64, 16, 32, 48, 20.0, 1 << 28, 3)
# about as large as Gemma 3 270M, without its vocabulary; for what does not depend on the model, beside it
LARGE = Sizes(Shape(1024, 2816, 16, 4, 16, 32_000), 16, 16, 1, 16, 16, 32, 16, 20.0, 1 << 28, 1)
QUICK = Sizes(Shape(32, 48, 4, 2, 2, 128), 8, 24, 2, 8, 4, 8, 16, 1.0, 1 << 22, 1)


def one(name: str) -> Weighted:
    """Return the program of one adapter."""
    return Weighted(((name, 1.0),))


class Field:
    """The files of a run, and what is built from them.

    Args:
        sizes: of everything.

    Attributes:
        folder: where the files are; `model`, `hub` and `mixtures` in it.
        base: the model.
        tokenizer: of the model: every token is a word.
    """

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.folder = Path(tempfile.mkdtemp(prefix="molora_bench_"))
        self.base = base_model(sizes.shape)
        self.tokenizer = make_tokenizer(sizes.shape.vocab)
        self.base.save_pretrained(self.folder / "model")
        self.tokenizer.save_pretrained(self.folder / "model")
        self._library: Path | None = None

    def close(self) -> None:
        """Remove the files."""
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- files --------------------------------------------------------------------------------------------------------

    @property
    def hub(self) -> Path:
        """A library of the LoRAs a0, a1, ..., made when it is asked for."""
        root = self.folder / "hub"
        if not root.exists():
            for number in range(self.sizes.adapters):
                self._adapter(root / f"a{number}" / "1", number, LINEARS)
        return root

    @property
    def library(self) -> Path:
        """A library of many small adapters l0000, l0001, ..., made when it is asked for."""
        root = self.folder / "library"
        if not root.exists():
            for number in range(self.sizes.library):
                self._adapter(root / f"l{number:04d}" / "1", number, ["q_proj"], blocks=1)
        return root

    def adapter(self, name: str) -> Path:
        """Return the folder of a LoRA."""
        return self.hub / name / "1"

    def mixture(self, number: int) -> Path:
        """Return the folder of a routed mixture: 8 experts of rank 8 and a router in every layer, 2 for each token."""
        folder = self.folder / "mixtures" / f"m{number}"
        if not folder.exists():
            torch.manual_seed(number)
            model = molora.wrap(twin(self.base), "mixtral")
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "molora" in name and parameter.requires_grad:
                        parameter.normal_(std=STD)
            with quiet():
                model.save_pretrained(folder)
        return folder

    def _adapter(self, folder: Path, seed: int, targets: list[str], blocks: int | None = None) -> None:
        """Write one LoRA as PEFT does, with a card."""
        folder.mkdir(parents=True)
        generator = torch.Generator().manual_seed(seed)
        tensors: dict[str, torch.Tensor] = {}
        for path, module in self.base.named_modules():
            if not isinstance(module, nn.Linear) or path.rpartition(".")[2] not in targets:
                continue
            if blocks is not None and int(path.split(".")[2]) >= blocks:
                continue
            for side, shape in (("A", (RANK, module.in_features)), ("B", (module.out_features, RANK))):
                name = f"base_model.model.{path}.lora_{side}.weight"
                tensors[name] = STD * torch.randn(shape, generator=generator)
        save_file(tensors, folder / WEIGHTS)
        pattern = None if blocks is None else rf".*layers\.[0-{blocks - 1}]\..*({'|'.join(targets)})"
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=pattern or targets, task_type="CAUSAL_LM")
        told = {key: list(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
        (folder / CONFIG).write_text(json.dumps({**told, "peft_type": "LORA", "inference_mode": True}, default=str))
        card = AdapterCard(task="none", base="bench/model", description="random", files=hash_files(folder))
        (folder / "card.yaml").write_text(card.to_yaml())

    # --- built --------------------------------------------------------------------------------------------------------

    def store(
        self, slots: int, names: Iterable[str] = (), mixtures: int = 0, pinned: Iterable[str] = (), **options: Any
    ) -> AdapterStore:
        """Return a store around a copy of the model that shares its weights."""
        store = AdapterStore(twin(self.base), slots={RANK: slots}, mixtures=max(1, mixtures), **options)
        for name in names:
            store.register(name, self.adapter(name))
        for number in range(mixtures):
            store.register(f"m{number}", self.mixture(number))
        for name in pinned:
            store.pin(name)
        return store

    @contextmanager
    def engine(self, store: AdapterStore, max_batch: int, **options: Any) -> Any:
        """Open an engine on a store; both are closed at the end."""
        options = {"backend": "hf-cb", "kv_bytes": self.sizes.kv_bytes, "max_waiting": 4096, "timeout": 600.0} | options
        try:
            engine = Engine(store.model, self.tokenizer, store, max_batch=max_batch, **options)
            try:
                yield engine
            finally:
                engine.close()
        finally:
            store.close()


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are the words `t0`, `t1`, ...; the first four are special."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = {word: number for number, word in enumerate([*special, *(f"t{n}" for n in range(4, vocabulary))])}
    core = Tokenizer(WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def kinds(count: int, mixtures: int) -> Mapping[str, Program]:
    """Return the programs of rows that are compared with one adapter, by what the report calls them."""
    mixes = {f"weighted mix of {n}": Weighted(tuple((f"a{i}", 1 / n) for i in range(n))) for n in (2, 4) if n <= count}
    return {**mixes, **({"routed mixture of 8": Mixture("m0")} if mixtures else {})}


@contextmanager
def quiet() -> Any:
    """Keep warnings of libraries out of the output."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
