"""Composition blocks: each against running the parts on their own, and refusals of what is no gate."""

import pytest
import torch
from peft import PeftModel

import molora
from molora.errors import ConfigError
from molora.posthoc.blocks import (
    Average,
    BatchSplit,
    MultiTask,
    Parallel,
    Stack,
    block_from,
    build,
    composing,
    gates_of,
)
from molora.posthoc.signature import config_hash
from tests.posthoc.library import library
from tests.tiny import tiny_inputs, tiny_llama

NAMES = ["lora0", "lora1", "lora2"]


@pytest.fixture
def folders(tmp_path):
    return library(tmp_path, 3)


@pytest.fixture
def model(folders):
    return molora.import_peft(tiny_llama(), folders).eval()


def inputs(rows):
    return tiny_inputs(tiny_llama(), batch=rows)


@torch.no_grad()
def alone(folders, expert, batch):
    return PeftModel.from_pretrained(tiny_llama(), folders[expert]).eval()(**batch).logits


@torch.no_grad()
def composed(model, block, batch, task_ids=None):
    with composing(model, block, len(batch["input_ids"]), task_ids):
        return model(**batch).logits


def test_batch_split_is_each_row_with_its_adapter(folders, model):
    batch = inputs(4)
    found = composed(model, BatchSplit("lora2", "lora0", batch_sizes=[1, 3]), batch)
    expected = torch.cat([alone(folders, 2, batch)[:1], alone(folders, 0, batch)[1:]])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    nested = BatchSplit(Average("lora0", "lora1"), BatchSplit("lora2", "lora1", batch_sizes=1), batch_sizes=[2, 2])
    expected = [[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1], [0, 1, 0]]
    assert gates_of(nested, NAMES, 4).tolist() == expected


def test_multi_task_follows_the_rows_whatever_their_order(folders, model):
    batch, ids, order = inputs(4), torch.tensor([1, 0, 1, 0]), torch.tensor([2, 0, 3, 1])
    block = MultiTask("lora2", Average("lora0", "lora1", weights=[1, 3]))
    found = composed(model, block, batch, ids)
    torch.testing.assert_close(found[[1, 3]], alone(folders, 2, batch)[[1, 3]], atol=1e-5, rtol=1e-5)
    shuffled = composed(model, block, {key: v[order] for key, v in batch.items()}, ids[order])
    torch.testing.assert_close(shuffled, found[order], atol=1e-6, rtol=1e-6)


def test_parallel_runs_the_batch_once_per_child(folders, model):
    batch, block = inputs(2), Parallel("lora1", "lora0")
    twice = block.replicated({**batch, "use_cache": False})
    assert twice["input_ids"].shape == (4, 7) and twice["use_cache"] is False
    found = composed(model, block, twice)
    expected = torch.cat([alone(folders, 1, batch), alone(folders, 0, batch)])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_an_average_is_an_average(folders, model, tmp_path):
    batch, equal = inputs(2), Average("lora1", "lora1", weights=[0.5, 0.5])
    torch.testing.assert_close(composed(model, equal, batch), alone(folders, 1, batch), atol=1e-5, rtol=1e-5)
    assert gates_of(Average("lora0", "lora1", "lora2"), NAMES, 1).sum() == 1
    mixed = Average("lora0", Average("lora1", "lora2"), weights=[3, 1])
    assert gates_of(mixed, NAMES, 2).tolist() == [[0.75, 0.125, 0.125]] * 2
    path = molora.export_peft(model, tmp_path / "mixed", gates=[0.75, 0.125, 0.125])
    with torch.no_grad():
        expected = PeftModel.from_pretrained(tiny_llama(), path).eval()(**batch).logits
    torch.testing.assert_close(composed(model, mixed, batch), expected, atol=1e-5, rtol=1e-5)


def test_a_stack_of_one_is_its_child_and_a_longer_one_is_refused(model):
    assert torch.equal(
        gates_of(Stack(Average("lora0", "lora1")), NAMES, 1), gates_of(Average("lora0", "lora1"), NAMES, 1)
    )
    with pytest.raises(ConfigError, match=r"Stack of 2 is no gate over a bank.*use Average"):
        Stack("lora0", "lora1")


@pytest.mark.parametrize(
    "block",
    [
        Average("a", Stack("b"), weights=[1, 2]),
        BatchSplit("a", Average("b", "c"), batch_sizes=[3, 1]),
        MultiTask("a", BatchSplit("b", "c", batch_sizes=2)),
        Parallel("a", MultiTask("b", "a")),
        Average("a", "b"),
    ],
    ids=repr,
)
def test_a_block_is_its_dict(block):
    content = block.to_dict()
    again = block_from(content)
    assert again == block and again.to_dict() == content and hash(again) == hash(block)
    names = ["a", "b", "c"]
    ids = torch.tensor([0, 1, 1, 0])
    assert torch.equal(gates_of(again, names, 4, ids), gates_of(block, names, 4, ids))
    assert block != Average("c") and block_from("a") == "a"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: block_from({"type": "Fuse", "children": ["a"]}),
            "Fuse is no gate over a bank: it weighs outputs by attention",
        ),
        (lambda: block_from({"type": "Split", "children": ["a"]}), "Split is no gate"),
        (lambda: block_from({"type": "Stack", "children": ["a", "b"]}), "Stack of 2"),
        (lambda: block_from({"type": "Averge", "children": ["a"]}), "did you mean 'Average'"),
        (
            lambda: block_from({"type": "Average", "children": ["a"], "weight": [1]}),
            "no 'weight'; did you mean 'weights'",
        ),
        (lambda: block_from(3), "3 is no block"),
        (lambda: Average(), "needs children"),
        (lambda: Average("a", 3), "not 3"),
        (lambda: Average("a", "b", weights=[1]), "2 children, but 1 weights"),
        (lambda: Average("a", "b", weights=[1, -1]), "0 or more"),
        (lambda: Average("a", weights=[0]), "not all 0"),
        (lambda: BatchSplit("a", "b", batch_sizes=[1]), "one number of rows per child"),
        (lambda: Average(Parallel("a", "b"), "c"), "put Parallel outermost"),
        (
            lambda: gates_of(BatchSplit("a", "b", batch_sizes=[1, 2]), ["a", "b"], 4),
            "splits 3 rows as .*, but there are 4",
        ),
        (lambda: gates_of(Parallel("a", "b"), ["a", "b"], 3), "must be there 2 times"),
        (lambda: gates_of(MultiTask("a", "b"), ["a", "b"], 2), "needs task_ids"),
        (lambda: gates_of(MultiTask("a", "b"), ["a", "b"], 2, torch.tensor([0, 2])), "task ids must be 0 to 1"),
        (lambda: gates_of(Average("a", "x"), ["a", "b"], 2), "expert 'x' is unknown"),
    ],
)
def test_what_is_no_block_is_said(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_constant_block_becomes_the_router(model, tmp_path):
    batch, block = inputs(2), Average("lora0", "lora2", weights=[1, 3])
    expected = composed(model, block, batch)
    build(model, block=block.to_dict())
    molora.save(model, tmp_path / "saved")
    loaded = molora.load(tiny_llama(), tmp_path / "saved")
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(loaded(**batch).logits, expected, atol=1e-6, rtol=1e-6)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, expected, atol=1e-5, rtol=1e-5)
    build(model, block="lora1")
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, composed(model, "lora1", batch), atol=1e-6, rtol=1e-6)


def test_a_multi_task_block_becomes_a_table(model):
    batch, ids = inputs(3), torch.tensor([1, 0, 1])
    block = MultiTask("lora2", Average("lora0", "lora1"))
    expected = composed(model, block, batch, ids)
    build(model, block=block)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch, task_ids=ids).logits, expected, atol=1e-6, rtol=1e-6)
    with pytest.raises(ConfigError, match=r"depends on the rows of a batch.*composing"):
        build(model, block=MultiTask("lora0", BatchSplit("lora1", "lora2", batch_sizes=1)))
    with pytest.raises(ConfigError, match="depends on the rows"):
        build(model, block=Parallel("lora0", "lora1"))


def test_configs_that_mean_the_same_have_the_same_hash():
    defaults = {"r": 8, "lora_alpha": 8, "bias": "none"}
    config = {"r": 4, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    key = config_hash(config, defaults)
    assert len(key) == 16 and int(key, 16) >= 0
    assert config_hash(dict(reversed(config.items())), defaults) == key
    assert config_hash({"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_alpha": 8}, defaults) == key
    assert config_hash({**config, "target_modules": {"v_proj", "q_proj"}}, defaults) == key
    assert config_hash({**config, "r": 16}, defaults) != key
    assert config_hash({**config, "bias": "all"}, defaults) != key
