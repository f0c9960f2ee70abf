"""attach(trainer): schedules follow the optimizer's steps, prices move once per step, and nothing counts twice."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

import molora
from molora.control import routed_layers, trace_of
from tests.tiny import tiny_llama

RECIPE = {
    "experts": {"form": "rank", "num": 8, "rank": 1, "alpha": 1},
    "link": "sigmoid",
    "selector": {"name": "top_k", "k": 2, "normalise": "sumk"},
    "price": {"name": "sign", "rate": 0.01},
    "target_modules": ["q_proj"],
}


def rows(count=8):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 90, (count, 6), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer_for(model, tmp_path, **options):
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        max_steps=4,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **options,
    )
    return Trainer(model=model, args=arguments, train_dataset=rows(16))


def prices(model):
    return torch.stack([layer.molora_router["default"].price.value for layer in routed_layers(model).values()])


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_prices_move_once_per_optimizer_step(tmp_path, checkpointing):
    """Two micro-batches a step, and routers that run twice under checkpointing: still one move of `rate` a step."""
    model = molora.wrap(tiny_llama(), RECIPE)
    options = (
        {}
        if checkpointing is None
        else {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": checkpointing},
        }
    )
    seen, observed = [], []
    trainer = molora.attach(trainer_for(model, tmp_path, gradient_accumulation_steps=2, **options))
    price = next(iter(routed_layers(model).values())).molora_router["default"].price
    settle = price.settle

    def watch():
        observed.append(None if price.chosen is None else price.chosen.sum().item())
        settle()
        seen.append(price.value.clone())

    price.settle = watch
    trainer.train()
    # each step: 2 micro-batches x 2 rows x 6 tokens x k = 2 choices, counted once
    assert [count for count in observed if count] == [48.0] * 4
    assert prices(model).abs().max() <= 4 * 0.01 + 1e-6
    assert (seen[0].abs() <= 0.01 + 1e-6).all() and seen[0].any()


def test_progress_follows_the_steps(tmp_path):
    model = molora.wrap(
        tiny_llama(),
        RECIPE,
        price=None,
        selector={"k": {"schedule": "linear", "from": 1, "to": 4}},
        losses=[{"name": "router_z", "weight": {"schedule": "linear", "from": 0.0, "to": 1.0}}],
    )
    counts, progress = [], []

    def reader(site, routing, ctx):
        counts.append(int(routing.selected.sum(-1).float().mean()))
        progress.append(ctx.progress)

    trainer = molora.attach(trainer_for(model, tmp_path))
    trace_of(model).readers.append(reader)
    trainer.train()
    assert sorted(set(progress)) == [0.0, 0.25, 0.5, 0.75]
    assert sorted(set(counts)) == [1, 2, 3]  # round(1 + 3 p), halves to even: 1, 2 (1.75), 2 (2.5), 3 (3.25)


def test_schedules_without_attach_are_said(tmp_path):
    model = molora.wrap(
        tiny_llama(), RECIPE, losses=[{"name": "router_z", "weight": {"schedule": "linear", "from": 0.0, "to": 1.0}}]
    )
    with pytest.warns(UserWarning, match="set_progress"):
        trainer_for(model, tmp_path).train()
    model = molora.wrap(
        tiny_llama(), RECIPE, losses=[{"name": "router_z", "weight": {"schedule": "linear", "from": 0.0, "to": 1.0}}]
    )
    molora.set_progress(model, 0.5)
    batch = {key: torch.stack([row[key] for row in rows()]) for key in ("input_ids", "labels")}
    model.train()
    first = model(**batch).aux_loss
    molora.set_progress(model, 1.0)
    torch.testing.assert_close(model(**batch).aux_loss, 2 * first)
    with pytest.raises(molora.ConfigError, match="progress"):
        molora.set_progress(model, 2)


def test_several_forwards_in_one_loss(tmp_path):
    """A loss made of two forwards (as in preference training) gets both auxiliary losses."""
    model = molora.wrap(tiny_llama(), RECIPE, price=None, losses=[{"name": "router_z", "weight": 1.0}])
    values = []

    class Pairs(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            first = model(input_ids=inputs["input_ids"])
            second = model(input_ids=inputs["input_ids"].flip(1))
            values.append((first.aux_loss + second.aux_loss) / 2)
            return first.logits.sum() * 0 + second.logits.sum() * 0

    trainer = molora.attach(Pairs(model=model, args=trainer_for(model, tmp_path).args, train_dataset=rows(16)))
    inputs = {"input_ids": torch.stack([row["input_ids"] for row in rows()])}
    torch.testing.assert_close(trainer.compute_loss(model.train(), inputs).detach(), values[0])
