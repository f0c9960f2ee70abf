"""molora's training run: what it writes, that it can be loaded elsewhere, and that its loss is scaled right."""

import json
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file

import molora
from molora import cli
from molora.errors import ConfigError, DataError
from molora.routing.metrics import Usage
from molora.train import run as run_module
from molora.train.data import LabelMap, Task, load_tasks
from molora.train.evaluate import evaluate, open_adapter
from molora.train.run import train
from molora.train.settings import TrainSettings
from tests.train.small import texts, write_jsonl


def settings(world, output, model="bert", tasks=("mood", "topic"), **changes):
    data = [f"{name}={world[name]}" for name in tasks]
    options = dict(
        recipe=world["recipe"], model=world.get(model, model), data=data, output=str(output), quiet=True, epochs=1
    )
    if "max_steps" in changes:
        options.pop("epochs")
    return TrainSettings(**(options | changes))


def assert_close(figures, expected):
    assert figures.keys() == expected.keys()
    for task in expected:
        assert figures[task] == pytest.approx(expected[task])


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """A classifier of two tasks, trained for a while."""
    output = tmp_path_factory.mktemp("trained") / "out"
    given = settings(world, output, epochs=3, learning_rate=0.01, batch_size=8, eval_fraction=0.2)
    return output, train(given)


def test_it_learns(world, tmp_path):
    rows = texts({"good": ["good", "great"], "bad": ["bad", "poor"]}, 80, 1)
    data = [write_jsonl(tmp_path / "mood.jsonl", rows)]
    given = settings(world, tmp_path / "out", data=data, epochs=20, learning_rate=0.005, batch_size=16)
    figures = train(given).metrics["mood"]
    assert figures["rows"] == 8
    assert figures["accuracy"] >= 0.75 > figures["majority"]
    assert figures["loss"] < math.log(2)


def test_what_is_written(trained, world):
    output, result = trained
    names = {path.name for path in output.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "labels.json", "routing.json", "training.json"} <= names
    assert {"tokenizer.json", "tokenizer_config.json", "checkpoints"} <= names
    assert not [name for name in names if name.startswith(".")]
    assert LabelMap.load(output / "labels.json").labels["mood"] == ("bad", "good")
    facts = json.loads((output / "training.json").read_text())
    assert facts["metrics"] == result.metrics
    assert result.metrics["mood"]["rows"] == 5  # a fifth of 24
    assert 0 < result.trainable < result.total
    assert facts["tasks"] == ["mood", "topic"]
    assert facts["rows"] == {"mood": 19, "topic": 14}
    assert facts["settings"]["recipe"] == world["recipe"]
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["training_arguments"]["learning_rate"] == 0.01


def test_routing_is_recorded_on_the_evaluation_rows(trained):
    output, result = trained
    content = json.loads((output / "routing.json").read_text())
    assert content["data"] == "evaluation"
    usage = Usage.from_dict(content)
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    assert usage.counted_tasks == ["mood", "topic"]
    assert len(usage.sites) == 12
    figures = usage.figures(usage.sites[0])
    assert figures.num_experts == 3
    assert figures.experts_per_token == 2  # at the end of its schedule, 3 at the start
    assert sum(usage.figures(usage.sites[0], task).tokens for task in usage.counted_tasks) == figures.tokens
    assert figures.tokens > result.metrics["mood"]["rows"] + result.metrics["topic"]["rows"]
    assert tokenizer.pad_token == "<pad>"


def test_loaded_again_it_says_the_same(trained, world):
    output, result = trained
    torch.manual_seed(123)  # another random head than in training, before the adapter brings its own
    adapter = open_adapter(output)
    parts = [run_module.split(task.rows, 0.2, 0)[1] for task in load_tasks([world["mood"], world["topic"]])]
    tasks = [Task(name, rows, "classification") for name, rows in zip(("mood", "topic"), parts, strict=True)]
    assert_close(evaluate(adapter, tasks).tasks, result.metrics)


def test_stock_peft_loads_it_into_a_base_with_another_random_head(trained, world):
    from peft import PeftModel

    output, _ = trained
    torch.manual_seed(5)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(world["bert"], num_labels=5)
    model = PeftModel.from_pretrained(base, output).eval()
    batch = transformers.AutoTokenizer.from_pretrained(output)(
        ["a great film", "the doctor"], return_tensors="pt", padding=True
    )
    ours = open_adapter(output).model
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, ours(**batch).logits, rtol=0, atol=0)


def test_tasks_reach_the_routers(world, tmp_path):
    recipe = tmp_path / "table.yaml"
    recipe.write_text(
        "experts: {num: 2, rank: 2}\nscorer: {name: table, num_tasks: 1}\ngranularity: task\n"
        "train: {per_device_train_batch_size: 8, learning_rate: 0.05}\n"
    )
    train(settings(world, tmp_path / "out", recipe=str(recipe), max_steps=6))
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    tables = [tensor for name, tensor in tensors.items() if "scorer" in name]
    assert {tuple(table.shape) for table in tables} == {(2, 2)}
    # rows start within 1e-3 of zero, and each moves by its own task's gradient
    apart = [float((table[0] - table[1]).abs().max()) for table in tables]
    assert sum(distance > 0.01 for distance in apart) > len(apart) / 2
    usage = Usage.from_dict(json.loads((tmp_path / "out" / "routing.json").read_text()))
    site = usage.sites[0]
    table = next(tensor for name, tensor in tensors.items() if site in name and "scorer" in name).softmax(-1)
    for task, row in zip(("mood", "topic"), table, strict=True):
        assert usage.figures(site, task).gate_mass == pytest.approx(row.tolist(), rel=1e-5)


@pytest.mark.parametrize(("model", "task"), [("llama", "qa"), ("llama", "plain"), ("t5", "qa")])
def test_generators(world, tmp_path, model, task):
    result = train(settings(world, tmp_path, model, (task,), epochs=2, learning_rate=0.02, eval_fraction=0.2))
    assert result.metrics[task]["perplexity"] < 90  # 96 tokens: a random model has about that
    assert not (tmp_path / "labels.json").exists()
    adapter = open_adapter(tmp_path)
    rows = run_module.split(load_tasks([world[task]])[0].rows, 0.2, 0)[1]
    kind = "lm" if task == "plain" else "generation"
    again = evaluate(adapter, [Task(task, rows, kind)]).tasks
    assert again[task] == pytest.approx(result.metrics[task])


@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_quantised(world, tmp_path, quantize):
    pytest.importorskip("bitsandbytes")
    given = settings(world, tmp_path, "llama", ("mood",), quantize=quantize, max_steps=2, gradient_checkpointing=True)
    result = train(given)
    adapter = open_adapter(tmp_path)
    assert adapter.model.get_base_model().is_quantized  # as in training
    rows = run_module.split(load_tasks([world["mood"]])[0].rows, 0.1, 0)[1]
    again = evaluate(adapter, [Task("mood", rows, "classification")]).tasks
    assert_close(again, result.metrics)
    assert not getattr(open_adapter(tmp_path, quantize="none").model.get_base_model(), "is_quantized", False)


def test_without_an_evaluation_part(world, tmp_path):
    result = train(settings(world, tmp_path, max_steps=1, eval_fraction=0.0))
    assert result.metrics == {}
    content = json.loads((tmp_path / "routing.json").read_text())
    assert content["data"] == "training"
    assert Usage.from_dict(content).counted_tasks == ["mood", "topic"]


def first_gradients(world, output, monkeypatch, **changes):
    """Gradients of the heads and routers that reach the first optimizer step of a run."""
    grads = {}

    class Catch(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if not grads:
                named = model.named_parameters()
                grads.update({name: p.grad.clone() for name, p in named if p.grad is not None})

    def attach(trainer):
        trainer.add_callback(Catch())
        return molora.attach(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "attach", attach)
        # no dropout, so that the same rows give the same gradient in whatever batches
        quiet = ["experts.dropout=0", "price=null", "selector=softmax", "train.max_grad_norm=0"]
        train(settings(world, output, max_steps=1, seed=0, set=quiet, **changes))
    return grads


@pytest.mark.parametrize(("model", "task"), [("t5", "qa"), ("llama", "qa"), ("llama", "mood")])
def test_accumulation_does_not_multiply_the_task_loss(world, tmp_path, monkeypatch, model, task):
    """One batch of 8 rows or two of 4: without the mend, T5 (which ignores the token count) gets twice the gradient."""
    whole = first_gradients(world, tmp_path / "a", monkeypatch, model=model, tasks=(task,), batch_size=8)
    parts = first_gradients(world, tmp_path / "b", monkeypatch, model=model, tasks=(task,), batch_size=4, grad_accum=2)
    assert whole.keys() == parts.keys()
    tuned = [name for name in whole if "molora_bank" in name and whole[name].abs().max() > 1e-6]
    assert tuned
    for name in tuned:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "nowhere/at/all"}, ConfigError, "model folder 'nowhere/at/all' does not exist"),
        ({"recipe": "dynmol"}, ConfigError, "did you mean 'dynmole'"),
        ({"data": ["mood=missing.jsonl"]}, DataError, "missing.jsonl"),
        ({"max_length": 1000}, ConfigError, "more than the 128 tokens that the model can take"),
        ({"fields": {"txt": "x"}}, DataError, "did you mean 'text'"),
        ({"set": ["experts.num=0"]}, ConfigError, "experts.num must be a whole number"),
        ({"set": ["target_modules=[nothing]"]}, ConfigError, r"target_modules=\['nothing'\] match no layer"),
    ],
)
def test_bad_input(world, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        train(settings(world, tmp_path, **changes))
    assert not (tmp_path / "training.json").exists()


def test_a_trained_classifier_is_exported_with_its_labels(trained, tmp_path, capsys):
    """Its base does not know how many labels there are; the head of the adapter does."""
    folder, _ = trained
    assert cli.main(["export", str(folder), "--expert", "0", "--out", str(tmp_path / "one")]) == 0, capsys.readouterr()
    tensors = load_file(tmp_path / "one" / "adapter_model.safetensors")
    head = load_file(folder / "adapter_model.safetensors")["base_model.model.classifier.weight"]
    assert head.shape[0] == 5 and torch.equal(tensors["base_model.model.classifier.weight"], head)


def test_frozen_new_experts_are_told(world, tmp_path):
    """Nothing can be learned then: their routers weigh zeros."""
    told = []
    changes = {"recipe": "lora_mixer_router", "set": ["experts.num=3", "experts.rank=2"], "max_steps": 1}
    train(settings(world, tmp_path, **changes), tell=told.append)
    assert any("freezes all experts" in note and "import_peft" in note for note in told)


def test_an_encoder_cannot_generate(world, tmp_path):
    with pytest.raises(ConfigError, match="'bert' is an encoder and cannot generate"):
        train(settings(world, tmp_path, tasks=("qa",)))
    with pytest.raises(DataError, match="one run takes one kind of data"):
        train(settings(world, tmp_path, model="llama", tasks=("qa", "mood")))


def test_weights_that_blew_up_are_not_saved(world, tmp_path):
    with pytest.raises(ConfigError, match="holds NaN or Inf"):
        train(settings(world, tmp_path, max_steps=3, learning_rate=1e30, set=["train.max_grad_norm=0"]))
    assert not (tmp_path / "adapter_model.safetensors").exists()
