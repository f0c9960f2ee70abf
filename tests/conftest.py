"""Set-up shared by all tests: offline, one thread, fixed seeds, and the tiny models on the import path."""

import os

# Before anything imports transformers, datasets or torch: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import random

import numpy
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def tokenizer():
    """The tiny word-level tokenizer (see tests/tiny.py)."""
    from tests.tiny import tiny_tokenizer

    return tiny_tokenizer()
