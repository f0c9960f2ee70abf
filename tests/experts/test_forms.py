"""Every form of experts against plain loops over rows, tokens and experts, and what the forms refuse."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import molora
from molora.control import routed_layers
from molora.errors import ConfigError
from molora.experts.forms import build_experts, forms
from tests.tiny import tiny_bert_classifier, tiny_inputs, tiny_llama

D_IN, D_OUT, E, R, SCALE = 6, 4, 3, 2, 1.5
CASES = [
    "film",
    "factor",
    {"name": "factor", "splits": 2},
    {"name": "factor", "activation": "silu", "bias": True},
    "bottleneck",
    {"name": "bottleneck", "activation": "tanh", "bias": True},
    "chain",
    {"name": "chain", "steps": 3},
    "ia3",
    {"name": "ia3", "side": "input"},
]
ACT = {"silu": F.silu, "gelu": F.gelu, "tanh": torch.tanh, None: lambda h: h}


def label(form):
    return form if isinstance(form, str) else "-".join(str(v) for v in form.values())


def filled(form, experts=E, **options):
    bank = build_experts(form, D_IN, D_OUT, [R] * experts, **({"scaling": SCALE} | options)).double()
    for parameter in bank.parameters():
        torch.nn.init.normal_(parameter)
    return bank


def act(bank, x, y, gates):
    """What the layer puts out with the experts, its base being the matrix of `base_of`."""
    return bank.add_to(base_of(bank.before(x, gates)) if bank.on_input else y, x, gates)


WEIGHT = torch.linspace(-1, 1, D_IN * D_OUT, dtype=torch.float64).view(D_OUT, D_IN)


def base_of(x):
    return x @ WEIGHT.T


def one_token(bank, x, g):
    """The same for one token x (d_in,) and its gates (h * E,), one expert after another."""
    if bank.form == "ia3":
        scale = 1 + sum(g[e] * bank.vectors[e] for e in range(E))
        return WEIGHT @ (x * scale) if bank.on_input else (WEIGHT @ x) * scale
    if bank.form == "film":
        return WEIGHT @ x + SCALE * sum(g[e] * bank.Bt.T @ (bank.scales[e] * (bank.A @ x)) for e in range(E))
    if bank.form == "chain":
        h = bank.A @ x
        for step in range(bank.splits):
            h = h + sum(g[step * E + e] * bank.C[e] @ h for e in range(E))
        return WEIGHT @ x + SCALE * bank.Bt.T @ h
    A, B = bank.A.view(E, R, D_IN), bank.Bt.view(E, R, D_OUT).transpose(1, 2)
    down, up = (torch.zeros(E, R), torch.zeros(E, D_OUT)) if bank.up_bias is None else (bank.down_bias, bank.up_bias)
    if bank.form == "bottleneck":
        adapters = [B[e] @ ACT[bank.activation](A[e] @ x + down[e]) + up[e] for e in range(E)]
        return WEIGHT @ x + SCALE * sum(g[e] * adapters[e] for e in range(E))
    mean_A, mean_B = torch.zeros(R, D_IN).double(), torch.zeros(D_OUT, R).double()
    i, o = D_IN // bank.splits, D_OUT // bank.splits
    for q in range(bank.splits):
        for e in range(E):
            mean_A[:, q * i : (q + 1) * i] += g[q * E + e] * A[e][:, q * i : (q + 1) * i]
            mean_B[q * o : (q + 1) * o] += g[q * E + e] * B[e][q * o : (q + 1) * o]
    h = mean_A @ x + sum(g[e] * down[e] for e in range(E))
    return WEIGHT @ x + SCALE * (mean_B @ ACT[bank.activation](h) + sum(g[e] * up[e] for e in range(E)))


def inputs(bank):
    x = torch.randn(2, 5, D_IN, dtype=torch.float64)
    return x, base_of(x), torch.rand(2, 5, bank.num_gates, dtype=torch.float64)


# --- what they compute ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", CASES, ids=label)
@pytest.mark.parametrize("leading", [(2, 5), (2, 1), (1, 5), (1, 1), ()], ids=str)
def test_forms_are_their_loops(form, leading):
    bank = filled(form)
    x, y, gates = inputs(bank)
    gates = gates[: leading[0], : leading[1]] if leading else gates[0, 0]
    got, every = act(bank, x, y, gates), gates.expand(2, 5, bank.num_gates)
    assert got.shape == (2, 5, D_OUT)
    for row in range(2):
        for token in range(5):
            torch.testing.assert_close(got[row, token], one_token(bank, x[row, token], every[row, token]))


@pytest.mark.parametrize("form", CASES, ids=label)
def test_gates_without_blocks_count_for_every_block(form):
    bank = filled(form)
    x, y, gates = inputs(bank)
    gates = gates[..., :E]
    torch.testing.assert_close(act(bank, x, y, gates), act(bank, x, y, gates.repeat(1, 1, bank.splits)))


@pytest.mark.parametrize("form", CASES, ids=label)
def test_one_token_and_flat_tokens(form):
    """In decoding there is one token, and some models flatten their tokens before their layers."""
    bank = filled(form)
    x, y, gates = inputs(bank)
    whole = act(bank, x, y, gates[:, :1])
    one = act(bank, x[:, 2:3], y[:, 2:3], gates[:, :1])
    torch.testing.assert_close(one, whole[:, 2:3])
    every = gates[:, :1].expand(2, 5, -1)
    flat = act(bank, x.flatten(0, 1), y.flatten(0, 1), every.flatten(0, 1))
    torch.testing.assert_close(flat.view(2, 5, D_OUT), whole)


@pytest.mark.parametrize("form", CASES, ids=label)
@pytest.mark.parametrize("by_row", [False, True])
def test_gradients_are_those_of_the_function(form, by_row):
    bank = filled(form)
    x, _, gates = inputs(bank)
    gates = gates[:, :1] if by_row else gates
    leaves = [t.requires_grad_() for t in (x[:1, :2].clone(), gates[:1, :2].clone())] + list(bank.parameters())
    assert torch.autograd.gradcheck(lambda x, g, *_: act(bank, x, base_of(x), g), leaves)


@pytest.mark.parametrize("name", list(forms))
def test_a_fresh_form_changes_nothing_under_any_gates(name):
    bank = build_experts(name, D_IN, D_OUT, [1 if name == "rank" else R] * E)
    x, y, gates = torch.randn(2, 5, D_IN), torch.randn(2, 5, D_OUT), 3 * torch.rand(2, 5, bank.num_gates)
    assert torch.equal(bank.add_to(y.clone(), x, gates), y) and torch.equal(bank.before(x, gates), x)
    learns = bank.gradients()
    assert learns["B"] and all(p.eq(0).all() for p in learns["B"]), "what learns at once must start at zero"


@pytest.mark.parametrize(
    "form", [{"name": "factor", "activation": "silu", "bias": True}, "bottleneck", "film", "chain"]
)
def test_dropout_acts_in_training_on_the_input(form):
    bank = filled(form, dropout=0.5).train()
    x, y, gates = inputs(bank)
    torch.manual_seed(4)
    got = act(bank, x, y, gates)
    torch.manual_seed(4)
    dropped = F.dropout(x, 0.5)
    bank.eval()
    torch.testing.assert_close(got, act(bank, dropped, y, gates))
    assert not torch.allclose(got, act(bank, x, y, gates))


@pytest.mark.parametrize("form", CASES, ids=label)
def test_permuting_experts_with_their_gates_changes_nothing(form):
    bank = filled(form)
    x, y, gates = inputs(bank)
    before, order = act(bank, x, y, gates), torch.tensor([2, 0, 1])
    bank.permute(order)
    moved = gates.unflatten(-1, (bank.splits, E))[..., order].flatten(-2)
    torch.testing.assert_close(act(bank, x, y, moved), before)
    assert not torch.allclose(act(bank, x, y, gates), before)


@pytest.mark.parametrize("name", ["film", "chain", "factor"])
def test_half_precision_outputs_keep_their_dtype(name):
    bank = build_experts(name, D_IN, D_OUT, [R] * E)
    torch.nn.init.normal_(bank.Bt)
    x, y = torch.randn(2, 5, D_IN).bfloat16(), torch.randn(2, 5, D_OUT).bfloat16()
    got = bank.add_to(y, x, torch.rand(2, 1, bank.num_gates))
    assert got.dtype == torch.bfloat16 and torch.isfinite(got).all()


class Counting(TorchDispatchMode):
    """Counts the operators that run."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", ["lora", "shared_a", *CASES], ids=label)
@pytest.mark.parametrize("by_row", [False, True])
def test_no_loop_over_experts(form, by_row):
    counts = []
    for experts in (2, 32):
        bank = build_experts(form, D_IN, D_OUT, [R] * experts)
        x, y = torch.randn(2, 5, D_IN), torch.randn(2, 5, D_OUT)
        gates = torch.rand(2, 1 if by_row else 5, bank.num_gates, requires_grad=True)
        with Counting() as counting:
            read = bank.before(x, gates)
            (bank.add_to(y, read, gates).sum() + read.sum()).backward()
        counts.append(counting.count)
    assert counts[0] == counts[1], "the number of operators must not grow with the number of experts"


# --- constant gates ---------------------------------------------------------------------------------------------------

LORAS = [form for form in CASES if label(form) in ("film", "factor", "factor-2", "chain", "chain-3")]


@pytest.mark.parametrize("form", LORAS, ids=label)
def test_constant_gates_make_a_lora(form):
    bank = filled(form)
    x, y, gates = inputs(bank)
    constant = gates[0, 0]
    A, B = bank.mixed(constant)
    assert A.shape == (R, D_IN) and B.shape == (D_OUT, R), "the rank is that of one expert"
    torch.testing.assert_close(act(bank, x, y, constant) - y, SCALE * x @ A.T @ B.T)
    torch.testing.assert_close(bank.delta_weight(constant), SCALE * B @ A)
    alone = F.one_hot(torch.tensor(1), E).double()
    A, B = bank.pair(1)
    torch.testing.assert_close(act(bank, x, y, alone) - y, SCALE * x @ A.T @ B.T)
    assert not A.requires_grad


@pytest.mark.parametrize("form", [form for form in CASES if form not in LORAS], ids=label)
def test_what_is_no_lora_says_so(form):
    bank = filled(form)
    assert not bank.is_lora
    for call in (lambda: bank.mixed(torch.ones(E)), lambda: bank.delta_weight(torch.ones(E))):
        with pytest.raises(ConfigError, match=f"form '{bank.form}' are no LoRA, even under constant gates"):
            call()


@pytest.mark.parametrize("form", CASES, ids=label)
def test_no_slot_takes_a_lora(form):
    bank = filled(form)
    before = {key: value.clone() for key, value in bank.state_dict().items()}
    for call in (lambda: bank.write(0, torch.ones(R, D_IN), torch.ones(D_OUT, R)), lambda: bank.clear(0)):
        with pytest.raises(ConfigError, match=f"form '{bank.form}' have no slots for LoRAs; use form: lora"):
            call()
    assert all(torch.equal(value, before[key]) for key, value in bank.state_dict().items())


def two_layer(form, **changes):
    changes = {"target_modules": ["q_proj", "up_proj"], "experts": {"form": form, "num": 3, "rank": 2}, **changes}
    model = molora.wrap(tiny_llama(), {}, **changes).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "molora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("form", LORAS, ids=label)
@pytest.mark.parametrize("gates", [[0.5, 0.0, 0.8], [0.0, 0.0, 0.0]])
def test_export_under_constant_gates_is_exact(form, gates, tmp_path):
    from peft import PeftModel

    model, inputs = two_layer(form), tiny_inputs(tiny_llama())
    with torch.no_grad(), molora.pin(model, torch.tensor(gates)):
        expected = model(**inputs).logits
    if not any(gates) and label(form).startswith(("factor", "film")):
        with pytest.raises(ConfigError, match="all gates are 0"):
            molora.export_peft(model, tmp_path / "lora", gates=gates)
        torch.testing.assert_close(expected, tiny_llama()(**inputs).logits)
        return
    molora.export_peft(model, tmp_path / "lora", gates=gates)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    assert (expected - tiny_llama()(**inputs).logits).abs().max() > 1e-3


@pytest.mark.parametrize("form", [{"name": "factor", "splits": 2}, "chain"], ids=label)
def test_export_takes_gates_for_each_block(form, tmp_path):
    from peft import PeftModel

    model, inputs = two_layer(form), tiny_inputs(tiny_llama())
    gates = [0.5, 0.0, 0.8, 0.3, 0.9, 0.1]
    with torch.no_grad(), molora.pin(model, torch.tensor(gates)):
        expected = model(**inputs).logits
    molora.export_peft(model, tmp_path / "lora", gates=gates)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["bottleneck", "ia3"])
def test_export_and_merge_refuse_what_is_no_lora(form, tmp_path):
    model = two_layer(form, scorer="constant")
    with pytest.raises(ConfigError, match=f"experts of form '{form}' are no LoRA"):
        molora.export_peft(model, tmp_path / "lora", gates=[1.0, 0.0, 0.0])
    assert not (tmp_path / "lora").exists()
    with pytest.raises(ConfigError, match=f"form '{form}' are no change of the base weight"):
        model.merge_and_unload()


@pytest.mark.parametrize("form", LORAS, ids=label)
@torch.no_grad()
def test_constant_mixtures_merge_exactly(form):
    model, inputs = two_layer(form, scorer="constant"), tiny_inputs(tiny_llama())
    expected = model(**inputs).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    assert (expected - tiny_llama()(**inputs).logits).abs().max() > 1e-3


def test_write_expert_refuses_other_forms():
    model = two_layer("film")
    pairs = {path: (torch.ones(2, 32), torch.ones(layer.d_out, 2)) for path, layer in routed_layers(model).items()}
    with pytest.raises(ConfigError, match="form 'film' have no slots for LoRAs"):
        molora.write_expert(model, 0, pairs)


# --- inside a model ---------------------------------------------------------------------------------------------------


def test_vectors_on_the_input_meet_the_base_layer_with_its_bias():
    """BERT's layers have biases, which the input side leaves alone and the output side rescales."""
    for side in ("input", "output"):
        model = molora.wrap(
            tiny_bert_classifier(),
            {},
            target_modules=["key"],
            experts={"form": {"name": "ia3", "side": side}, "num": 2},
            modules_to_save=[],
        ).eval()
        layer = next(iter(routed_layers(model).values()))
        layer.base_layer.bias.data.normal_()
        layer.molora_bank["default"].vectors.data.normal_()
        x, gates = torch.randn(2, 3, layer.d_in), torch.rand(2, 3, 2)
        with torch.no_grad(), molora.pin(model, gates):
            got = layer(x)
        scale = 1 + gates @ layer.molora_bank["default"].vectors
        expected = layer.base_layer(x * scale) if side == "input" else layer.base_layer(x) * scale
        torch.testing.assert_close(got, expected)


def test_two_adapters_of_different_forms_act_together():
    model = two_layer("film")
    model.add_adapter(
        "second",
        molora.MoloraConfig.from_recipe(
            {}, target_modules=["q_proj", "up_proj"], experts={"form": {"name": "ia3", "side": "input"}, "num": 2}
        ),
    )
    layer = next(iter(routed_layers(model).values()))
    layer.molora_bank["second"].vectors.data.normal_()
    model.base_model.set_adapter(["default", "second"])
    x = torch.randn(2, 3, 32)
    with torch.no_grad():
        both = layer(x)
        first, second = layer.molora_bank["default"], layer.molora_bank["second"]
        gates = [torch.softmax(x @ layer.molora_router[a].scorer.weight.T, -1) for a in ("default", "second")]
        expected = layer.base_layer(x * (1 + gates[1] @ second.vectors)) + first(x, gates[0])
    torch.testing.assert_close(both, expected)


def test_blocks_fit_narrow_layers_when_clamped():
    model = two_layer({"name": "factor", "splits": 64, "clamp": True})
    splits = {layer.d_out: layer.molora_bank["default"].splits for layer in routed_layers(model).values()}
    assert splits == {32: 32, 48: math.gcd(32, 48)}


def test_shared_decisions_need_as_many_blocks():
    form = {"name": "factor", "splits": 64, "clamp": True}
    with pytest.raises(ConfigError, match=r"share a decision but have experts that take \[16, 32\] gates"):
        two_layer(form, target_modules=["q_proj", "up_proj"], share="block")


@pytest.mark.parametrize(
    ("form", "options", "message"),
    [
        ("lorra", {}, "experts.form 'lorra' is unknown; did you mean 'lora'"),
        ({"name": "factor", "split": 2}, {}, "form 'factor' has no option 'split'; did you mean 'splits'"),
        ({"name": "factor", "splits": 5}, {}, "splits: 5 of form 'factor' does not divide a layer of 32 inputs and 32"),
        ({"name": "factor", "splits": 0}, {}, "splits of form 'factor' must be a whole number >= 1, got 0"),
        ({"name": "factor", "splits": 2, "bias": True}, {}, "biases only with splits: 1"),
        ({"name": "factor", "activation": "swish"}, {}, "activation 'swish' of form 'factor' is unknown"),
        ({"name": "factor", "splits": 2}, {"null": 1}, "2 gates each cannot have null or shared experts"),
        ({"name": "chain", "steps": 0}, {}, "steps of form 'chain' must be a whole number >= 1, got 0"),
        ("chain", {"shared": 1}, "2 gates each cannot have null or shared experts"),
        ("film", {"rank": [1, 2, 1], "scaling": 1.0}, "form 'film' needs one rank for all experts"),
        ("film", {"frozen": [0]}, "form 'film' cannot freeze single experts"),
        ({"name": "bottleneck", "bias": True}, {"frozen": [0]}, "with bias cannot freeze single experts"),
        ({"name": "ia3", "side": "top"}, {}, "side 'top' of form 'ia3' is unknown; known: output, input"),
        ("ia3", {"dropout": 0.1}, "form 'ia3' has no dropout"),
        ("ia3", {"frozen": [1]}, "form 'ia3' cannot freeze single experts"),
    ],
)
def test_contradictions_are_named(form, options, message):
    experts = {"num": 3, "rank": 2, **options, "form": form}
    with pytest.raises(ConfigError, match=message):
        molora.wrap(tiny_llama(), {}, target_modules=["q_proj"], experts=experts)


def test_frozen_stays_frozen_for_every_form():
    for form in CASES:
        bank = build_experts(form, D_IN, D_OUT, [R] * E, frozen="all")
        bank.requires_grad_(True)  # as PEFT does
        bank.freeze()
        assert not any(p.requires_grad for p in bank.parameters())
