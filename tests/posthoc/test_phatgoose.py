"""PHATGOOSE: stage 2 against a plain loop, stage 3 against its formula, and planted clusters that must be found."""

import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F

import molora
from molora.control import routed_layers, tuner_of
from molora.errors import ConfigError, LoadError
from molora.posthoc.gates import GATES, load_gates, save_gates
from molora.posthoc.phatgoose import alone, build, train_gates
from molora.routing.types import Context
from tests.adapters import anatomy
from tests.posthoc.library import library, make_lora
from tests.posthoc.toy import D, Library, Toy
from tests.tiny import tiny_bert_classifier, tiny_inputs, tiny_llama


def batch_of(model=None, seed=0):
    batch = tiny_inputs(model or tiny_llama(), seed=seed)
    return {**batch, "labels": batch["input_ids"]}


def random_gates(folders, seed=0):
    generator = torch.Generator().manual_seed(seed)
    model = molora.import_peft(tiny_llama(), folders)
    sizes = {path: layer.d_in for path, layer in routed_layers(model).items()}
    return [{path: torch.randn(d, generator=generator) for path, d in sizes.items()} for _ in folders]


# --- stage 2 ----------------------------------------------------------------------------------------------------------


def test_a_fresh_gate_lets_exactly_half_of_the_update_through(tmp_path):
    folder, base, x = make_lora(tmp_path / "a", 3), tiny_llama(), torch.randn(2, 5, 32)
    lora = PeftModel.from_pretrained(tiny_llama(), folder).eval()
    path = "model.layers.1.self_attn.q_proj"
    whole, nothing = lora.get_submodule(f"base_model.model.{path}")(x), base.get_submodule(path)(x)
    with alone(base, folder) as gated:
        layer = gated.get_submodule(f"base_model.model.{path}")
        torch.testing.assert_close(layer(x), nothing + (whole - nothing) / 2, atol=1e-6, rtol=1e-6)
        # a LoRA is linear, so weighing its input is weighing its output
        v = torch.randn(32)
        layer.molora_router["phatgoose_stage_2"].scorer.weight.data[0] = v
        gate = torch.sigmoid(x @ v)[..., None]
        at_input = (
            nothing
            + lora.get_submodule(f"base_model.model.{path}")(gate * x)
            - base.get_submodule(path).base_layer(gate * x)
        )
        torch.testing.assert_close(layer(x), at_input, atol=1e-5, rtol=1e-5)


def test_training_is_that_of_a_plain_loop(tmp_path):
    tasks = Library(tmp_path)
    batches, weight, delta = tasks.batches(1, 3), Toy().layer.weight.detach(), tasks.deltas[1]
    v = torch.zeros(D, requires_grad=True)
    optimizer = torch.optim.AdamW([v], lr=5e-3, weight_decay=0.0)
    losses = []
    for step in range(20):
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1.0, (step + 1) / 2)  # 10 % of 20 steps
        x, target = batches[step % 3]["x"], batches[step % 3]["target"]
        y = x @ weight.T + torch.sigmoid(x @ v)[..., None] * (x @ delta.T)
        loss = (y - target).square().sum(-1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    told = []
    gates = train_gates(
        Toy(), tasks.folders[1], batches, steps=20, warmup=0.1, tell=lambda step, loss: told.append((step, loss))
    )
    torch.testing.assert_close(gates, {"layer": v.detach()}, atol=1e-5, rtol=1e-4)
    assert [step for step, _ in told] == list(range(1, 21)) and told[-1][1] < told[0][1]
    torch.testing.assert_close(torch.tensor([loss for _, loss in told]), torch.tensor(losses), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("base", [tiny_llama, tiny_bert_classifier])
def test_nothing_of_the_base_model_changes(tmp_path, base):
    target = {tiny_llama: "q_proj", tiny_bert_classifier: "query"}[base]
    folder, model = make_lora(tmp_path / "a", 3, base=base, targets=[target]), base()
    batch = batch_of() if base is tiny_llama else {**tiny_inputs(model), "labels": torch.tensor([0, 2])}
    model.train()
    before, weights = anatomy(model), {name: p.clone() for name, p in model.named_parameters()}
    gates = train_gates(model, folder, [batch], steps=3)
    assert anatomy(model) == before and all(torch.equal(weights[n], p) for n, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert len(gates) == 2 and all(v.abs().sum() > 0 for v in gates.values())
    with pytest.raises(ConfigError, match="no loss"):
        train_gates(model, folder, [{k: v for k, v in batch.items() if k != "labels"}], steps=3)
    assert anatomy(model) == before


def test_an_expert_of_a_mixture_gets_the_gates_of_its_lora(tmp_path):
    folders = library(tmp_path, 2)
    model = molora.import_peft(tiny_llama(), folders).eval()
    before, batches = anatomy(model), [batch_of(seed=s) for s in range(2)]
    told = train_gates(model, "lora1", batches, steps=4)
    assert anatomy(model) == before and list(model.peft_config) == ["default"] and model.active_adapter == "default"
    tuner = tuner_of(model)
    assert list(tuner.reports) == list(tuner.trace.plans) == ["default"]
    expected = train_gates(tiny_llama(), folders[1], batches, steps=4)
    torch.testing.assert_close(told, expected, atol=1e-6, rtol=1e-5)


def test_accumulated_batches_count_as_one(tmp_path):
    folder, batches = make_lora(tmp_path / "a", 3), [batch_of(seed=s) for s in range(2)]
    joined = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    one = train_gates(tiny_llama(), folder, [joined], steps=3)
    two = train_gates(tiny_llama(), folder, batches, steps=3, accumulate=2)
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-2)


def test_training_that_cannot_be_is_said(tmp_path):
    folder = make_lora(tmp_path / "a", 3)
    with pytest.raises(ConfigError, match="3 problems"):
        train_gates(tiny_llama(), folder, [], steps=0, lr=-1.0, warmup=1.0)
    with pytest.raises(ConfigError, match="batches ended before the last step"):
        train_gates(tiny_llama(), folder, iter([batch_of()]), steps=3)
    with pytest.raises(ConfigError, match="expert 0 needs a mixture"):
        train_gates(tiny_llama(), 0, [batch_of()])
    with pytest.raises(ConfigError, match="the loss of step 1 is nan"):
        train_gates(tiny_llama(), folder, [batch_of()], loss=lambda model, b: model(**b).loss * float("nan"))


# --- the file ---------------------------------------------------------------------------------------------------------


def test_gates_are_saved_beside_the_adapter_and_read_with_care(tmp_path):
    gates = {"layer": torch.randn(5), "other": torch.randn(3)}
    assert save_gates(gates, tmp_path) == tmp_path / GATES
    torch.testing.assert_close(load_gates(tmp_path), gates)
    torch.testing.assert_close(load_gates(tmp_path / GATES), gates)
    with pytest.raises(ConfigError, match="2 problems"):
        save_gates({"a": torch.zeros(2, 2), "b": torch.tensor([float("nan")])}, tmp_path)
    torch.testing.assert_close(load_gates(tmp_path), gates)  # the old ones are whole
    assert sorted(p.name for p in tmp_path.iterdir()) == [GATES]
    with pytest.raises(LoadError, match="holds no gates"):
        load_gates(tmp_path / "nowhere")
    (tmp_path / GATES).write_bytes((tmp_path / GATES).read_bytes()[:-4])
    with pytest.raises(LoadError, match="damaged"):
        load_gates(tmp_path)
    folder = make_lora(tmp_path / "lora", 0)
    with pytest.raises(LoadError, match="format None; gates are in format"):
        load_gates(folder / "adapter_model.safetensors")


# --- stage 3 ----------------------------------------------------------------------------------------------------------


def test_the_mixture_is_the_formula(tmp_path):
    folders = library(tmp_path, 4)
    gates = random_gates(folders)
    model = build(molora.import_peft(tiny_llama(), folders).eval(), gates=gates)
    for path, layer in routed_layers(model).items():
        x, d = torch.randn(2, 5, layer.d_in), layer.d_in
        logits = torch.stack([(F.layer_norm(x, (d,)) * F.layer_norm(own[path], (d,))).sum(-1) for own in gates], -1)
        best = torch.softmax(logits / d**0.5, -1).topk(2, -1)
        expected = torch.zeros(2, 5, 4).scatter(-1, best.indices, best.values / best.values.sum(-1, keepdim=True))
        torch.testing.assert_close(layer.molora_router["default"](x, Context()).gates, expected, atol=1e-6, rtol=1e-5)


def test_shifts_and_scales_of_states_and_gates_change_nothing(tmp_path):
    folders = library(tmp_path)
    gates = random_gates(folders)
    model = molora.import_peft(tiny_llama(), folders).eval()
    path = "model.layers.0.self_attn.q_proj"

    def decided(gates, x):
        build(model, gates=gates)
        return routed_layers(model)[path].molora_router["default"](x, Context()).gates

    x = torch.randn(2, 5, 32)
    plain = decided(gates, x)
    torch.testing.assert_close(decided(gates, 3.0 * x + 7.0), plain, atol=1e-5, rtol=0)
    other = [{name: (e + 2.0) * v - 3.0 for name, v in own.items()} for e, own in enumerate(gates)]
    torch.testing.assert_close(decided(other, x), plain, atol=1e-5, rtol=0)


def test_gates_trained_apart_send_each_cluster_to_its_expert(tmp_path):
    tasks = Library(tmp_path)
    gates = [train_gates(Toy(), tasks.folders[e], tasks.batches(e), steps=60) for e in range(tasks.count)]
    model = build(molora.import_peft(Toy(), tasks.folders).eval(), gates=gates)
    for task in range(tasks.count):
        with torch.no_grad(), molora.record(model) as log:
            model(x=tasks.inputs(task, rows=60))
        assert (log["layer"].gates.argmax(-1) == task).float().mean() > 0.95


def test_an_expert_without_a_gate_is_never_chosen(tmp_path):
    folders = library(tmp_path)
    gates = random_gates(folders)
    save_gates(gates[2], folders[2])
    model = build(molora.import_peft(tiny_llama(), folders).eval(), gates={"lora0": gates[0], 2: folders[2]}, top_k=3)
    with torch.no_grad(), molora.record(model) as log:
        model(**batch_of())
    for routing in log.values():
        assert (routing.gates[..., 1] == 0).all() and (routing.gates[..., [0, 2]] > 0).all()
    # a zero vector would have competed: its score is 0, and those of the others fall below that
    assert any((routing.scores[..., [0, 2]] < 0).all(-1).any() for routing in log.values())


def test_it_is_saved_and_loaded(tmp_path):
    folders = library(tmp_path)
    model = build(molora.import_peft(tiny_llama(), folders).eval(), gates=[*random_gates(folders)[:2], None])
    molora.save(model, tmp_path / "saved")
    loaded = molora.load(tiny_llama(), tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(loaded(**batch_of()).logits, model(**batch_of()).logits)
        assert loaded.generate(**tiny_inputs(tiny_llama()), max_new_tokens=3).shape == (2, 10)


def test_gates_that_do_not_fit_are_said_at_once(tmp_path):
    folders = library(tmp_path)
    model = molora.import_peft(tiny_llama(), folders).eval()
    gates = random_gates(folders)
    path = next(iter(gates[0]))
    with pytest.raises(ConfigError, match="5 problems") as error:
        build(model, gates={"lora0": {path: torch.zeros(3), "nowhere": torch.zeros(3)}, "stranger": gates[1], 8: {}})
    for part in (
        "'nowhere' is not routed",
        "shape (3,)",
        "'stranger' is unknown",
        "expert 8",
        "no expert has a gate at",
    ):
        assert part in str(error.value)
    with pytest.raises(LoadError, match="holds no gates"):
        build(model, gates=folders)
