"""Objectives in training: how often the batch runs, what is shared, and that every way to the loss is the same loss."""

import copy

import pytest
import torch
from transformers import Trainer, TrainingArguments

import molora
from molora.control import trace_of
from molora.errors import AuxLossError, ConfigError
from molora.train.objectives import objective_of
from tests.tiny import tiny_bert_classifier, tiny_gpt2, tiny_inputs, tiny_llama, tiny_t5

RLOO = {"selector": {"name": "sample", "k": 2}, "objective": {"name": "rloo", "draws": 3}}
EXPERTS = {"num": 4, "rank": 2, "scaling": 1.0}


def model_for(base=tiny_llama, **changes):
    options = {"experts": EXPERTS, "target_modules": ["q_proj", "up_proj"], **RLOO, **changes}
    model = molora.wrap(base(), {}, **options)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "molora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.train()


def batch(model, rows=2):
    inputs = tiny_inputs(model, batch=rows)
    if "labels" not in inputs:
        inputs["labels"] = inputs["input_ids"].clone()
        inputs["labels"][:, :3] = -100
    return inputs


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(first, second, **tolerance):
    assert first.keys() == second.keys() and first
    for name, grad in first.items():
        torch.testing.assert_close(second[name], grad, msg=lambda m, n=name: f"{n}: {m}", **tolerance)


def trainer_for(model, tmp_path, cls=Trainer, **options):
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        max_steps=2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **options,
    )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 90, (8, 6), generator=generator)
    return cls(model=model, args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])


def count_forwards(model):
    calls = []
    model.base_model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"granularity": "prompt"},
        {"share": "group", "target_modules": ["q_proj", "k_proj"]},
        {"share": "model", "target_modules": ["q_proj"]},
        {"experts": {**EXPERTS, "dropout": 0.3}},
        {"losses": [{"name": "router_z", "weight": 0.1}]},
        {"selector": "softmax", "scorer": "noisy", "objective": "consistency"},
    ],
    ids=lambda c: "-".join(c) or "plain",
)
def test_checkpointing_changes_no_gradient(changes):
    """The recompute of each forward finds its own draws, masks and shared decisions; one backward serves all."""
    runs = []
    for checkpointing in (False, True):
        model = model_for(**copy.deepcopy(changes))
        if checkpointing:
            model.base_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(5)
        loss = molora.objective_loss(model, batch(model))
        runs.append((loss.detach(), gradients(model, loss)))
    torch.testing.assert_close(runs[1][0], runs[0][0])
    assert_same(runs[0][1], runs[1][1])
    assert any("router" in name and grad.abs().max() > 0 for name, grad in runs[0][1].items())


def test_reentrant_checkpointing_is_refused_where_it_would_hide_the_draws():
    model = model_for()
    model.base_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(AuxLossError, match="use_reentrant"):
        molora.objective_loss(model, batch(model))


def test_two_forwards_under_reentrant_checkpointing_keep_their_decisions_apart():
    """A shared decision is taken again in each recompute, from the right forward: the draws differ between the two."""
    runs = []
    for reentrant in (None, True):
        model = model_for(selector="relaxed_bernoulli", link="sigmoid", share="block", objective="consistency")
        if reentrant:
            model.base_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        torch.manual_seed(5)
        loss = molora.objective_loss(model, batch(model))
        runs.append((loss.detach(), gradients(model, loss)))
    torch.testing.assert_close(runs[1][0], runs[0][0])
    assert_same(*(grads for _, grads in runs))


@pytest.mark.parametrize("base", [tiny_llama, tiny_gpt2, tiny_t5, tiny_bert_classifier])
def test_rows_add_up_to_the_loss(base):
    targets = {tiny_gpt2: ["c_attn"], tiny_t5: ["q", "wi"], tiny_bert_classifier: ["query"]}.get(base, ["q_proj"])
    model = model_for(base, target_modules=targets)
    inputs = batch(model)
    if base is tiny_bert_classifier:
        inputs["labels"] = torch.tensor([0, 2])
    if base is tiny_t5:
        inputs["labels"][0, 4:] = -100
    seen = []
    objective = objective_of(model)
    plan = trace_of(model).plans["default"]

    class Watching:
        name, forwards, shares_noise = "rloo", 3, True

        def __call__(self, outcomes):
            seen.extend(outcomes)
            return objective(outcomes)

    plan.objective = Watching()
    loss = molora.objective_loss(model, inputs)
    assert len(seen) == 3
    for outcome in seen:
        assert outcome.rows.shape == outcome.log_prob.shape == (2,) and outcome.log_prob.lt(0).all()
        torch.testing.assert_close(outcome.rows.sum(), outcome.loss.detach())
    torch.testing.assert_close(loss.detach(), torch.stack([outcome.loss.detach() for outcome in seen]).mean())
    assert len({outcome.log_prob.sum().item() for outcome in seen}) == 3, "the draws must differ"


def test_dropout_is_the_same_in_all_draws():
    """With k = n nothing differs between the draws, dropout included, so that routers get no gradient at all."""
    model = model_for(selector={"name": "sample", "k": 4}, experts={**EXPERTS, "dropout": 0.5})
    grads = gradients(model, molora.objective_loss(model, batch(model)))
    routers = [grad for name, grad in grads.items() if "router" in name]
    assert routers and all(grad.abs().max() == 0 for grad in routers)
    assert any(grad.abs().max() > 0 for name, grad in grads.items() if "bank" in name)
    state = torch.get_rng_state()
    molora.objective_loss(model, batch(model))
    assert not torch.equal(torch.get_rng_state(), state), "the next batch must see other noise"


@pytest.mark.parametrize("changes", [{}, {"selector": "softmax", "scorer": "noisy", "objective": "consistency"}])
def test_auxiliary_losses_are_added_once_and_averaged(changes):
    """The z-loss of all forwards and decisions together is a mean over both, as if they had been one batch."""
    losses, values = [], []
    for spec in ([], [{"name": "router_z", "weight": 1.0}]):
        model = model_for(losses=spec, **changes)
        values.clear()

        def reader(site, routing, ctx):
            values.append(torch.logsumexp(routing.scores, -1).square().mean())

        trace_of(model).readers.append(reader)
        torch.manual_seed(5)
        losses.append(molora.objective_loss(model, batch(model)))
    assert len(values) == objective_of(model).forwards * 4 and trace_of(model).aux.used
    torch.testing.assert_close(losses[1] - losses[0], torch.stack(values).mean(), atol=1e-5, rtol=1e-5)
    model(**batch(model)).loss.backward()  # nothing is left pending


def test_trainer_and_own_loop_agree(tmp_path):
    model = model_for(losses=[{"name": "router_z", "weight": 0.1}])
    trainer = molora.attach(trainer_for(model, tmp_path))
    inputs = batch(model)
    results = []
    for compute in (lambda: trainer.compute_loss(model, dict(inputs)), lambda: molora.objective_loss(model, inputs)):
        torch.manual_seed(5)
        loss = compute()
        results.append((loss.detach(), gradients(model, loss)))
    torch.testing.assert_close(*(loss for loss, _ in results))
    assert_same(*(grads for _, grads in results))
    loss, outputs = trainer.compute_loss(model, dict(inputs), return_outputs=True)
    assert loss.shape == () and outputs.logits.shape[:2] == inputs["input_ids"].shape


def test_the_loss_scales_with_the_share_of_the_batch():
    """With num_items_in_batch, half of the labels count half: the task loss, the surrogate and the auxiliary loss."""
    model = model_for(losses=[{"name": "router_z", "weight": 0.1}])
    inputs, results = batch(model), []
    labels = (inputs["labels"][:, 1:] != -100).sum()
    for total in (None, 2 * labels):
        torch.manual_seed(5)
        loss = molora.objective_loss(model, inputs | ({} if total is None else {"num_items_in_batch": total}))
        results.append((loss.detach(), gradients(model, loss)))
    torch.testing.assert_close(2 * results[1][0], results[0][0])
    assert_same(results[0][1], {name: 2 * grad for name, grad in results[1][1].items()}, atol=1e-6, rtol=1e-4)


def test_training_runs_each_batch_as_often_as_asked_and_evaluation_once(tmp_path):
    model = model_for()
    calls = count_forwards(model)
    trainer = molora.attach(trainer_for(model, tmp_path, gradient_accumulation_steps=2))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    assert len(calls) == 2 * 2 * 3  # steps, micro-batches, draws
    moved = {name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])}
    assert moved == set(before), "routers and experts must both learn"
    calls.clear()
    model.eval()
    inputs = batch(model)
    loss = molora.objective_loss(model, inputs)
    torch.testing.assert_close(loss, model(**inputs).loss)
    trainer.compute_loss(model, dict(inputs))
    assert len(calls) == 3


def test_training_past_the_objective_is_said(tmp_path):
    with pytest.warns(UserWarning, match=r"objective 'rloo'.*molora.attach\(trainer\).*molora.objective_loss"):
        trainer_for(model_for(), tmp_path).train()


def test_label_smoothing_works_per_batch_and_per_row(tmp_path):
    for per in ("row", "batch"):
        model = model_for(objective={"name": "rloo", "draws": 2, "per": per})
        trainer = molora.attach(trainer_for(model, tmp_path, label_smoothing_factor=0.1))
        grads = gradients(model, trainer.compute_loss(model, batch(model)))
        assert any("router" in name and grad.abs().max() > 0 for name, grad in grads.items())


def test_what_cannot_work_is_said():
    with pytest.raises(ConfigError, match=r"trains what is drawn: set selector: \{name: sample"):
        molora.wrap(tiny_llama(), {}, objective="rloo")
    with pytest.raises(ConfigError, match="objective 'rlo' is unknown; did you mean 'rloo'"):
        molora.wrap(tiny_llama(), {}, objective="rlo")
    with pytest.raises(ConfigError, match="cannot follow a schedule"):
        molora.wrap(
            tiny_llama(), {}, objective={"name": "consistency", "alpha": {"schedule": "linear", "from": 0, "to": 1}}
        )
    model = model_for()
    inputs = tiny_inputs(model)
    with pytest.raises(ConfigError, match="pass labels"):
        molora.objective_loss(model, inputs)
    bert = model_for(tiny_bert_classifier, target_modules=["query"], objective={"name": "rloo", "draws": 2})
    bert.config.problem_type = "multi_label_classification"
    labels = torch.rand(2, 3).round()
    with pytest.raises(ConfigError, match="per: batch"):
        molora.objective_loss(bert, tiny_inputs(bert) | {"labels": labels})
    plain = molora.wrap(tiny_llama(), {}).train()
    torch.testing.assert_close(molora.objective_loss(plain, batch(plain)), plain(**batch(plain)).loss)


def test_two_active_objectives_are_refused():
    model = model_for()
    model.add_adapter("other", molora.MoloraConfig(objective="consistency", experts=EXPERTS, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ConfigError, match="only one active adapter"):
        molora.objective_loss(model, batch(model))
    model.set_adapter("other")
    assert objective_of(model).name == "consistency"


def test_the_objective_is_saved_with_the_adapter(tmp_path):
    model = model_for()
    model.save_pretrained(tmp_path)
    loaded = molora.load(tiny_llama(), tmp_path)
    assert loaded.peft_config["default"].objective == RLOO["objective"] and objective_of(loaded).forwards == 3
    assert objective_of(copy.deepcopy(model)).forwards == 3
