"""What the tests of serving share: LoRAs as PEFT has them, the same in a store, and what transformers generates."""

import copy

import peft
import torch
from peft import get_peft_model_state_dict

import molora
from molora.serve.store.store import AdapterStore
from tests import tiny

LLAMA = ["q_proj", "v_proj", "down_proj"]


def make_loras(base, targets, count=16, ranks=(4,), std=0.3):
    """Return a PEFT model with LoRAs a0, a1, ... of large effect; ranks go round."""
    model = None
    for number in range(count):
        rank = ranks[number % len(ranks)]
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
        if model is None:
            model = peft.get_peft_model(copy.deepcopy(base), config, adapter_name="a0")
        else:
            model.add_adapter(f"a{number}", config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model.eval()


def fill(store, loras, names=None):
    """Register the LoRAs of a PEFT model in a store."""
    for name in names or loras.peft_config:
        tensors = {key: value.clone() for key, value in get_peft_model_state_dict(loras, adapter_name=name).items()}
        store.register(name, (loras.peft_config[name].to_dict(), tensors))


def make_store(base, loras, slots=None, **options):
    """Return a store around a copy of a base model, with the LoRAs registered."""
    store = AdapterStore(copy.deepcopy(base), slots=slots or {4: 16, 8: 8}, **options)
    fill(store, loras)
    return store


def make_mixture(base, folder, targets, seed=2, recipe="mixtral", **changes):
    """Save a routed mixture with random experts and routers of large effect; return it and its folder."""
    model = molora.wrap(copy.deepcopy(base), recipe, target_modules=targets, **changes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "molora" in name and parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.eval().save_pretrained(folder)
    return model, folder


@torch.no_grad()
def generated(model, prompt_ids, limit, **options):
    """Return what transformers generates greedily, whatever the end-of-text token."""
    ids = torch.tensor([prompt_ids])
    options = {"do_sample": False, "max_new_tokens": limit, "eos_token_id": None, "pad_token_id": tiny.PAD} | options
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    start = 1 if model.config.is_encoder_decoder else len(prompt_ids)
    return out[0, start:].tolist()


def prompts_of(count, seed=0, longest=12):
    """Return prompts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(4, tiny.VOCAB, (n,), generator=generator).tolist() for n in lengths]
