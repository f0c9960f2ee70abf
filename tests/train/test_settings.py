"""Flags, --set and recipes: who overrides whom, and what is refused."""

import pytest

from molora.errors import ConfigError
from molora.train.settings import TrainSettings, parse_override, resolve_recipe, training_arguments


def settings(**changes):
    return TrainSettings(**(dict(recipe="lora", model="m", data=["d"], output="o") | changes))


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("experts.num=4", (["experts", "num"], 4)),
        ("experts.num=[2, 4]", (["experts", "num"], [2, 4])),
        ("losses.0.weight=1e-3", (["losses", "0", "weight"], 1e-3)),
        ("selector={name: top_k, k: 1}", (["selector"], {"name": "top_k", "k": 1})),
        ("price=null", (["price"], None)),
        ("target_modules=.*\\.(q|v)_proj=x", (["target_modules"], ".*\\.(q|v)_proj=x")),
        ("share=", (["share"], None)),
    ],
)
def test_overrides_are_read_as_yaml(text, expected):
    assert parse_override(text) == expected


@pytest.mark.parametrize("text", ["experts.num", "=4", "experts..num=4", "losses=[{a"])
def test_unreadable_overrides(text):
    with pytest.raises(ConfigError, match=r"override|readable YAML"):
        parse_override(text)


def test_overrides_change_what_they_name_and_nothing_else(recipe):
    path = recipe(
        "experts: {num: 4, rank: 2}\nselector: {name: top_k, k: 2}\n"
        "losses: [{name: router_z, weight: 0.1}, {name: switch_balance, weight: 0.2}]\n"
        "train: {learning_rate: 0.1, optim: adafactor}\n"
    )
    changes = ["experts.rank=3", "losses.1.weight=0.5", "train.learning_rate=1e-2", "train.warmup_steps=7"]
    config, train = resolve_recipe(path, changes, 1)
    assert (config.experts["num"], config.experts["rank"]) == (4, 3)
    assert config.losses == [{"name": "router_z", "weight": 0.1}, {"name": "switch_balance", "weight": 0.5}]
    assert config.selector == {"name": "top_k", "k": 2}
    assert train == {"learning_rate": 0.01, "optim": "adafactor", "warmup_steps": 7}
    assert resolve_recipe(path, ["selector.k=1"], 1)[0].selector == {"name": "top_k", "k": 1}
    # another component takes none of the options of the one before
    assert resolve_recipe(path, ["selector.name=top_p"], 1)[0].selector == {"name": "top_p"}
    assert resolve_recipe(path, ["selector=softmax"], 1)[0].selector == "softmax"
    # a component that the recipe leaves to its default
    assert resolve_recipe(path, ["link.temperature=0.5"], 1)[0].link == {"name": "softmax", "temperature": 0.5}
    two = resolve_recipe(path, ["selector.k=1", "selector.normalise=none"], 1)[0].selector
    assert two == {"name": "top_k", "k": 1, "normalise": "none"}


def test_a_component_given_by_name_takes_options(recipe):
    config, _ = resolve_recipe(recipe("selector: top_k\n"), ["selector.k=1"], 1)
    assert config.selector == {"name": "top_k", "k": 1}


def test_wrong_overrides_are_told_together(recipe):
    path = recipe("losses: [{name: router_z, weight: 0.1}]\n")
    with pytest.raises(ConfigError) as error:
        resolve_recipe(path, ["expert.num=4", "losses.3.weight=1", "share.x=1", "rubbish"], 1)
    message = str(error.value)
    assert "'expert' is unknown; did you mean 'experts'?" in message
    assert "'3' is no position in a list of 1" in message
    assert "'rubbish' is not an override" in message
    with pytest.raises(ConfigError, match=r"experts has no key 'ranks'; did you mean 'rank'"):
        resolve_recipe(path, ["experts.ranks=4"], 1)


def test_tables_get_one_row_per_task(recipe):
    path = recipe("scorer: {name: table, num_tasks: 99, spread: 0.5}\ngranularity: task\n")
    assert resolve_recipe(path, [], 3)[0].scorer == {"name": "table", "num_tasks": 3, "spread": 0.5}
    assert resolve_recipe(path, ["scorer.spread=0.1"], 2)[0].scorer == {"name": "table", "num_tasks": 2, "spread": 0.1}
    bare = recipe("scorer: table\ngranularity: task\n")
    assert resolve_recipe(bare, [], 5)[0].scorer == {"name": "table", "num_tasks": 5}


def test_flags_override_set_overrides_recipe(tmp_path):
    train = {"learning_rate": 0.1, "per_device_train_batch_size": 3, "num_train_epochs": 2, "optim": "adafactor"}
    plain = training_arguments(settings(), train, tmp_path)
    assert (plain.learning_rate, plain.per_device_train_batch_size, plain.num_train_epochs) == (0.1, 3, 2)
    assert plain.optim == "adafactor"
    assert plain.remove_unused_columns is False
    flagged = training_arguments(settings(learning_rate=0.5, batch_size=7, epochs=0.5, seed=9), train, tmp_path)
    assert (flagged.learning_rate, flagged.per_device_train_batch_size, flagged.num_train_epochs) == (0.5, 7, 0.5)
    assert flagged.seed == flagged.data_seed == 9
    assert training_arguments(settings(max_steps=5), train, tmp_path).max_steps == 5
    assert training_arguments(settings(epochs=1), {"max_steps": 50}, tmp_path).max_steps == -1


@pytest.mark.parametrize("where", ["flag", "gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_is_not_reentrant_unless_asked(tmp_path, where):
    train = {} if where == "flag" else {where: True}
    arguments = training_arguments(settings(gradient_checkpointing=where == "flag"), train, tmp_path)
    name = "activation_checkpointing" if hasattr(arguments, "activation_checkpointing") else "gradient_checkpointing"
    assert getattr(arguments, name) is True
    assert getattr(arguments, f"{name}_kwargs") == {"use_reentrant": False}
    own = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    assert getattr(training_arguments(settings(), own, tmp_path), f"{name}_kwargs") == {"use_reentrant": True}


def test_unknown_and_reserved_training_arguments(tmp_path):
    with pytest.raises(ConfigError) as error:
        training_arguments(settings(), {"learning_rat": 1, "output_dir": "x"}, tmp_path)
    assert "did you mean 'learning_rate'" in str(error.value)
    assert "'output_dir' is set by molora; use --output" in str(error.value)
    with pytest.raises(ConfigError, match=r"training arguments: .*sgdd is not a valid"):
        training_arguments(settings(), {"optim": "sgdd"}, tmp_path)
    assert all(name in str(error_of(tmp_path, optim="sgdd")) for name in ("'sgd'", "'adamw_torch'", "'lion_8bit'"))


def error_of(tmp_path, **train):
    with pytest.raises(ConfigError) as error:
        training_arguments(settings(), train, tmp_path)
    return error.value


def test_words_where_transformers_wants_numbers(tmp_path):
    """It would notice in the first step, with a TypeError of its own."""
    said = str(error_of(tmp_path, learning_rate="fast", warmup_steps=["5"], bf16="yes", num_train_epochs=1))
    assert "'learning_rate' must be a number, got 'fast'" in said
    assert "'warmup_steps' must be a number, got ['5']" in said and "'bf16' must be true or false, got 'yes'" in said
    assert training_arguments(settings(), {"learning_rate": 1e-3, "bf16": False}, tmp_path).learning_rate == 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantize": "4bits"}, r"quantize '4bits' is unknown; did you mean '4bit'\?"),
        ({"task_type": "cls"}, "task_type 'cls' is unknown"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"learning_rate": -1.0}, "learning_rate must be positive"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive"),
        ({"eval_fraction": 1.0}, "eval_fraction"),
        ({"max_length": 1}, "max_length"),
        ({"seed": -1}, "seed"),
        ({"epochs": 1.0, "max_steps": 3}, "give one of them"),
    ],
)
def test_settings_that_cannot_work(changes, message):
    with pytest.raises(ConfigError, match=message):
        settings(**changes)
