"""RoMA and preferences in a plain Trainer: the steps of a loop by hand, and routers that learn what they should."""

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import molora
from molora import ConfigError
from molora.posthoc import mol_moe
from molora.posthoc.mol_moe import PreferenceTuner, gates_by_preference, precision
from molora.posthoc.rerouting import routers_of
from molora.posthoc.roma import Roma
from tests.posthoc.mixtures import save_loras, trainable
from tests.posthoc.test_mol_moe import counts, mixture_of, prompts, speaker, speakers  # noqa: F401 (a fixture)
from tests.tiny import tiny_inputs, tiny_llama


class Rows(Dataset):
    """Rows of a batch, each a mapping from names to tensors."""

    def __init__(self, **columns):
        self.columns = columns

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, row):
        return {name: column[row] for name, column in self.columns.items()}


def stack(rows):
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}


def trainer_of(model, rows, tmp_path, **options):
    given = {
        "optim": "sgd",
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "learning_rate": 0.5,
        "max_grad_norm": 0.0,
    } | options
    given |= {"lr_scheduler_type": "constant", "report_to": [], "use_cpu": True, "save_strategy": "no"}
    given |= {"disable_tqdm": True, "logging_steps": 1}
    trainer = Trainer(model, TrainingArguments(str(tmp_path / "out"), **given), train_dataset=rows, data_collator=stack)
    trainer._get_train_sampler = lambda *args, **kwargs: torch.utils.data.SequentialSampler(rows)
    return trainer


# --- RoMA -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    return save_loras(tmp_path_factory.mktemp("loras"), 3)


def roma_rows(number=8):
    """Rows whose every label is right, as the model answers; the odd ones are known by numbers far from their place."""
    inputs = tiny_inputs(tiny_llama(), batch=number, length=6)
    generator = torch.Generator().manual_seed(5)
    ids = torch.arange(number) * 7 + 100
    return Rows(**inputs, labels=inputs["input_ids"], embeddings=torch.randn(number, 4, generator=generator),
                sample_ids=ids, text=torch.zeros(number))  # fmt: skip


def roma_model(loras):
    model = molora.compose(tiny_llama(), loras, router={"name": "roma", "layers": 1})
    generator = torch.Generator().manual_seed(0)
    for router in routers_of(model):
        router.scorer.weight.data = torch.randn(router.scorer.weight.shape, generator=generator)
    return model


class AllRight(Roma):
    def _matches(self, batch):
        return torch.ones(len(batch["input_ids"]), dtype=torch.bool)


def learned(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("steps", [1, 2])
def test_a_step_of_roma_is_that_of_the_loop_by_hand(loras, tmp_path, steps):
    rows, (model, other) = roma_rows(), (roma_model(loras), roma_model(loras))
    tuner = AllRight(model, layers=1, weight=5.0)
    trainer = molora.attach(
        trainer_of(model, rows, tmp_path, per_device_train_batch_size=8 // steps, gradient_accumulation_steps=steps),
        tuner,
    )
    before = learned(model)
    trainer.train()

    mine = AllRight(other, layers=1, weight=5.0)
    batches = [stack([rows[i] for i in part]) for part in torch.arange(8).chunk(steps)]
    for batch in batches:
        del batch["text"]
    mine.begin_epoch(batches)
    other.train()
    plain = []
    for batch in batches:
        loss = mine.batch_loss(batch) / steps
        loss.backward()
        inputs = {name: value for name, value in batch.items() if name in ("input_ids", "attention_mask", "labels")}
        plain.append(float(other(**inputs).loss.detach()) / steps)
    torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=0.5).step()
    after, want = learned(model), learned(other)
    assert set(after) == set(want) == trainable(model)
    for name in after:
        assert not torch.equal(after[name], before[name])
        torch.testing.assert_close(after[name], want[name], atol=1e-6, rtol=1e-5)
    (logged,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert logged["imitated"] == 8 and logged["imitation"] > 0
    assert logged["loss"] > sum(plain) + 1e-3  # the pull is a part of it
    assert tuner.ids == rows.columns["sample_ids"].tolist()


def test_targets_are_collected_every_epoch_and_evaluation_is_the_trainers(loras, tmp_path):
    rows, model = roma_rows(), roma_model(loras)
    tuner = AllRight(model, layers=1, weight=20.0)
    trainer = trainer_of(model, rows, tmp_path, max_steps=-1, num_train_epochs=8, learning_rate=0.3)
    molora.attach(trainer, tuner)
    seen, collect = [], tuner.collect
    tuner.collect = lambda *args: seen.append(collect(*args)) or seen[-1]
    rng = torch.get_rng_state()
    trainer.callback_handler.on_epoch_begin(trainer.args, trainer.state, trainer.control)
    assert torch.equal(torch.get_rng_state(), rng)
    trainer.train()
    assert seen == [8] * 9
    pulls = [entry["imitation"] for entry in trainer.state.log_history if "imitation" in entry]
    assert sum(pulls[-2:]) < 0.8 * sum(pulls[:2])
    with torch.no_grad():
        inputs = {name: rows.columns[name] for name in ("input_ids", "attention_mask", "labels")}
        want = float(model.eval()(**inputs).loss)
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(want, rel=1e-5)


# --- preferences ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2])
def test_a_step_of_preferences_is_that_of_the_loop_by_hand(speakers, tmp_path, steps):  # noqa: F811
    rows = Rows(**prompts(8), router_extra=torch.softmax(torch.randn(8, 3), -1))
    model, other = (mol_moe.build(mixture_of(speakers, speaker), preferences=3) for _ in range(2))
    tuner, mine = (PreferenceTuner(m, counts, samples=3, new_tokens=3) for m in (model, other))
    options = {"per_device_train_batch_size": 8 // steps, "gradient_accumulation_steps": steps}
    trainer = molora.attach(trainer_of(model, rows, tmp_path, **options), tuner)
    torch.manual_seed(3)
    texts, sampled = [], tuner._sampled
    tuner._sampled = lambda *args: texts.append(sampled(*args)) or texts[-1]
    trainer.train()
    assert len(texts) == steps
    mine._sampled = lambda *args: texts.pop(0)
    for part in torch.arange(8).chunk(steps):
        (mine.batch_loss(stack([rows[i] for i in part])) / steps).backward()
    torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=0.5).step()
    after, want = learned(model), learned(other)
    assert set(after) == set(want) == trainable(model)
    for name in after:
        assert after[name].abs().max() > 1e-4  # they began at 0
        torch.testing.assert_close(after[name], want[name], atol=1e-6, rtol=1e-4)
    (logged,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert logged["reward"] == pytest.approx(mine.mean_reward)


def test_a_trainer_makes_routers_follow_preferences(speakers, tmp_path):  # noqa: F811
    torch.manual_seed(0)
    model = mol_moe.build(mixture_of(speakers, speaker), preferences=3)
    wanted = torch.distributions.Dirichlet(torch.full((3,), 0.7)).sample((16 * 40,))
    rows = Rows(**prompts(16 * 40), router_extra=wanted)
    options = {"per_device_train_batch_size": 16, "max_steps": 40, "learning_rate": 0.03, "optim": "adamw_torch"}
    trainer = trainer_of(model, rows, tmp_path, **options)
    tuner = PreferenceTuner(model, counts, lambda w, s: 8 * precision(w, s), samples=6, new_tokens=6, kl=0.0)
    molora.attach(trainer, tuner)
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert len(rewards) == 40 and sum(rewards[-10:]) > sum(rewards[:10])
    same = {name: tensor[:1].repeat(2, 1) for name, tensor in prompts(1, 5).items()}
    for j in range(3):
        asked = torch.full((2, 3), 0.45)
        asked[:, j] = torch.tensor([0.1, 0.8])
        low, high = gates_by_preference(model, same, asked)[:, j]
        assert high > low + 0.02


# --- what cannot work -------------------------------------------------------------------------------------------------


def test_what_cannot_work_is_told(loras, tmp_path):
    rows, model = roma_rows(), roma_model(loras)
    with pytest.raises(ConfigError, match="made for another model"):
        molora.attach(trainer_of(model, rows, tmp_path), Roma(roma_model(loras), layers=1))
    tuner = Roma(model, layers=1)
    trainer = molora.attach(trainer_of(model, rows, tmp_path))
    with pytest.raises(ConfigError, match=r"call attach\(trainer, tuner\) once"):
        molora.attach(trainer, tuner)
    trainer = molora.attach(trainer_of(model, rows, tmp_path), tuner)
    assert molora.attach(trainer, tuner) is trainer
    with pytest.raises(ConfigError, match="answered none of 8 samples correctly"):
        trainer.train()
    del rows.columns["sample_ids"]
    with pytest.raises(ConfigError, match="RoMA needs sample_ids in every batch"):
        trainer.train()
    with pytest.raises(ConfigError, match="needs router_extra in every batch"):
        PreferenceTuner(model, counts).batch_loss({"input_ids": torch.ones(1, 2, dtype=torch.long)})
