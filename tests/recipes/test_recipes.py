"""The first seven recipes equal their papers' equations, and the file of every recipe says what a reader needs.

The equations are written here as plain loops over tokens, experts and ranks in float64. They read the weights out of
the modules and use nothing of molora's code.
"""

import dataclasses
import math
import re

import pytest
import torch
import yaml
from transformers import TrainingArguments

import molora
from molora.config import build_config, read_recipe
from molora.control import routed_layers
from molora.errors import ConfigError
from molora.paths import recipes_dir
from tests.tiny import tiny_bert_classifier, tiny_inputs, tiny_llama

RECIPES = molora.recipes()


# --- the equations, one function per paper: x (d,) -> the change of the layer's output (d_out,) -----------------------


def softmax(scores):
    top = max(scores)
    powers = [math.exp(s - top) for s in scores]
    return [p / sum(powers) for p in powers]


def dot(row, x):
    return sum(float(a) * float(b) for a, b in zip(row, x, strict=True))


def one_lora(A, B, x):
    return B @ (A @ x)


def experts_of(layer, rank):
    bank = layer.molora_bank["default"]
    A, B = bank.A.double(), bank.B.double()
    return [(A[s : s + rank], B[:, s : s + rank]) for s in range(0, A.shape[0], rank)]


def rows_of(layer):
    return layer.molora_router["default"].scorer.weight.double()


def lora(layer, x):
    bank = layer.molora_bank["default"]
    return 16 / 8 * one_lora(bank.A.double(), bank.B.double(), x)


def molora_soft(layer, x):
    experts = experts_of(layer, rank=4)
    assert len(experts) == 10
    p = softmax([dot(row, x) for row in rows_of(layer)])
    return sum(16 / 4 * p[e] * one_lora(A, B, x) for e, (A, B) in enumerate(experts))


def hydralora(layer, x):
    A, heads = layer.molora_bank["default"].A.double(), layer.molora_bank["default"].B.double()
    assert A.shape[0] == 4 and heads.shape[1] == 4 * 4
    p = softmax([dot(row, x) for row in rows_of(layer)])
    return sum(32 / 4 * p[e] * (heads[:, 4 * e : 4 * e + 4] @ (A @ x)) for e in range(4))


def mola(layer, x):
    experts = experts_of(layer, rank=8)
    p = softmax([dot(row, x) for row in rows_of(layer)])
    best = sorted(range(len(p)), key=lambda e: -p[e])[:2]
    total = sum(p[e] for e in best)
    return sum(16 / 8 * p[e] / total * one_lora(*experts[e], x) for e in best)


DYNMOLE_TOKENS = {"uncertain": 0, "confident": 0}


def dynmole(layer, x):
    experts = experts_of(layer, rank=24)
    assert len(experts) == 6
    p = softmax([dot(row, x) for row in rows_of(layer)])
    q = 1.1
    entropy = (1 - sum(v**q for v in p)) / (q - 1) / ((1 - 6 ** (1 - q)) / (q - 1))
    if entropy > 0.9:
        DYNMOLE_TOKENS["uncertain"] += 1
        kept = list(range(6))
    else:
        DYNMOLE_TOKENS["confident"] += 1
        order = sorted(range(6), key=lambda e: -p[e])
        kept, mass = order[:2], 0.0
        for place, e in enumerate(order):
            mass += p[e]
            if place >= 2 and mass <= 0.75:
                kept.append(e)
    return sum(48 / 24 * p[e] * one_lora(*experts[e], x) for e in kept)


def smora(layer, x):
    bank, router = layer.molora_bank["default"], layer.molora_router["default"]
    A, B, price = bank.A.double(), bank.B.double(), router.price.value.double()
    assert A.shape[0] == 64
    s = [1 / (1 + math.exp(-dot(row, x))) for row in router.scorer.weight.double()]
    best = sorted(range(64), key=lambda i: -(s[i] - float(price[i])))[:8]
    total = sum(s[i] for i in best)
    y = torch.zeros(B.shape[0], dtype=torch.float64)
    for i in best:
        y += 16 / 8 * (8 * s[i] / total) * B[:, i] * dot(A[i], x)
    return y


EQUATIONS = {
    "lora": lora,
    "molora": molora_soft,
    "hydralora": hydralora,
    "mola": mola,
    "dynmole": dynmole,
    "smora": smora,
}


def milora_gates(router, hidden, is_real):
    """Gates of the layers of one block, from the block's input (S, d) and which tokens are real."""
    count = sum(is_real)
    mean = [sum(float(hidden[t][j]) for t in range(len(is_real)) if is_real[t]) / count for j in range(hidden.shape[1])]
    a, b = router.scorer.activation.a.tolist(), router.scorer.activation.b.tolist()
    h = [
        sum(a[j] * v**j for j in range(7)) / (1 + abs(sum(b[j - 1] * v**j for j in range(1, 6))))  # degrees 6 and 5
        for v in mean
    ]
    p = softmax([dot(row, h) for row in router.scorer.weight])
    best = sorted(range(len(p)), key=lambda i: -p[i])[:3]
    return [p[i] if i in best else 0.0 for i in range(len(p))]


# --- the layers of a tiny Llama against the equations -----------------------------------------------------------------


def shaken(name, model):
    """The model wrapped by a recipe, with random weights everywhere, so that experts act and routers differ."""
    model = molora.wrap(model, name).eval()
    generator = torch.Generator().manual_seed(7)
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # small enough that the numbers stay near 1 through the layers, wide enough that the router is decided
            spread = 0.05 if ".activation." in parameter_name else 0.2 if "router" in parameter_name else 0.1
            start = parameter.data if ".activation." in parameter_name else 0
            parameter.data = start + spread * torch.randn(parameter.shape, generator=generator)
    for layer in routed_layers(model).values():
        for router in layer.molora_router.values():
            if router.price is not None:
                router.price.value.copy_(0.2 * torch.randn(router.num_experts, generator=generator))
    return model


def watched(model, inputs):
    """Run the model; return its routed layers with the input (B, S, d) and output (B, S, d_out) of each."""
    seen = {}
    handles = [
        layer.register_forward_hook(lambda _, args, out, name=name: seen.update({name: (args[0], out)}))
        for name, layer in routed_layers(model).items()
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return [(name, layer, *seen[name]) for name, layer in routed_layers(model).items()]


def padded_inputs(model):
    inputs = tiny_inputs(model, batch=2, length=6)
    inputs["attention_mask"][0, :2] = 0
    return inputs


@pytest.mark.proves("lora", "molora", "hydralora", "mola", "dynmole", "smora")
@pytest.mark.parametrize("name", sorted(EQUATIONS))
@torch.no_grad()
def test_layers_equal_the_equation(name):
    model = shaken(name, tiny_llama())
    DYNMOLE_TOKENS.update(uncertain=0, confident=0)
    layers = watched(model, padded_inputs(model))
    assert len(layers) == 14
    for path, layer, x, y in layers:
        weight = layer.base_layer.weight.double()
        largest = 0.0
        for row in range(x.shape[0]):
            for token in range(x.shape[1]):
                hidden = x[row, token].double()
                change = EQUATIONS[name](layer, hidden)
                largest = max(largest, float(change.abs().max()))
                torch.testing.assert_close(
                    y[row, token].double(),
                    weight @ hidden + change,
                    atol=1e-5,
                    rtol=1e-5,
                    msg=lambda m, p=path: f"{p}: {m}",
                )
        assert largest > 0.01, f"{path}: the experts do next to nothing, so the comparison would be empty"
    if name == "dynmole":
        assert min(DYNMOLE_TOKENS.values()) > 20, "both branches of the switch must be met"
    if name == "mola":
        assert {layer.molora_bank["default"].num_experts for _, layer, _, _ in layers} == {2, 6}


@pytest.mark.proves("milora")
@torch.no_grad()
def test_milora_equals_the_equation():
    model = shaken("milora", tiny_llama())
    inputs = padded_inputs(model)
    mask = inputs["attention_mask"].bool().tolist()
    layers = watched(model, inputs)
    for block in ("model.layers.0.", "model.layers.1."):
        members = [entry for entry in layers if entry[0].startswith(block)]
        assert [path.rpartition(".")[2] for path, *_ in members] == (
            "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
        )
        (leader,) = [entry for entry in members if "default" in entry[1].molora_router]
        for row in range(2):
            gates = milora_gates(leader[1].molora_router["default"], leader[2][row], mask[row])
            assert sum(gate > 0 for gate in gates) == 3
            for gate, (_, layer, x, y) in zip(gates, members, strict=True):
                A, B = layer.molora_bank["default"].A.double(), layer.molora_bank["default"].B.double()
                for token in range(x.shape[1]):
                    hidden = x[row, token].double()
                    expected = layer.base_layer.weight.double() @ hidden + gate * 16 / 8 * one_lora(A, B, hidden)
                    torch.testing.assert_close(y[row, token].double(), expected, atol=1e-5, rtol=1e-5)


# --- the files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_header_says_what_a_reader_needs(name):
    text = (recipes_dir() / f"{name}.yaml").read_text(encoding="utf-8")
    header = text[: text.index("\n\n")]
    assert all(line.startswith("#") for line in header.splitlines())
    assert re.search(r"arXiv (\d{4}\.\d{4,5}|id not known)", header)
    for word in ("Paper ", "Command ", "Expected ", "Differs "):
        assert f"\n# {word}" in header
    trains = f"molora train recipes/{name}.yaml --model " in header and " --data " in header
    assert trains or "molora.few_shot(" in header or "molora.import_peft(" in header


@pytest.mark.parametrize("name", RECIPES)
def test_train_keys_are_arguments_of_the_trainer(name, tmp_path):
    train = read_recipe(name).get("train")
    if train is None:
        assert "learning rate" in (recipes_dir() / f"{name}.yaml").read_text(encoding="utf-8"), "say that none is known"
        return
    known = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    assert set(train) <= set(known)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **train)
    assert isinstance(args.learning_rate, float) and 1e-7 < args.learning_rate <= 0.1


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_its_config(name):
    content = read_recipe(name)
    content.pop("train", None)
    config = build_config(name, {})
    assert config.recipe == name
    for key, value in content.items():
        got = getattr(config, key)
        if key == "experts":
            got = {k: got[k] for k in value}
        assert got == value, key


def test_numbers_without_a_dot_are_numbers(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("selector: {name: top_k, k: 1}\nlosses: [{name: entropy, weight: 1e-3}]\n")
    assert yaml.safe_load("1e-3") == "1e-3"  # why the reader has its own rule
    assert build_config(path, {}).losses[0]["weight"] == 0.001


@pytest.mark.parametrize(
    ("depth", "numbers"), [(1, [2]), (2, [2, 6]), (3, [2, 4, 6]), (4, [2, 4, 6, 8]), (6, [2, 2, 4, 6, 6, 8])]
)
def test_mola_allocation_fits_any_depth(depth, numbers):
    model = molora.wrap(tiny_llama(num_hidden_layers=depth), "mola")
    found = {}
    for path, layer in routed_layers(model).items():
        found.setdefault(int(path.split(".")[2]), set()).add(layer.molora_bank["default"].num_experts)
    assert [found[block] for block in range(depth)] == [{n} for n in numbers]
    assert torch.isfinite(model(**tiny_inputs(model)).logits).all()


def test_mola_gives_layers_outside_of_blocks_the_last_number():
    model = molora.wrap(tiny_bert_classifier(), "mola")
    assert routed_layers(model)["bert.pooler.dense"].molora_bank["default"].num_experts == 8


def test_a_layer_with_fewer_experts_than_k_is_an_error_unless_clamped():
    with pytest.raises(ConfigError, match=r"k=3 with 2.*clamp: true"):
        molora.wrap(tiny_llama(), "mola", selector={"k": 3})
    model = molora.wrap(tiny_llama(), "mola", selector={"k": 3, "clamp": True})
    with molora.record(model) as log:
        model(**tiny_inputs(model))
    chosen = {routing.num_experts: routing.selected.sum(-1).unique().tolist() for routing in log.values()}
    assert chosen == {2: [2], 6: [3]}
