"""wrap() on many architectures: what is wrapped, that it starts as the base, trains, saves, loads and generates."""

import copy
import pickle

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model

import molora
from molora.compat.registration import MOLORA
from molora.control import routed_layers
from molora.errors import ConfigError
from tests.tiny import (
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_inputs,
    tiny_llama,
    tiny_mamba,
    tiny_qwen3_moe,
    tiny_t5,
    tiny_vit_classifier,
)

RECIPE = {
    "experts": {"num": 4, "rank": 2},
    "selector": {"name": "top_k", "k": 2},
    "losses": [{"name": "switch_balance", "weight": 0.01}],
}
# how many layers all-linear finds in each of the two-block models
MODELS = {
    tiny_llama: 14,
    tiny_gpt2: 8,
    tiny_t5: 32,
    tiny_bert_classifier: 13,
    tiny_vit_classifier: 12,
    tiny_mamba: 6,
    tiny_qwen3_moe: 8,
}
GENERATE = [tiny_llama, tiny_gpt2, tiny_t5, tiny_mamba, tiny_qwen3_moe]


def batch_for(model, **options):
    batch = tiny_inputs(model, **options)
    if "labels" not in batch:
        name = type(model).__name__
        batch["labels"] = torch.tensor([0, 1]) if name.endswith("Classification") else batch["input_ids"].clone()
    if type(model).__name__.startswith("Mamba"):
        batch.pop("attention_mask")
    return batch


def make_experts_act(model):
    for layer in routed_layers(model).values():
        torch.nn.init.normal_(layer.molora_bank["default"].B, std=0.3)
    return model


@pytest.mark.parametrize("build", MODELS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("share", ["site", "block", "model"])
@pytest.mark.parametrize("granularity", ["token", "prompt"])
def test_trains_saves_and_loads(build, share, granularity, tmp_path):
    base = build()
    batch = batch_for(base)
    # frozen like the wrapped base: torch picks other matrix kernels, with other roundings, for trainable weights
    before = copy.deepcopy(base).requires_grad_(False)(**batch)
    model = molora.wrap(base, RECIPE, share=share, granularity=granularity)
    assert len(molora.report(model).wrapped) == MODELS[build]
    out = model.eval()(**batch)
    torch.testing.assert_close(out.logits, before.logits, rtol=0, atol=0)

    make_experts_act(model).train()
    out = model(**batch)
    assert out.aux_loss.isfinite() and out.aux_loss > 0
    out.loss.backward()
    idle = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not idle
    assert all("molora_" in n or "modules_to_save" in n for n, p in model.named_parameters() if p.requires_grad)

    model.eval().save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    # trainable like the saved one, for the reason above
    loaded = PeftModel.from_pretrained(build(), tmp_path, is_trainable=True).eval()
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=0, atol=0)
    assert loaded.peft_config["default"].peft_type == MOLORA
    with model.disable_adapter():
        if "modules_to_save" not in str(model.state_dict().keys()):
            torch.testing.assert_close(model(**batch).logits, before.logits, rtol=0, atol=0)


@pytest.mark.parametrize("build", GENERATE, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "changes", [{}, {"granularity": "prompt"}, {"granularity": "prompt", "share": "block"}], ids=str
)
def test_generates_the_same_with_and_without_a_cache(build, changes):
    model = make_experts_act(molora.wrap(build(), RECIPE, **changes)).eval()
    ids = torch.randint(4, 90, (2, 9))
    batch = {"input_ids": ids}
    if build is not tiny_mamba:
        mask = torch.ones_like(ids)
        if build is tiny_t5:
            mask[1, 6:] = 0
        else:
            mask[1, :3] = 0  # generation pads on the left
        batch["attention_mask"] = mask
    options = {"max_new_tokens": 6, "do_sample": False}
    with_cache = model.generate(**batch, **options, use_cache=True)
    assert torch.equal(with_cache, model.generate(**batch, **options, use_cache=False))
    if build is not tiny_mamba:
        model.generate(**batch, **options, num_beams=3)


@pytest.mark.parametrize(
    ("build", "decisions"),
    [(tiny_llama, 8), (tiny_gpt2, 8), (tiny_bert_classifier, 9), (tiny_t5, 22), (tiny_qwen3_moe, 4)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_groups_read_one_input(build, decisions):
    """share: group makes one decision for layers that really read the same tensor; the others decide alone."""
    base = build()
    seen = {}
    for name, module in base.named_modules():
        module.register_forward_pre_hook(lambda m, args, name=name: seen.__setitem__(name, args[0] if args else None))
    model = make_experts_act(molora.wrap(base, RECIPE, share="group")).train()
    assert molora.report(model).decisions == decisions
    batch = batch_for(base)
    model(**batch).loss.backward()
    groups = {}
    for name, layer in routed_layers(model).items():
        groups.setdefault(layer.sites["default"].group, []).append(seen[name])
    assert any(len(inputs) > 1 for inputs in groups.values()) or build is tiny_gpt2
    for inputs in groups.values():
        assert all(torch.equal(x, inputs[0]) for x in inputs)
    idle = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not idle


def test_the_pieces_are_pefts_own(tmp_path):
    """get_peft_model with our config is the same as wrap; several adapters live side by side."""
    config = molora.MoloraConfig.from_recipe(RECIPE)
    model = get_peft_model(tiny_llama(), config)
    assert isinstance(model, PeftModel)
    model.add_adapter("second", molora.MoloraConfig.from_recipe(RECIPE, target_modules=["q_proj"]))
    model.set_adapter("second")
    batch = batch_for(tiny_llama())
    assert model(**batch).loss.isfinite()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "second" / "adapter_model.safetensors").exists()
    model.delete_adapter("second")
    assert list(model.peft_config) == ["default"]
    base = model.unload()
    torch.testing.assert_close(base(**batch).logits, tiny_llama()(**batch).logits, rtol=0, atol=0)


def test_transformers_native_adapter_calls(tmp_path):
    """model.add_adapter / load_adapter of transformers itself, without a PeftModel."""
    model = tiny_llama()
    model.add_adapter(molora.MoloraConfig.from_recipe(RECIPE))
    batch = batch_for(model)
    model.train()(**batch).loss.backward()
    model.eval().save_pretrained(tmp_path)
    other = tiny_llama()
    other.load_adapter(str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(other(**batch).logits, model(**batch).logits, rtol=0, atol=0)


def test_report_names_what_was_skipped():
    report = molora.report(molora.wrap(tiny_qwen3_moe(), RECIPE))
    assert any("3-D expert parameters" in why for why in report.skipped.values())
    report = molora.report(molora.wrap(tiny_llama(), RECIPE, target_modules=["q_proj", "norm"]))
    assert report.skipped == {"model.norm": "LlamaRMSNorm is not a linear layer"}
    assert "skipped model.norm" in str(report)


def test_layers_that_are_never_called_are_named():
    class Idle(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x) @ self.idle.weight.T

    model = molora.wrap(Idle(), RECIPE, losses=[]).train()
    with pytest.warns(UserWarning, match="idle"):
        model(torch.randn(2, 3, 4))


def test_plain_module_without_config():
    model = molora.wrap(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)), RECIPE)
    out = model.train()(torch.randn(5, 4))
    assert out.shape == (5, 2)
    molora.add_aux(model, out.sum()).backward()


def test_wrapping_nothing_is_an_error_and_leaves_the_model_alone():
    base = tiny_llama()
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match="nope"):
        molora.wrap(base, RECIPE, target_modules=["nope"])
    with pytest.raises(molora.ConfigError, match="nothing was wrapped"):
        molora.wrap(base, RECIPE, target_modules=["norm"])
    assert [name for name, _ in base.named_modules()] == names
    assert molora.report(molora.wrap(base, RECIPE)).wrapped


def test_failed_wrap_withdraws_its_layers():
    base = tiny_llama()
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(molora.ConfigError, match="k=9"):
        molora.wrap(base, RECIPE, selector={"k": 9})
    assert [name for name, _ in base.named_modules()] == names
    assert not base._forward_pre_hooks and not base._forward_hooks


def test_copies_and_pickles_after_a_training_forward():
    """Trap 8: the trace holds graph tensors between forward and backward, which cannot be copied."""
    model = make_experts_act(molora.wrap(tiny_llama(), RECIPE, share="block")).train()
    batch = batch_for(tiny_llama())
    out = model(**batch)
    copied = copy.deepcopy(model)
    pickled = pickle.loads(pickle.dumps(model))
    out.loss.backward()
    for other in (copied, pickled):
        torch.testing.assert_close(other.eval()(**batch).logits, model.eval()(**batch).logits, rtol=0, atol=0)
        other.train()(**batch).loss.backward()
        model.train()
    assert copied.base_model.trace is not model.base_model.trace
    layer = next(m for m in copied.modules() if type(m).__name__ == "RoutedLinear")
    assert layer.trace is copied.base_model.trace


def test_task_routing(tmp_path):
    changes = {"granularity": "task", "scorer": {"name": "table", "num_tasks": 3, "spread": 2.0}, "losses": []}
    model = make_experts_act(molora.wrap(tiny_llama(), RECIPE, selector="softmax", **changes)).eval()
    ids = torch.randint(4, 90, (2, 5))
    with pytest.raises(molora.RoutingError, match="task_ids"):
        model(input_ids=ids)
    both = model(input_ids=ids, task_ids=torch.tensor([0, 2])).logits
    alone = model(input_ids=ids[1:], task_ids=torch.tensor([2])).logits
    torch.testing.assert_close(both[1:], alone)
    other = model(input_ids=ids[1:], task_ids=torch.tensor([1])).logits
    assert not torch.allclose(alone, other)
    generated = model.generate(input_ids=ids, task_ids=torch.tensor([0, 2]), max_new_tokens=3, do_sample=False)
    with molora.using(model, task_ids=torch.tensor([0, 2])):
        again = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(generated, again)
    with pytest.raises(molora.RoutingError, match="out of range"):
        model(input_ids=ids, task_ids=torch.tensor([0, 3]))


def test_adapter_names_per_row_are_refused_not_swallowed():
    model = molora.wrap(tiny_llama(), RECIPE)
    with pytest.raises(molora.ConfigError, match="adapter_names"):
        model(input_ids=torch.ones(1, 3, dtype=torch.long), adapter_names=["default"])


def test_pinned_gates_replace_decisions():
    model = make_experts_act(molora.wrap(tiny_llama(), RECIPE)).eval()
    ids = torch.randint(4, 90, (3, 5))
    rows = torch.eye(4)[[0, 1, 3]][:, None]
    with molora.pin(model, rows):
        together = model(input_ids=ids).logits
    for i, expert in enumerate((0, 1, 3)):
        with molora.pin(model, torch.eye(4)[expert]):
            torch.testing.assert_close(model(input_ids=ids[i : i + 1]).logits, together[i : i + 1])
    with molora.pin(model, torch.zeros(4)), model.disable_adapter():
        nothing = model(input_ids=ids).logits
    with molora.pin(model, torch.zeros(4)):
        torch.testing.assert_close(model(input_ids=ids).logits, nothing, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_bases_keep_float32_adapters(dtype):
    model = molora.wrap(tiny_llama().to(dtype), RECIPE, share="block")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    batch = batch_for(tiny_llama())
    out = model.train()(**batch)
    out.loss.backward()
    assert out.logits.dtype == dtype and out.loss.isfinite()


def test_same_lora_as_peft():
    """E = 1 is plain LoRA exactly: the same weights give the same function as PEFT's own LoRA."""
    base = tiny_llama()
    ours = make_experts_act(molora.wrap(tiny_llama(), "lora", experts={"rank": 3, "alpha": 6}))
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear"))
    layers = {n: m for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}
    for name, layer in routed_layers(ours).items():
        layers[name].lora_A["default"].weight.data = layer.molora_bank["default"].A.data.clone()
        layers[name].lora_B["default"].weight.data = layer.molora_bank["default"].B.data.clone()
    batch = batch_for(base)
    torch.testing.assert_close(ours.eval()(**batch).logits, theirs.eval()(**batch).logits, rtol=1e-6, atol=1e-6)


# --- writing one expert into a live model -----------------------------------------------------------------------------


def test_write_expert_replaces_one_slot_in_every_layer_and_nothing_else():
    model = molora.wrap(tiny_llama(), "molora", experts={"num": 3, "rank": 4})
    layers = routed_layers(model)
    banks = {path: layer.molora_bank["default"] for path, layer in layers.items()}
    for bank in banks.values():
        torch.nn.init.normal_(bank.B)
    before = {path: [bank.pair(expert) for expert in range(3)] for path, bank in banks.items()}
    homes = {name: p.data_ptr() for name, p in model.named_parameters()}
    left_out = next(iter(layers))
    pairs = {p: (torch.randn(2, b.d_in), torch.randn(b.d_out, 2)) for p, b in banks.items() if p != left_out}
    scales = {path: 0.25 * (1 + i % 3) for i, path in enumerate(pairs)}
    molora.write_expert(model, 1, pairs, scales)
    assert homes == {name: p.data_ptr() for name, p in model.named_parameters()}  # in place
    for path, bank in banks.items():
        written = bank.delta_weight(torch.tensor([0.0, 1.0, 0.0]))
        expected = scales[path] * pairs[path][1] @ pairs[path][0] if path in pairs else torch.zeros_like(written)
        torch.testing.assert_close(written, expected)
        for other in (0, 2):
            for mine, old in zip(bank.pair(other), before[path][other], strict=True):
                assert torch.equal(mine, old)


def test_write_expert_checks_everything_before_it_writes():
    model = molora.wrap(tiny_llama(), "molora", experts={"num": 3, "rank": 4})
    layers = routed_layers(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    first, *_, last = layers
    pairs = {first: (torch.ones(4, layers[first].d_in), torch.ones(layers[first].d_out, 4))}
    wrong = {last: (torch.ones(5, layers[last].d_in), torch.ones(layers[last].d_out, 5)), "model.nothing": pairs[first]}
    with pytest.raises(ConfigError) as error:
        molora.write_expert(model, 1, {**pairs, **wrong}, {first: 1.0, last: 1.0})
    for part in ("'model.nothing' is not routed", f"layer '{last}': expert of A (5,", "no number for layer"):
        assert part in str(error.value)
    with pytest.raises(ConfigError, match="slot 3 does not exist"):
        molora.write_expert(model, 3, pairs)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_upcast_base_reaches_the_layers_and_the_file(tmp_path):
    assert molora.MoloraConfig().upcast_base is None
    model = molora.wrap(tiny_llama(), "molora", upcast_base=True)
    assert all(layer.upcast_base is True for layer in routed_layers(model).values())
    molora.save(model, tmp_path)
    again = molora.load(tiny_llama(), tmp_path)
    assert all(layer.upcast_base is True for layer in routed_layers(again).values())
    with pytest.raises(ConfigError, match="upcast_base must be true, false or null, got 'yes'"):
        molora.MoloraConfig(upcast_base="yes")
