"""Systems whose experts are whole blocks: the recipe against the paper's equation, in float64 and plain loops."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

import molora
from molora.control import routed_layers
from tests.tiny import tiny_inputs, tiny_llama

MLP = ("gate_proj", "up_proj", "down_proj")


def shaken(**changes):
    model = molora.wrap(tiny_llama(), "mixlora", **changes).eval()
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "molora_" in name:
            parameter.data = (0.5 if "router" in name else 0.15) * torch.randn(parameter.shape, generator=generator)
    return model


def seen_by(model, inputs):
    """Input and output of each routed layer in one forward."""
    seen = {}
    hooks = [
        layer.register_forward_hook(lambda _, args, out, path=path: seen.update({path: (args[0], out)}))
        for path, layer in routed_layers(model).items()
    ]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    return seen


def lora(layer, expert, x):
    """(W + 32 / 16 B_e A_e) x in float64."""
    A, B = (factor.double() for factor in layer.molora_bank["default"].pair(expert))
    return layer.base_layer.weight.double() @ x + 2 * B @ (A @ x)


def two_best(row_of_each, x):
    scores = [float(row.double() @ x) for row in row_of_each]
    powers = [math.exp(score - max(scores)) for score in scores]
    best = sorted(range(len(powers)), key=lambda e: -powers[e])[:2]
    return {e: powers[e] / sum(powers[b] for b in best) for e in best}


@pytest.mark.proves("mixlora")
@torch.no_grad()
def test_mixlora_is_a_loop_over_tokens_and_whole_mlps():
    model = shaken()
    seen, layers = seen_by(model, tiny_inputs(model, length=5)), routed_layers(model)
    used = set()
    for block in ("model.layers.0.mlp", "model.layers.1.mlp"):
        gate, up, down = (layers[f"{block}.{name}"] for name in MLP)
        x, y = seen[f"{block}.gate_proj"][0].double(), seen[f"{block}.down_proj"][1]
        for row in range(2):
            for token in range(5):
                hidden = x[row, token]
                expected = torch.zeros(32, dtype=torch.float64)
                for e, weight in two_best(gate.molora_router["default"].scorer.weight, hidden).items():
                    used.add(e)
                    inner = torch.nn.functional.silu(lora(gate, e, hidden)) * lora(up, e, hidden)
                    expected += weight * lora(down, e, inner)
                torch.testing.assert_close(y[row, token].double(), expected, atol=1e-5, rtol=1e-5)
    assert len(used) > 4
    for path, layer in layers.items():  # attention: one LoRA, not routed
        if "self_attn" in path:
            x, y = (value.double() for value in seen[path])
            assert layer.molora_bank["default"].num_experts == 1 and "default" not in layer.molora_router
            torch.testing.assert_close(y[0, 3], lora(layer, 0, x[0, 3]), atol=1e-5, rtol=1e-5)


@pytest.mark.proves("mixlora")
@torch.no_grad()
def test_mixlora_starts_as_the_base_and_any_gates_do():
    inputs, base = tiny_inputs(tiny_llama()), tiny_llama()
    fresh = molora.wrap(tiny_llama(), "mixlora").eval()
    torch.testing.assert_close(fresh(**inputs).logits, base(**inputs).logits, atol=1e-6, rtol=1e-6)
    dynamic = molora.wrap(
        tiny_llama(), "mixlora", selector={"name": "top_p", "p": 0.8, "crossing": "include", "normalise": "none"}
    ).eval()
    with molora.record(dynamic) as log:
        logits = dynamic(**inputs).logits
    assert min(routing.gates.sum(-1).min() for routing in log.values()) < 0.95, (
        "gates that sum to 1 would prove nothing"
    )
    torch.testing.assert_close(logits, base(**inputs).logits, atol=1e-6, rtol=1e-6)


@pytest.mark.proves("mixlora")
@torch.no_grad()
def test_mixlora_with_identical_experts_is_one_lora():
    model, inputs = shaken(), tiny_inputs(tiny_llama())
    lora = get_peft_model(tiny_llama(), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")).eval()
    for path, layer in routed_layers(model).items():
        bank = layer.molora_bank["default"]
        for expert in range(1, bank.num_experts):
            bank.write(expert, *bank.pair(0), bank.scaling)
        own = lora.base_model.model.get_submodule(path)
        own.lora_A.default.weight.data, own.lora_B.default.weight.data = bank.pair(0)
    torch.testing.assert_close(model(**inputs).logits, lora(**inputs).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.proves("mixlora")
@torch.no_grad()
def test_mixlora_with_all_experts_is_dense_softmax():
    inputs = tiny_inputs(tiny_llama())
    every = shaken(selector={"k": 8})
    dense = shaken(selector={"name": "softmax"})
    torch.testing.assert_close(every(**inputs).logits, dense(**inputs).logits, atol=1e-5, rtol=1e-5)
    assert (every(**inputs).logits - shaken()(**inputs).logits).abs().max() > 1e-3


@pytest.mark.proves("mixlora")
def test_mixlora_balance_loss_is_the_authors_at_balance():
    """1e-3 times N sum f P, where f sums to k = 2: 2e-3 when all experts are chosen equally often."""
    model = molora.wrap(tiny_llama(), "mixlora").train()
    for layer in routed_layers(model).values():
        for router in layer.molora_router.values():
            torch.nn.init.zeros_(router.scorer.weight)
    assert model(**tiny_inputs(model)).aux_loss.item() == pytest.approx(2e-3)
