"""LoRA folders for the tests of the library, written by hand: real PEFT layout, no model needed."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.adapters import CONFIG, WEIGHTS

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"  # of tiny_llama: 32 -> 32, 32 -> 16
SIZES = {Q: (32, 32), V: (32, 16)}


def lora(folder: Path, seed=0, rank=2, alpha=4.0, paths=(Q, V), dtype=torch.float32, **config) -> Path:
    """A random LoRA on layers of tiny_llama, of which every number is different for every seed."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path in paths:
        d_in, d_out = SIZES[path]
        shapes = {"lora_A": (rank, d_in), "lora_B": (d_out, rank)}
        for part, shape in shapes.items():
            value = 0.1 * torch.randn(shape, generator=generator)
            tensors[f"base_model.model.{path}.{part}.weight"] = value.to(dtype)
    write(folder, tensors, r=rank, lora_alpha=alpha, target_modules=[p.rpartition(".")[2] for p in paths], **config)
    return folder


def write(folder: Path, tensors, **config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    base = {"peft_type": "LORA", "base_model_name_or_path": "tiny/llama", "task_type": "CAUSAL_LM", "bias": "none"}
    (folder / CONFIG).write_text(json.dumps(base | config, indent=2))
    return folder
