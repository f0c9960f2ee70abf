"""Mixtures of small random LoRAs for the tests of routers made after training."""

import torch
from peft import LoraConfig, get_peft_model

import molora
from tests.tiny import tiny_llama

ATTENTION = ["q_proj", "v_proj"]


def save_lora(folder, seed=0, build=tiny_llama, size=0.3, **options):
    """A PEFT LoRA with random A and B, saved; returns the folder."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, **options}
    model = get_peft_model(build(), LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(size * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def save_loras(root, number=3, build=tiny_llama, **options):
    return [save_lora(root / f"lora_{seed}", seed + 1, build, **options) for seed in range(number)]


def mixture_of(folders, build=tiny_llama, **changes):
    return molora.import_peft(build(), folders, **changes).eval()


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}
