"""The contenders: one frozen Llama, and the same weights with adapters by PEFT, by a per-expert loop and by molora.

All of them share the storage of the base weights, adapt the same seven linear layers of each block, and get random
up-projections, so that no expert is zero.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft import ArrowConfig, LoraConfig, PeftModel, XLoraConfig, create_arrow_model, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import molora

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 8


@dataclass(frozen=True)
class Shape:
    """A Llama: sizes of the hidden states and of the MLP, heads, blocks and vocabulary."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    layers: int
    vocab: int

    def with_layers(self, layers: int) -> Shape:
        return Shape(self.hidden, self.inner, self.heads, self.kv_heads, layers, self.vocab)

    def __str__(self) -> str:
        return f"Llama {self.hidden} wide, {self.layers} blocks, vocabulary {self.vocab:,}"


def base_model(shape: Shape) -> LlamaForCausalLM:
    """Return a frozen model with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        num_hidden_layers=shape.layers,
        vocab_size=shape.vocab,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def twin(model: nn.Module) -> Any:
    """Return a copy that shares the parameters."""
    return copy.deepcopy(model, memo={id(p): p for p in model.parameters()})


def randomise(model: nn.Module) -> nn.Module:
    """Give every up-projection random values, as if it had been trained."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or name.endswith((".Bt", "expert_B")):
            nn.init.normal_(parameter, std=0.02)
    return model


# --- PEFT -----------------------------------------------------------------------------------------------------------


def lora_config(rank: int) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEARS)


def lora(base: nn.Module, rank: int) -> nn.Module:
    return randomise(get_peft_model(twin(base), lora_config(rank)))


def lora_files(base: nn.Module, folder: Path, count: int) -> list[str]:
    """Save `count` LoRAs of rank 8 and return where."""
    paths = [str(folder / f"lora_{i}") for i in range(count)]
    model = lora(base, RANK)
    for path in paths:
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.02)
        model.save_pretrained(path)
    return paths


def xlora(base: nn.Module, paths: list[str], trainable: bool) -> nn.Module:
    """PEFT's X-LoRA over saved experts; it refuses key-value caches."""
    model = twin(base)
    model.config.use_cache = False
    config = XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=model.config.hidden_size,
        adapters={str(i): path for i, path in enumerate(paths)},
        use_trainable_adapters=trainable,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, config)


def arrow(base: nn.Module, paths: list[str], k: int) -> nn.Module:
    """PEFT's Arrow over saved experts: top-k of the experts by their leading directions; inference only."""
    return create_arrow_model(twin(base), paths, ArrowConfig(top_k=k, router_temperature=1.0))


def many_loras(base: nn.Module, count: int, added: Callable[[int, Callable[[], None]], None]) -> PeftModel:
    """Return a model with `count` named LoRAs of rank 8, `t0`, `t1`, ...; `added` runs each addition but the first."""
    model = get_peft_model(twin(base), lora_config(RANK), adapter_name="t0")
    for number in range(1, count):
        added(number, lambda number=number: model.add_adapter(f"t{number}", lora_config(RANK)))
    return randomise(model).eval()


# --- the loop of MoE-PEFT -------------------------------------------------------------------------------------------


class LoopLinear(nn.Module):
    """A linear layer with LoRA experts in a Python loop: the structure of MolaSparseMoe in MoE-PEFT (TUDB-Labs).

    Each expert takes the tokens that chose it, multiplies twice, and adds its rows to a zeroed output of full width.
    The dropout of 0.05 that MoE-PEFT insists on is left out, since nobody else has one here.
    """

    def __init__(self, base: nn.Linear, experts: int, rank: int, k: int) -> None:
        super().__init__()
        self.base, self.k, self.scaling = base, k, 2.0
        self.gate = nn.Linear(base.in_features, experts, bias=False)
        self.expert_A = nn.ParameterList(torch.randn(rank, base.in_features) * 0.02 for _ in range(experts))
        self.expert_B = nn.ParameterList(torch.randn(base.out_features, rank) * 0.02 for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        rows = x.view(-1, x.shape[-1])
        weights, selected = torch.topk(F.softmax(self.gate(rows), dim=1, dtype=torch.float), self.k, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        total = torch.zeros(rows.shape[0], y.shape[-1], dtype=x.dtype)
        mask = F.one_hot(selected, num_classes=len(self.expert_A)).permute(2, 1, 0)
        for expert, (A, B) in enumerate(zip(self.expert_A, self.expert_B, strict=True)):
            choice, token = torch.where(mask[expert])
            current = rows[None, token].reshape(-1, rows.shape[-1])
            current = F.linear(F.linear(current, A), B) * self.scaling * weights[token, choice, None]
            total.index_add_(0, token, current.to(x.dtype))
        return y + total.view(y.shape)


def loop(base: nn.Module, experts: int, k: int) -> nn.Module:
    model = twin(base)
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, linear in list(part.named_children()):
                if name in LINEARS:
                    setattr(part, name, LoopLinear(linear, experts, RANK, k))
    return model


# --- molora ---------------------------------------------------------------------------------------------------------


def mixture(base: nn.Module, experts: int, selector: Any, *, rank: int = RANK, form: str = "lora") -> nn.Module:
    """Return the base with `experts` experts per layer; no auxiliary loss, as the others have none."""
    # random weights that spread the scores as training does, so that top-p and the entropy switch have to choose
    spread = 2.0 / base.config.hidden_size**0.5
    return randomise(
        molora.wrap(
            twin(base),
            "molora",
            target_modules=LINEARS,
            experts={"num": experts, "rank": rank, "form": form},
            scorer={"name": "linear", "init": spread},
            selector=selector,
            losses=[],
        )
    )


def top_k(k: int) -> dict[str, Any]:
    return {"name": "top_k", "k": k}


def versions() -> dict[str, str]:
    import transformers

    return {
        "torch": torch.__version__,
        "peft": peft.__version__,
        "transformers": transformers.__version__,
        "molora": molora.__version__,
    }
