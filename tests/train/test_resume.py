"""A run that is killed and resumed ends with the weights of an unbroken one, bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from molora.errors import ConfigError
from molora.train import run as run_module
from molora.train.disk import checkpoints_in, is_whole, mark_complete, newest_whole, prune
from molora.train.run import train
from molora.train.settings import TrainSettings

ROOT = Path(__file__).resolve().parents[2]


def settings(world, output, **changes):
    options = dict(
        recipe=world["recipe"],
        model=world["bert"],
        data=[f"mood={world['mood']}", f"topic={world['topic']}"],
        output=str(output),
        max_steps=10,  # 38 rows in batches of 4, two to a step: 5 steps an epoch, the last of 1 and a half batches
        grad_accum=2,
        save_steps=3,
        keep=9,
        quiet=True,
    )
    return TrainSettings(**(options | changes))


@pytest.fixture(scope="module")
def unbroken(world, tmp_path_factory):
    """The weights of a run that nobody disturbed."""
    output = tmp_path_factory.mktemp("unbroken") / "out"
    result = train(settings(world, output))
    assert result.steps == 10
    tensors = load_file(output / "adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in tensors.items() if "price" in name)
    return tensors


def assert_same(tensors, expected):
    assert tensors.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(tensors[name], expected[name])]
    assert not different


class Stop(Exception):
    pass


class StopAt(TrainerCallback):
    """Breaks the run off after a step, as a crash would."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Stop


def broken_off(world, output, step, monkeypatch, **changes):
    def attach_and_stop(trainer):
        trainer.add_callback(StopAt(step))
        return attach(trainer)

    attach = run_module.attach
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "attach", attach_and_stop)
        with pytest.raises(Stop):
            train(settings(world, output, **changes))


KILLED = """
import os, signal
import transformers
from molora.train.run import train
from molora.train.settings import TrainSettings

def killed_while_saving(self, folder):
    if self.state.global_step == 6:  # adapter, optimizer and scheduler of checkpoint-6 are written; nothing else is
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, folder)

save = transformers.Trainer._save_rng_state
transformers.Trainer._save_rng_state = killed_while_saving
train(TrainSettings(**{options!r}))
"""


def test_killed_in_the_middle_of_a_checkpoint(world, unbroken, tmp_path):
    output = tmp_path / "out"
    code = KILLED.replace("{options!r}", repr(vars(settings(world, output))))
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    half = output / "checkpoints" / "checkpoint-6"
    assert (half / "adapter_model.safetensors").exists()
    assert (half / "optimizer.pt").exists()
    assert not is_whole(half)
    assert not (output / "training.json").exists()

    result = train(settings(world, output, resume=True))
    assert result.notes[:2] == [
        "skipped checkpoint-6: it was only half written when the run was killed",
        "resuming from checkpoint-3",
    ]
    assert result.steps == 10
    assert_same(load_file(output / "adapter_model.safetensors"), unbroken)
    assert is_whole(half)  # written anew on the way
    assert json.loads((output / "training.json").read_text())["steps"] == 10


@pytest.mark.parametrize(("save_steps", "stop"), [(5, 6), (4, 9)], ids=["epoch boundary", "second epoch"])
def test_broken_off_elsewhere(world, unbroken, tmp_path, monkeypatch, save_steps, stop):
    broken_off(world, tmp_path, stop, monkeypatch, save_steps=save_steps)
    result = train(settings(world, tmp_path, save_steps=save_steps, resume=True))
    assert f"resuming from checkpoint-{stop // save_steps * save_steps}" in result.notes
    assert_same(load_file(tmp_path / "adapter_model.safetensors"), unbroken)


@pytest.mark.parametrize("lost", ["rng_state.pth", "optimizer.pt"])
def test_the_comparison_would_notice_a_loss(world, unbroken, tmp_path, monkeypatch, lost):
    broken_off(world, tmp_path, 4, monkeypatch)
    checkpoint = tmp_path / "checkpoints" / "checkpoint-3"
    (checkpoint / lost).unlink()
    mark_complete(checkpoint)
    train(settings(world, tmp_path, resume=True))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert any(not torch.equal(tensors[name], unbroken[name]) for name in unbroken)


def test_killed_before_the_first_checkpoint_starts_again(world, unbroken, tmp_path, monkeypatch):
    broken_off(world, tmp_path, 2, monkeypatch)
    result = train(settings(world, tmp_path, resume=True))
    assert result.notes[0] == "no whole checkpoint to resume from: starting from the beginning"
    assert_same(load_file(tmp_path / "adapter_model.safetensors"), unbroken)


def test_a_finished_run_is_finished_again_without_a_step(world, unbroken, tmp_path):
    train(settings(world, tmp_path))
    for name in ("training.json", "adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / name).unlink()
    result = train(settings(world, tmp_path, resume=True))
    assert (result.steps, result.train_loss) == (10, None)
    assert_same(load_file(tmp_path / "adapter_model.safetensors"), unbroken)


def test_another_run_is_not_resumed(world, tmp_path, monkeypatch):
    broken_off(world, tmp_path, 4, monkeypatch)
    with pytest.raises(ConfigError, match=r"another run: seed was 0, is 1; learning_rate was 0\.01, is 0\.5"):
        train(settings(world, tmp_path, resume=True, seed=1, learning_rate=0.5))
    with pytest.raises(ConfigError, match=r"another run: adapter was "):
        train(settings(world, tmp_path, resume=True, set=["experts.rank=3"]))
    changed = tmp_path / "mood.jsonl"
    changed.write_text(Path(world["mood"]).read_text().replace("film", "book", 1))
    with pytest.raises(ConfigError, match=r"another run: data was "):
        train(settings(world, tmp_path, resume=True, data=[f"mood={changed}", f"topic={world['topic']}"]))


def test_a_folder_in_use_is_refused(world, tmp_path, monkeypatch):
    broken_off(world, tmp_path, 4, monkeypatch)
    with pytest.raises(ConfigError, match=r"in use \(checkpoint-3\).*--resume.*--overwrite"):
        train(settings(world, tmp_path))
    with pytest.raises(ConfigError, match="give one of them"):
        train(settings(world, tmp_path, resume=True, overwrite=True))
    result = train(settings(world, tmp_path, overwrite=True, max_steps=1))
    assert result.steps == 1
    assert [step for step, _ in checkpoints_in(tmp_path / "checkpoints")] == [1]


# ---- checkpoints as files ----


@pytest.fixture
def checkpoints(tmp_path):
    for step in (2, 4, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(b"x" * 10)
        (folder / "trainer_state.json").write_text("{}")
        mark_complete(folder)
    (tmp_path / "checkpoint-final").mkdir()
    return tmp_path


def test_newest_is_by_number_not_by_name(checkpoints):
    assert newest_whole(checkpoints) == (checkpoints / "checkpoint-10", [])


@pytest.mark.parametrize("damage", ["truncated", "missing", "unmarked", "mark cut off", "empty mark"])
def test_half_written_is_not_whole(checkpoints, damage):
    newest = checkpoints / "checkpoint-10"
    if damage == "truncated":
        (newest / "adapter_model.safetensors").write_bytes(b"x" * 9)
    elif damage == "missing":
        (newest / "trainer_state.json").unlink()
    elif damage == "unmarked":
        (newest / "complete.json").unlink()
    else:
        (newest / "complete.json").write_text('{"files"' if damage == "mark cut off" else "{}")
    path, notes = newest_whole(checkpoints)
    assert path == checkpoints / "checkpoint-4"
    assert len(notes) == 1
    assert "skipped checkpoint-10" in notes[0]


def test_pruning_counts_only_whole_ones(checkpoints):
    (checkpoints / "checkpoint-10" / "complete.json").unlink()
    shutil.copytree(checkpoints / "checkpoint-2", checkpoints / "checkpoint-3")
    (checkpoints / "checkpoint-3" / "complete.json").unlink()
    prune(checkpoints, 2)
    assert [step for step, _ in checkpoints_in(checkpoints)] == [2, 3, 4, 10]
    prune(checkpoints, 1)
    assert [step for step, _ in checkpoints_in(checkpoints)] == [4, 10]  # 10 may be one that is being written
