"""Task types: which data and models go together, and how clearly the rest is refused."""

import pytest
from transformers import ViTConfig

from molora.errors import ConfigError
from molora.train.models import load_config
from molora.train.task_types import resolve_task_type


@pytest.mark.parametrize(
    ("model", "kind", "expected"),
    [
        ("bert", "classification", "seq_cls"),
        ("llama", "classification", "seq_cls"),
        ("llama", "generation", "causal_lm"),
        ("llama", "lm", "causal_lm"),
        ("t5", "generation", "seq2seq_lm"),
    ],
)
def test_the_task_type_follows_data_and_model(world, model, kind, expected):
    config = load_config(world[model])
    assert resolve_task_type("auto", kind, config) == expected
    assert resolve_task_type(expected, kind, config) == expected


@pytest.mark.parametrize(
    ("model", "wanted", "kind", "message"),
    [
        ("bert", "auto", "generation", "model type 'bert' is an encoder and cannot generate text"),
        ("bert", "auto", "lm", "model type 'bert' is an encoder"),
        ("llama", "seq_cls", "generation", r"needs rows with text \+ label, but this is generation data"),
        ("llama", "causal_lm", "classification", r"needs rows with prompt \+ answer"),
        ("llama", "seq2seq_lm", "generation", "'llama' is not an encoder-decoder; use causal_lm"),
        ("t5", "causal_lm", "generation", "'t5' is an encoder-decoder; use seq2seq_lm"),
        ("llama", "causal", "generation", "did you mean 'causal_lm'"),
    ],
)
def test_what_does_not_go_together(world, model, wanted, kind, message):
    with pytest.raises(ConfigError, match=message):
        resolve_task_type(wanted, kind, load_config(world[model]))


def test_models_of_other_kinds():
    with pytest.raises(ConfigError, match="no classifier for model type 'vit'"):
        resolve_task_type("auto", "classification", ViTConfig())
    with pytest.raises(ConfigError, match="'vit' has no generating class"):
        resolve_task_type("auto", "generation", ViTConfig())
