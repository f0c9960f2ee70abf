"""The doctor: sound models pass, each planted illness is found, and the model is as it was afterwards."""

import copy

import pytest
import torch
import transformers

import molora
from molora.control import routed_layers, trace_of, tuner_of
from molora.train.checkup import checkup
from molora.train.doctor import doctor
from molora.train.probe import make_batch
from molora.train.scaling import ignores_token_count, takes_loss_arguments
from tests.needs import stocked, told
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

TOP_2 = {
    "experts": {"num": 4, "rank": 2, "dropout": 0.1},
    "selector": {"name": "top_k", "k": 2},
    "losses": [{"name": "switch_balance", "weight": 0.1}],
    "price": "sign",
}


def levels(findings):
    return {finding.level for finding in findings}


def one(findings, level, words):
    matching = [f for f in findings if f.level == level and words in f.what]
    assert len(matching) == 1, "\n".join(f"{f.level}: {f.what}" for f in findings)
    return matching[0]


@pytest.mark.parametrize(
    "build", [tiny_llama, tiny_gpt2, tiny_t5, tiny_bert_classifier, tiny_vit_classifier, tiny_mamba]
)
def test_sound_models_of_all_kinds(build):
    findings = doctor(molora.wrap(build(), TOP_2))
    assert "fail" not in levels(findings)
    one(findings, "ok", "A from the second step on, since B starts at zero")
    one(findings, "ok", "routers get gradients from the task")
    one(findings, "ok", "the auxiliary loss is in the loss")


@pytest.mark.parametrize("recipe", molora.recipes())
def test_every_recipe_is_sound(recipe):
    changes = {
        "mola": {"experts": {"num": [2, 4]}},
        # vectors that start equal teach a router only as far as its gates differ: give it gates that do
        "mov": {"scorer": {"init": 1.0}},
        # its scores go with the cube of the input, which is small where a tiny model's o_proj and down_proj read
        "yuan_attention": {"target_modules": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]},
    }.get(recipe, {})
    model = stocked(molora.wrap(tiny_llama(), recipe, **changes))
    with told(model, len(make_batch(model.get_base_model())["input_ids"])):
        assert "fail" not in levels(doctor(model))


def test_the_model_is_as_it_was():
    model = molora.wrap(tiny_llama(), TOP_2).eval()
    model.get_base_model().lm_head.train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameter = next(p for p in model.parameters() if p.requires_grad)
    parameter.grad = torch.ones_like(parameter)
    random = torch.random.get_rng_state()
    doctor(model)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    assert torch.equal(parameter.grad, torch.ones_like(parameter))
    assert sum(p.grad is not None for p in model.parameters()) == 1
    assert not model.training
    assert model.get_base_model().lm_head.training
    assert trace_of(model).plans["default"].losses
    assert trace_of(model).readers == []
    routers = [layer.molora_router["default"] for layer in routed_layers(model).values()]
    assert all(router.price.chosen is None for router in routers)
    out = model.train()(**tiny_inputs(model.get_base_model()), labels=torch.ones(2, 7, dtype=torch.long))
    out.loss.backward()  # no complaint about an auxiliary loss that was never used


def test_a_batch_of_ones_own():
    assert molora.doctor is doctor
    model = molora.wrap(tiny_bert_classifier(), TOP_2)
    batch = tiny_inputs(model.get_base_model()) | {"labels": torch.tensor([0, 2])}
    assert "fail" not in levels(doctor(model, batch))
    del batch["labels"]
    findings = doctor(model, batch)
    assert "add_aux" in one(findings, "warn", "forms no loss").next
    assert "fail" not in levels(findings)
    findings = doctor(model, {"input_ids": torch.zeros(1, 999, dtype=torch.long)})
    assert "a training step stops with" in findings[-1].what
    assert findings[-1].level == "fail"


# ---- illnesses ----


@pytest.mark.parametrize(
    ("selector", "advice"),
    [
        ({"name": "top_k", "k": 1, "normalise": "sum1"}, "normalise: none"),
        ({"name": "top_k", "k": 2, "normalise": "none", "grad": "none"}, "soft or straight_through"),
        ({"name": "top_k", "k": 2, "normalise": "none", "weight": "const"}, "straight_through"),
    ],
)
def test_routers_that_the_task_cannot_teach(selector, advice):
    losses = [{"name": "switch_balance", "weight": 0.1}]
    with_loss = {"experts": {"num": 4, "rank": 2}, "selector": selector, "losses": losses}
    finding = one(doctor(molora.wrap(tiny_llama(), with_loss)), "warn", "the task teaches no router in all 14 layers")
    assert advice in finding.next
    without = with_loss | {"losses": []}
    finding = one(doctor(molora.wrap(tiny_llama(), without)), "fail", "routers get no gradient in all 14 layers")
    assert advice in finding.next


def test_routers_over_frozen_experts_that_are_new():
    finding = one(doctor(molora.wrap(tiny_llama(), "lora_mixer_router")), "warn", "the task teaches no router in")
    assert "those that are new change nothing" in finding.what and "import_peft" in finding.next


def test_routing_that_cannot_learn_is_not_told_to_balance_its_load():
    for recipe in ("hash", "thor"):
        findings = doctor(molora.wrap(tiny_llama(), recipe))
        one(findings, "warn", "no router is trainable")
        assert not [finding.what for finding in findings if "dead" in finding.what or "balance" in finding.what]


def test_top_1_that_the_task_can_teach():
    selector = {"name": "top_k", "k": 1, "normalise": "none"}
    findings = doctor(molora.wrap(tiny_llama(), {"experts": {"num": 4, "rank": 2}, "selector": selector}))
    one(findings, "ok", "all 14 routers get gradients from the task")
    one(findings, "warn", "neither a balance loss nor a price")


def checkpointed(reentrant, recipe=TOP_2):
    base = tiny_llama()
    enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    return molora.wrap(base, recipe)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_that_is_exact(reentrant):
    findings = doctor(checkpointed(reentrant))
    assert "fail" not in levels(findings)
    kind = "reentrant" if reentrant else "non-reentrant"
    assert one(findings, "ok", "gradient checkpointing").what.startswith(kind)


def test_checkpointing_that_hides_gradients():
    model = molora.wrap(tiny_llama(), TOP_2)
    base = model.get_base_model()
    getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)({"use_reentrant": True})
    base.disable_input_require_grads()
    tuner_of(model).hooks._grads_into_inputs = True  # what molora does about it, switched off
    findings = doctor(model)
    finding = one(findings, "fail", "experts get no gradient in")
    assert "use_reentrant" in finding.next
    assert "changes the routers' gradients" in one(findings, "fail", "reentrant gradient checkpointing").what


def test_an_auxiliary_loss_that_is_lost(monkeypatch):
    model = molora.wrap(tiny_llama(), TOP_2)
    trace = trace_of(model)
    monkeypatch.setattr(type(trace.aux), "add_to", lambda self, loss, share=1.0: loss)
    finding = one(doctor(model), "fail", "but the loss grew by")
    assert "molora.attach(trainer)" in finding.next


def test_an_auxiliary_loss_that_is_not_scaled(monkeypatch):
    model = molora.wrap(tiny_llama(), TOP_2)
    monkeypatch.setattr(tuner_of(model).hooks, "_token_share", lambda labels, total: 1.0)
    one(doctor(model), "fail", "does not follow num_items_in_batch")


def test_a_frozen_adapter(tmp_path):
    molora.save(molora.wrap(tiny_llama(), TOP_2), tmp_path)
    finding = one(doctor(molora.load(tiny_llama(), tmp_path)), "fail", "is frozen")
    assert "is_trainable=True" in finding.next
    assert "fail" not in levels(doctor(molora.load(tiny_llama(), tmp_path, is_trainable=True)))


def test_a_base_that_is_trainable():
    model = molora.wrap(tiny_llama(), TOP_2)
    model.get_base_model().model.norm.weight.requires_grad_(True)
    assert "model.norm.weight" in one(doctor(model), "warn", "1 tensors of the base are trainable").what


def test_numbers_that_are_none_and_low_precision():
    model = molora.wrap(tiny_llama(), TOP_2)
    layer = next(iter(routed_layers(model).values()))
    with torch.no_grad():
        layer.molora_bank["default"].A[0, 0] = torch.nan
    one(doctor(model), "fail", "1 tensors hold NaN or Inf")
    half = molora.wrap(tiny_llama(), TOP_2).bfloat16()
    assert "are not float32" in one(doctor(half), "warn", "not float32").what


def test_a_folder_that_does_not_fit(tmp_path):
    molora.save(molora.wrap(tiny_llama(), TOP_2), tmp_path / "a")
    model = molora.wrap(tiny_llama(), TOP_2)
    one(doctor(model, folder=tmp_path / "a"), "ok", "tensors of")
    other = molora.wrap(tiny_llama(), TOP_2 | {"scorer": "mlp"})
    finding = one(doctor(other, folder=tmp_path / "a"), "fail", "does not fit")
    assert "is missing" in finding.what
    assert (
        "and 67 more" in finding.what
    )  # 14 routers: 4 tensors missing, 1 unexpected each; 3 are shown, and 14 x 5 = 70
    one(doctor(model, folder=tmp_path / "nowhere"), "fail", "there is no folder")


def test_dead_experts_and_batches_too_small_to_tell():
    model = molora.wrap(tiny_llama(), TOP_2)
    for layer in routed_layers(model).values():
        with torch.no_grad():
            layer.molora_router["default"].price.value[0] = 100.0  # nobody can afford expert 0
    finding = one(doctor(model), "warn", "experts are dead on this batch")
    assert "in all 14 layers" in finding.what
    batch = {"input_ids": torch.ones(1, 3, dtype=torch.long), "labels": torch.ones(1, 3, dtype=torch.long)}
    one(doctor(model, batch), "ok", "too few tokens")


def test_skipped_layers_are_told():
    findings = doctor(molora.wrap(tiny_qwen3_moe(), TOP_2))
    assert any(f.level == "warn" and "was skipped" in f.what for f in findings)


def test_a_task_loss_that_accumulation_multiplies():
    assert (
        "counts 4 times"
        in one(doctor(molora.wrap(tiny_t5(), TOP_2), accumulation=4), "warn", "num_items_in_batch").what
    )
    findings = doctor(molora.wrap(tiny_llama(), TOP_2))
    assert not [f for f in findings if "ignores num_items_in_batch" in f.what]


@pytest.mark.parametrize(
    ("build", "expected"), [(tiny_llama, False), (tiny_t5, True), (tiny_bert_classifier, True), (tiny_gpt2, False)]
)
def test_the_rule_about_token_counts_against_trainer(build, expected, tmp_path):
    """Trainer itself, at 2 accumulation steps of the same batch: is the loss that it differentiates twice as large?"""
    base = build()
    batch = tiny_inputs(base)
    if "labels" not in batch:
        batch["labels"] = torch.tensor([0, 1]) if build is tiny_bert_classifier else batch["input_ids"].clone()
    arguments = transformers.TrainingArguments(tmp_path, gradient_accumulation_steps=2, report_to="none", use_cpu=True)
    trainer = transformers.Trainer(copy.deepcopy(base), arguments, train_dataset=[0])
    assert trainer.model_accepts_loss_kwargs == takes_loss_arguments(base)
    trainer.current_gradient_accumulation_steps = 2
    items = trainer._get_num_items_in_batch([batch, batch], torch.device("cpu"))
    step = sum(float(trainer.training_step(trainer.model, dict(batch), items)) for _ in range(2))
    with torch.no_grad():
        alone = float(base.train()(**batch).loss)
    assert ignores_token_count(base, base, batch) is expected
    # Trainer counts one label more per row than GPT-2's loss does; this tells a factor of two
    assert step == pytest.approx(alone * (2 if expected else 1), rel=0.2)


# ---- what the command line calls ----


def test_checkup_builds_what_would_be_trained(world):
    findings = checkup(world["recipe"], world["bert"], [world["mood"], world["topic"]], grad_accum=2)
    assert "fail" not in levels(findings)
    one(findings, "ok", "new in this model, trained and saved whole: bert.pooler.dense, classifier")
    one(findings, "warn", "its task loss counts 2 times")
    assert "fail" not in levels(checkup("dynmole", world["bert"]))
    assert "fail" not in levels(checkup("dynmole", world["llama"], [world["qa"]]))
    assert "fail" not in levels(checkup(world["recipe"], world["t5"], checkpointing="reentrant"))


def test_checkup_of_routing_by_task(world, tmp_path):
    recipe = tmp_path / "table.yaml"
    recipe.write_text("scorer: {name: table, num_tasks: 1}\ngranularity: task\nexperts: {num: 2, rank: 2}\n")
    assert "fail" not in levels(checkup(str(recipe), world["llama"]))
    assert "fail" not in levels(checkup(str(recipe), world["bert"], [world["mood"], world["topic"]]))
