"""RoutedBlock: experts that are whole MLP blocks, against copies of the MLP with PEFT's LoRA and plain loops."""

import copy
import pickle

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import molora
from molora.blocks import RoutedBlock, rows_of
from molora.compat.layers import PLAIN_LINEARS, mlp_blocks
from molora.control import routed_layers
from molora.errors import ConfigError, RoutingError
from tests.tiny import (
    SPECIAL,
    VOCAB,
    _build,
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_inputs,
    tiny_llama,
    tiny_mamba,
    tiny_t5,
    tiny_vit_classifier,
)

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    **SPECIAL,
}
RECIPE = {
    "experts": {"form": "block", "num": 4, "rank": 2, "alpha": 4},
    "selector": {"name": "top_k", "k": 2, "normalise": "sum1"},
}


def tiny_gemma():
    return _build(tf.Gemma2ForCausalLM, tf.Gemma2Config(**SIZES, head_dim=8), 0)


def tiny_phi3():
    return _build(tf.Phi3ForCausalLM, tf.Phi3Config(**SIZES), 0)


def tiny_opt():
    config = tf.OPTConfig(
        vocab_size=VOCAB, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, dropout=0.0,
        word_embed_proj_dim=32, max_position_embeddings=64, **SPECIAL,
    )  # fmt: skip
    return _build(tf.OPTForCausalLM, config, 0)


def tiny_gated_t5():
    return tiny_t5(feed_forward_proj="gated-gelu")


def whole(mlp, x):
    return mlp(x)


def without_residual(layer, x):  # BERT: the block ends before dropout, residual and norm
    return layer.output.dense(layer.intermediate(x))


def inside(layer, x):  # OPT: two layers of the decoder layer itself
    return layer.fc2(layer.activation_fn(layer.fc1(x)))


FAMILIES = {
    "llama": (tiny_llama, whole),
    "gemma": (tiny_gemma, whole),
    "phi3": (tiny_phi3, whole),
    "gpt2": (tiny_gpt2, whole),
    "opt": (tiny_opt, inside),
    "t5": (tiny_t5, whole),
    "t5_gated": (tiny_gated_t5, whole),
    "bert": (tiny_bert_classifier, without_residual),
    "vit": (tiny_vit_classifier, whole),
}


def shaken(model, recipe=RECIPE, **changes):
    """Wrap, and give every expert and router weights that act."""
    model = molora.wrap(model, recipe, **changes).eval()
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "molora_" in name:
            parameter.data = (0.4 if "router" in name else 0.2) * torch.randn(parameter.shape, generator=generator)
    return model


def change_of(layer, expert):
    """The weight change of one expert, in the layout of the base weight."""
    A, B = layer.molora_bank["default"].pair(expert)
    change = layer.molora_bank["default"].scaling * B @ A
    return change.T if isinstance(layer.get_base_layer(), PLAIN_LINEARS[1]) else change


def copies_of(base, block, layers):
    """One copy of the frozen block per expert, with that expert's LoRAs added to its weights."""
    first, last = mlp_blocks(base)[block]
    copies = []
    for expert in range(layers[last].molora_bank["default"].num_experts):
        parent = copy.deepcopy(base.get_submodule(block))
        for path in (*first, last):
            own = parent.get_submodule(path.removeprefix(block + "."))
            own.weight.data += change_of(layers[path], expert)
        copies.append(parent)
    return copies


def plain_gates(weight, x, k=2):
    probs = torch.softmax(x.float() @ weight.t(), -1)
    best = probs.topk(k, -1)
    gates = torch.zeros_like(probs).scatter(-1, best.indices, best.values)
    return gates / gates.sum(-1, keepdim=True)


def seen_by(model, inputs):
    seen = {}
    hooks = [
        layer.register_forward_hook(lambda _, args, out, name=name: seen.update({name: (args[0], out)}))
        for name, layer in routed_layers(model).items()
    ]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.no_grad()
def test_a_block_is_the_mixture_of_whole_mlps(family):
    build, run = FAMILIES[family]
    base, model = build(), shaken(build())
    layers, seen = routed_layers(model), seen_by(model, tiny_inputs(base))
    blocks = mlp_blocks(base)
    assert len(blocks) == (4 if family.startswith("t5") else 2)
    for block, (first, last) in blocks.items():
        x, y = seen[first[0]][0], seen[last][1]
        gates = plain_gates(layers[first[0]].molora_router["default"].scorer.weight, x)
        outputs = torch.stack([run(mlp, x) for mlp in copies_of(base, block, layers)], -1)
        expected = (outputs * gates[..., None, :]).sum(-1)
        torch.testing.assert_close(y, expected, atol=2e-5, rtol=1e-5)
        plain = run(base.get_submodule(block), x)
        assert (y - plain).abs().max() > 0.01 * plain.abs().max(), "the experts do nothing, so this proves nothing"


def peft_mlps(model, block):
    """The frozen MLP of a Llama block with PEFT's own LoRA layers, once per expert."""
    base, layers, mlps = tiny_llama().get_submodule(block), routed_layers(model), []
    names = ["gate_proj", "up_proj", "down_proj"]
    for expert in range(layers[f"{block}.down_proj"].molora_bank["default"].num_experts):
        mlp = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, lora_alpha=4, target_modules=names))
        for name in names:
            A, B = layers[f"{block}.{name}"].molora_bank["default"].pair(expert)
            own = getattr(mlp.base_model.model, name)
            own.lora_A.default.weight.data, own.lora_B.default.weight.data = A, B
        mlps.append(mlp)
    return mlps


@pytest.mark.parametrize(
    "selector",
    [
        {"name": "top_k", "k": 2, "normalise": "sum1"},
        {"name": "top_k", "k": 1, "normalise": "none"},
        {"name": "top_p", "p": 0.5, "normalise": "none"},
        {"name": "softmax"},
    ],
    ids=lambda s: "-".join(str(v) for v in s.values()),
)
def test_gradients_equal_those_of_a_loop_over_peft_mlps(selector):
    torch.manual_seed(0)
    model, block = shaken(tiny_llama(), {**RECIPE, "selector": selector}), "model.layers.1.mlp"
    mlp, layers = model.get_base_model().get_submodule(block), routed_layers(model)
    x, target = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    with molora.record(model) as log:
        (mlp(x1) * target).sum().backward()
    chosen = log[f"{block}.gate_proj"].selected
    weight = layers[f"{block}.gate_proj"].molora_router["default"].scorer.weight
    row = weight.detach().clone().requires_grad_()
    probs = torch.softmax(x2 @ row.t(), -1)
    gates = probs * chosen
    if selector.get("normalise") == "sum1":
        gates = gates / gates.sum(-1, keepdim=True)
    mlps = peft_mlps(model, block)
    mixtures = sum(gates[..., e : e + 1] * one(x2) for e, one in enumerate(mlps))
    rest = 1 - gates.sum(-1, keepdim=True)
    if selector["name"] != "softmax" and selector["normalise"] == "none":
        assert rest.max() > 0.1
        mixtures = mixtures + rest * tiny_llama().get_submodule(block)(x2)
    (mixtures * target).sum().backward()
    close = {"atol": 2e-5, "rtol": 1e-4}
    torch.testing.assert_close(x1.grad, x2.grad, **close)
    torch.testing.assert_close(weight.grad, row.grad, **close)
    assert row.grad.abs().max() > 1e-3
    for name in ("gate_proj", "up_proj", "down_proj"):
        bank = layers[f"{block}.{name}"].molora_bank["default"]
        owns = [getattr(one.base_model.model, name) for one in mlps]
        want = torch.cat([own.lora_A.default.weight.grad for own in owns])
        torch.testing.assert_close(bank.A.grad, want, **close)
        want = torch.cat([own.lora_B.default.weight.grad for own in owns], 1)
        torch.testing.assert_close(bank.Bt.grad.t(), want, **close)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"selector": {"name": "top_p", "p": 0.5, "normalise": "none"}},
        {"link": "sigmoid", "selector": {"name": "top_k", "k": 3, "normalise": "none"}},
        {"experts": {**RECIPE["experts"], "shared": 1, "shared_gate": "sigmoid"}},
        {"experts": {**RECIPE["experts"], "null": 2}},
    ],
)
@torch.no_grad()
def test_a_fresh_block_is_the_identity_whatever_the_gates(changes):
    base = tiny_llama()
    model = molora.wrap(tiny_llama(), {**RECIPE, **changes}).eval()
    for name, parameter in model.named_parameters():
        if "router" in name:
            nn.init.normal_(parameter)
    inputs = tiny_inputs(base)
    torch.testing.assert_close(model(**inputs).logits, base(**inputs).logits, atol=1e-6, rtol=1e-6)
    with molora.pin(
        model, torch.zeros(model.peft_config["default"].experts["num"] + changes.get("experts", {}).get("shared", 0))
    ):
        torch.testing.assert_close(model(**inputs).logits, base(**inputs).logits, atol=1e-6, rtol=1e-6)


def test_a_fresh_block_gives_its_router_no_task_gradient():
    model = molora.wrap(tiny_llama(), RECIPE).train()
    inputs = tiny_inputs(model)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for layer in routed_layers(model).values():
        bank = layer.molora_bank["default"]
        assert bank.Bt.grad.abs().max() > 1e-6
        assert bank.A.grad.abs().max() == 0
    grads = [p.grad.abs().max() for n, p in model.named_parameters() if "router" in n]
    assert grads == [0, 0]


@torch.no_grad()
def test_identical_experts_are_one_lora():
    model, inputs = shaken(tiny_llama()), tiny_inputs(tiny_llama())
    for layer in routed_layers(model).values():
        bank = layer.molora_bank["default"]
        for expert in range(1, bank.num_experts):
            bank.write(expert, *bank.pair(0), bank.scaling)
    lora = get_peft_model(tiny_llama(), LoraConfig(r=2, lora_alpha=4, target_modules="all-linear")).eval()
    for path, layer in routed_layers(model).items():
        own = lora.base_model.model.get_submodule(path)
        own.lora_A.default.weight.data, own.lora_B.default.weight.data = layer.molora_bank["default"].pair(0)
    torch.testing.assert_close(model(**inputs).logits, lora(**inputs).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_all_experts_chosen_is_dense_softmax():
    inputs = tiny_inputs(tiny_llama())
    sparse = shaken(tiny_llama(), selector={"name": "top_k", "k": 4, "normalise": "sum1"})
    dense = shaken(tiny_llama(), selector={"name": "softmax"})
    torch.testing.assert_close(sparse(**inputs).logits, dense(**inputs).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_one_hot_pins_are_one_expert_and_rows_may_differ():
    model = shaken(tiny_llama())
    inputs = tiny_inputs(model, batch=3)
    each = []
    for expert in (0, 3):
        with molora.pin(model, torch.eye(4)[expert]):
            each.append(model(**inputs).logits)
    tenants = torch.stack([torch.eye(4)[0], torch.eye(4)[3], torch.zeros(4)])[:, None]
    with molora.pin(model, tenants):
        mixed = model(**inputs).logits
    torch.testing.assert_close(mixed[0], each[0][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed[1], each[1][1], atol=1e-5, rtol=1e-5)
    assert (each[0] - each[1]).abs().max() > 0.01


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_frozen_layers_run_once_per_token(family):
    model = shaken(FAMILIES[family][0]())
    tokens = 2 * 7
    rows = {}
    for path, layer in routed_layers(model).items():
        layer.base_layer.register_forward_hook(
            lambda _, args, out, path=path: rows.setdefault(path, []).append(args[0].numel() // args[0].shape[-1])
        )
    model(**tiny_inputs(model))
    first_last = [path for first, last in mlp_blocks(FAMILIES[family][0]()).values() for path in (*first, last)]
    assert first_last and all(rows[path] == [tokens] for path in first_last)


@torch.no_grad()
def test_padding_changes_nothing():
    model = shaken(tiny_llama())
    inputs = tiny_inputs(model, batch=1, length=6)
    longer = {
        "input_ids": torch.cat([torch.zeros(1, 3, dtype=torch.long), inputs["input_ids"]], 1),
        "attention_mask": torch.cat([torch.zeros(1, 3, dtype=torch.long), inputs["attention_mask"]], 1),
    }
    longer["position_ids"] = (longer["attention_mask"].cumsum(1) - 1).clamp_min(0)
    a, b = model(**inputs).logits, model(**longer).logits[:, 3:]
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("granularity", ["prompt", "token"])
@pytest.mark.parametrize("share", ["site", "group", "model"])
@torch.no_grad()
def test_generates_with_a_cache_as_without(granularity, share):
    model = shaken(tiny_llama(), granularity=granularity, share=share)
    assert molora.report(model).decisions == (1 if share == "model" else 2)
    inputs = tiny_inputs(model)
    kwargs = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "output_logits": True}
    with_cache, without = (
        model.generate(**inputs, **kwargs, use_cache=cached, return_dict_in_generate=True) for cached in (True, False)
    )
    assert torch.equal(with_cache.sequences, without.sequences)
    torch.testing.assert_close(torch.stack(with_cache.logits), torch.stack(without.logits), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(reentrant):
    recipe = {**RECIPE, "losses": [{"name": "switch_balance", "weight": 0.1}]}
    recipe["experts"] = {**RECIPE["experts"], "dropout": 0.1}
    grads = []
    for checkpointing in (False, True):
        model = shaken(tiny_llama(), recipe).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        inputs = tiny_inputs(model)
        torch.manual_seed(5)
        out = model(**inputs, labels=inputs["input_ids"])
        out.loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert out.aux_loss > 0
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@torch.no_grad()
def test_saves_copies_and_switches_off(tmp_path):
    model, inputs = shaken(tiny_llama()), tiny_inputs(tiny_llama())
    logits = model(**inputs).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(**inputs).logits, logits, atol=1e-6, rtol=1e-6)
    copied = copy.deepcopy(model)
    roles = {id(layer.roles["default"].block) for layer in routed_layers(copied).values() if layer.roles}
    assert len(roles) == 2, "the layers of a copied block still share it, and blocks stay apart"
    with loaded.disable_adapter():
        assert torch.equal(loaded(**inputs).logits, tiny_llama()(**inputs).logits)
    loaded.add_adapter("second", molora.MoloraConfig.from_recipe("lora"))
    loaded.set_adapter("second")
    assert (loaded(**inputs).logits - logits).abs().max() > 1e-3
    loaded.set_adapter("default")
    torch.testing.assert_close(loaded(**inputs).logits, logits, atol=1e-6, rtol=1e-6)
    loaded.base_model.set_adapter(["default", "second"])
    with pytest.raises(RoutingError, match="whole MLP blocks"):
        loaded(**inputs)
    loaded.delete_adapter("default")
    assert all("default" not in layer.roles for layer in routed_layers(loaded, "second").values())


@torch.no_grad()
def test_blocks_may_share_a_pool_of_experts():
    model = shaken(tiny_llama(), experts={"pool": "name"})
    layers = routed_layers(model)
    first, second = (layers[f"model.layers.{number}.mlp.gate_proj"].molora_bank["default"] for number in (0, 1))
    assert torch.equal(first.pair(2)[0], second.pair(2)[0])
    blocks = mlp_blocks(tiny_llama())
    seen = seen_by(model, tiny_inputs(model))
    for block, (readers, last) in blocks.items():
        x, y = seen[readers[0]][0], seen[last][1]
        gates = plain_gates(layers[readers[0]].molora_router["default"].scorer.weight, x)
        outputs = torch.stack([mlp(x) for mlp in copies_of(tiny_llama(), block, layers)], -1)
        torch.testing.assert_close(y, (outputs * gates[..., None, :]).sum(-1), atol=2e-5, rtol=1e-5)


def test_compiles_without_shapes_that_depend_on_gates():
    model = shaken(tiny_llama())
    block = model.get_base_model().model.layers[0].mlp
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        expected = block(x)
        made = torch.compile(block, backend="aot_eager", dynamic=False)(x)
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["experts", "scorer"])
def test_what_does_not_go_with_blocks_is_refused(form):
    if form == "experts":
        with pytest.raises(ConfigError, match="layers of an MLP are one expert together"):
            molora.wrap(tiny_llama(), RECIPE, per_site=True, share="model")
    else:
        with pytest.raises(ConfigError, match="unknown; did you mean 'block'"):
            molora.wrap(tiny_llama(), RECIPE, experts={"form": "blok"})


@torch.no_grad()
def test_half_precision_base_rounds_once():
    model = shaken(tiny_llama())
    half = shaken(tiny_llama().to(torch.bfloat16))
    for layer in routed_layers(half).values():
        assert layer.molora_bank["default"].A.dtype == torch.float32
    inputs = tiny_inputs(model)
    a, b = model(**inputs).logits, half(**inputs).logits.float()
    assert (a - b).abs().max() < 0.05 * a.abs().max()


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_bases_are_called_not_read(bits):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    base = tiny_llama(hidden_size=64, intermediate_size=128)
    for _, parent in list(base.named_modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and name.endswith("_proj"):
                if bits == 4:
                    new = bnb.nn.Linear4bit(child.in_features, child.out_features, bias=False, quant_type="nf4")
                    new.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4").to("cpu")
                else:
                    new = bnb.nn.Linear8bitLt(child.in_features, child.out_features, bias=False, has_fp16_weights=False)
                    new.weight = bnb.nn.Int8Params(child.weight.data, requires_grad=False).to("cpu")
                setattr(parent, name, new)
    inputs = tiny_inputs(base)
    plain = base(**inputs).logits
    model = molora.wrap(base, RECIPE).train()
    fresh = model(**inputs).logits
    torch.testing.assert_close(fresh, plain, atol=2e-3 if bits == 4 else 5e-2, rtol=1e-2)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(layer.molora_bank["default"].Bt.grad.abs().max() > 0 for layer in routed_layers(model).values())


# --- what is refused, and how it is said ------------------------------------------------------------------------------


def test_half_a_block_is_refused():
    with pytest.raises(ConfigError, match=r"'model.layers.0.mlp' the layers up_proj were left out.*target_modules"):
        molora.wrap(tiny_llama(), RECIPE, target_modules=["gate_proj", "down_proj"])


def test_a_model_without_mlps_is_refused():
    with pytest.raises(ConfigError, match="found no MLP block"):
        molora.wrap(tiny_mamba(), RECIPE)


def test_layers_outside_of_mlps_are_told():
    report = molora.report(molora.wrap(tiny_llama(), RECIPE))
    assert len(report.plain) == 8 and report.decisions == 2
    assert "one LoRA each, not routed: 8 layers outside of MLPs (k_proj, o_proj, q_proj, v_proj)" in str(report)
    report = molora.report(molora.wrap(tiny_llama(), RECIPE, target_modules=["gate_proj", "up_proj", "down_proj"]))
    assert not report.plain and len(report.wrapped) == 6


def test_an_mlp_that_mixes_rows_is_refused():
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            h = self.fc1(x)
            return self.fc2(h.reshape(1, -1, 16).mean(1))

    model = molora.wrap(Mixing(), RECIPE, target_modules=["fc1", "fc2"])
    with pytest.raises(RoutingError, match="does more than act on single rows"):
        model(torch.randn(2, 3, 8))


def test_layers_in_the_wrong_order_are_named():
    with pytest.raises(RoutingError, match="ran before the one that takes the decision"):
        RoutedBlock("mlp").leave(None, torch.zeros(2, 3), None)


def test_merging_is_refused():
    with pytest.raises(ConfigError, match="routes by its input"):
        molora.wrap(tiny_llama(), RECIPE).merge_and_unload()


@torch.no_grad()
def test_one_expert_leaves_as_a_lora_and_a_mixture_does_not(tmp_path):
    model, inputs = shaken(tiny_llama()), tiny_inputs(tiny_llama())
    molora.export_peft(model, tmp_path / "lora", expert=2)
    lora = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora").eval()
    with molora.pin(model, torch.eye(4)[2]):
        torch.testing.assert_close(model(**inputs).logits, lora(**inputs).logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="mixture of whole MLP blocks is no LoRA"):
        molora.export_peft(model, tmp_path / "mix", gates=[0.5, 0.5, 0, 0])


@torch.no_grad()
def test_an_expert_can_be_written():
    model, inputs = shaken(tiny_llama()), tiny_inputs(tiny_llama())
    mlps = {path: layer for path, layer in routed_layers(model).items() if layer.roles}
    pairs = {path: layer.molora_bank["default"].pair(1) for path, layer in mlps.items()}
    with molora.pin(model, torch.eye(4)[1]):
        expected = model(**inputs).logits
    molora.write_expert(model, 3, pairs, scale=2.0)
    with molora.pin(model, torch.eye(4)[3]):
        torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-6, rtol=1e-6)


# --- parts ------------------------------------------------------------------------------------------------------------


def test_rows_are_the_pairs_with_a_gate_and_what_is_left_of_one():
    gates = torch.tensor([[[0.0, 1.0, 0.0], [0.25, 0.0, 0.25]], [[0.0, 0.0, 0.0], [0.5, 0.5, 0.0]]])
    rows = rows_of(gates, torch.zeros(2, 2, 8))
    pairs = list(zip(rows.token.tolist(), [*rows.expert.argmax(1).tolist(), "plain", "plain"], strict=True))
    assert pairs == [(1, 0), (3, 0), (0, 1), (3, 1), (1, 2), (1, "plain"), (2, "plain")]
    assert rows.weight.squeeze(1).tolist() == [0.25, 0.5, 1.0, 0.5, 0.25, 0.5, 1.0]
    every = rows_of(gates, torch.zeros(2, 2, 8), every=True)
    assert len(every.expert) == 12 and len(every.token) == 14


def test_mlps_are_found_by_names_and_sizes():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(12, 8)  # something lies between them
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 4)

    assert mlp_blocks(nn.ModuleDict({"a": Odd()})) == {}
    assert mlp_blocks(tiny_gpt2())["transformer.h.0.mlp"] == (
        ("transformer.h.0.mlp.c_fc",),
        "transformer.h.0.mlp.c_proj",
    )
    assert mlp_blocks(tiny_bert_classifier())["bert.encoder.layer.1"] == (
        ("bert.encoder.layer.1.intermediate.dense",),
        "bert.encoder.layer.1.output.dense",
    )
    wrapped = shaken(tiny_llama()).get_base_model()
    assert mlp_blocks(wrapped) == mlp_blocks(tiny_llama())
