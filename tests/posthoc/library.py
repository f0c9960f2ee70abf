"""Small real LoRAs for tests of post-hoc routers: made with PEFT, with effects that can be seen, saved as folders."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from tests.tiny import tiny_llama

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def make_lora(folder: Path, seed: int, *, rank=4, alpha=8, targets=TARGETS, base=tiny_llama, change=None) -> Path:
    """Write one plain PEFT LoRA with random A and B; `change(path, A, B)` may rewrite both in place."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=0.0)
    model = get_peft_model(base(), config)
    generator = torch.Generator().manual_seed(seed)
    for path, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            A, B = module.lora_A["default"].weight.data, module.lora_B["default"].weight.data
            A.copy_(0.3 * torch.randn(A.shape, generator=generator))
            B.copy_(0.3 * torch.randn(B.shape, generator=generator))
            if change is not None:
                change(path.removeprefix("base_model.model."), A, B)
    model.save_pretrained(str(folder))
    return folder


def library(folder: Path, count=3, first=10, **options) -> list[Path]:
    """Write `count` different LoRAs of one shape."""
    return [make_lora(folder / f"lora{i}", seed=first + i, **options) for i in range(count)]
