"""Embedders by name: texts -> unit vectors (N, D) in float32 on the CPU, each text once.

- `base`: mean of the served model's own hidden states over the tokens of the text, adapters off. Costs a prefill, needs
  no second model, and belongs on the thread that runs the model.
- `sentence`: a sentence encoder from a folder, such as all-MiniLM-L6-v2.
- `words`: hashed words and pairs of words; no model at all.

Vectors of different embedders do not compare, so each has a `digest` of what decides its vectors.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import ConfigError
from ..registry import Spec, split_spec
from . import encoders  # noqa: F401  (registers its embedders)
from .embedder import Embedder
from .registry import embedders


def build_embedder(spec: Spec, model: nn.Module | None = None, tokenizer: Any = None) -> Embedder:
    """Build an embedder from `words` or `{name: sentence, path: ...}`.

    Args:
        spec: which, with options.
        model, tokenizer: for embedders that read a model; others leave them alone.

    Raises:
        ConfigError: an unknown name or option, or a model is needed and not given.
    """
    name, _ = split_spec(spec, embedders.kind)
    if not embedders.fact(name, "reads_model", False):
        return embedders.build(spec)
    if model is None or tokenizer is None:
        raise ConfigError(f"embedder '{name}' reads the hidden states of a model; give the model and its tokenizer")
    return embedders.build(spec, model, tokenizer)
