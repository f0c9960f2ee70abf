"""The registries of what choosing by prompts is made of.

- prompt embedder: a class whose calls turn texts into unit vectors (embed.py). Fact `reads_model`: it is built with a
  model and its tokenizer.
- prompt selector: a class with `fit(groups)`, `score(vectors)`, `state()` and `restore(tensors)` (scoring.py). Fact
  `scores`: `cosine` or `probability`.
- prompt guard: a class with `fit(groups)` and `judge(vectors)` (guard.py).
- bandit policy: a function from a prior and what was learned to probabilities (policies.py).
"""

from __future__ import annotations

from ..registry import Registry

embedders = Registry("prompt embedder")
prompt_selectors = Registry("prompt selector")
guards = Registry("prompt guard")
policies = Registry("bandit policy")
