"""Adapters for the tests of a server: random LoRAs on tiny_llama, and sources that tests control."""

import threading
from dataclasses import replace

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from molora.serve.store.loading import Header, Loaded
from tests import tiny

WAIT = 20.0  # seconds that a test waits for another thread at most
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def peft_lora(folder, seed=0, rank=4, targets=("q_proj", "down_proj"), std=0.3, **config):
    """Save a LoRA that PEFT made, every number of it random; returns its folder."""
    generator = torch.Generator().manual_seed(seed)
    options = {"r": rank, "lora_alpha": 2 * rank, "target_modules": list(targets), "task_type": "CAUSAL_LM"} | config
    model = get_peft_model(tiny.tiny_llama(), LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    for extra in set(folder.iterdir()):
        if extra.name == "README.md":
            extra.unlink()
    return folder


def peft_logits(folder, ids):
    """What PEFT computes with a LoRA folder."""
    model = PeftModel.from_pretrained(tiny.tiny_llama(), folder).eval()
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def held(seed=0, rank=2, bias=0.0):
    """(config, tensors) of a LoRA on one layer."""
    generator = torch.Generator().manual_seed(seed)
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{path}.lora_A.weight": torch.randn(rank, 32, generator=generator) + bias,
        f"{path}.lora_B.weight": torch.randn(32, rank, generator=generator),
    }
    return {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj"]}, tensors


class Told:
    """A listener that lets a test wait for a condition instead of for a time."""

    def __init__(self):
        self._changed = threading.Condition()
        self.calls = 0

    def __call__(self):
        with self._changed:
            self.calls += 1
            self._changed.notify_all()

    def until(self, condition):
        """Wait until `condition()` is true; a changed store calls this object."""
        with self._changed:
            assert self._changed.wait_for(condition, WAIT), "waited too long"


class Fake:
    """A source that a test controls: loads are counted, may be held, may fail.

    Args:
        inner: the source behind it.
        slow: whether loads wait for `gate`.
        error: what loads raise.
    """

    def __init__(self, inner, slow=False, error=None, **header):
        self.inner, self.error = inner, error
        self.header = replace(inner.header, **header)
        self.began, self.gate = threading.Event(), threading.Event()
        self.loads = 0
        if not slow:
            self.gate.set()

    def load(self):
        self.loads += 1
        self.began.set()
        assert self.gate.wait(WAIT)
        if self.error is not None:
            raise self.error
        return self.inner.load()


class Nothing:
    """A source for tests of the bookkeeping alone."""

    def __init__(self, rank=8, nbytes=10, kind="lora", digest="d"):
        self.header = Header(kind, rank, nbytes, "base", True, None)
        self.digest = digest

    def load(self):
        return Loaded(self.digest, nbytes=self.header.bytes)
