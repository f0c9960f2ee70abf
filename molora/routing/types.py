"""What a router is told and what it answers: `Context` and `Routing`.

Shape letters used in this folder: B rows of the batch, S positions, d hidden size, E experts.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Context:
    """What is known about one forward besides the hidden states.

    Attributes:
        valid: (B, S) bool, False at padding; None means that every position is a real token.
        prompt: (B, S) bool, True at prompt tokens; None means that every valid token belongs to the prompt.
        task_ids: (B,) long, the task of each row, -1 for unknown; None when no tasks were given.
        progress: how far training is, in [0, 1]; schedules read it.
        pinned: gates that replace every decision, broadcastable to (B, S, E); None lets routers decide.
        training: whether this is a training forward (noise and exploration are allowed).
        token_ids: (B, S) long, the token ids of this forward; None when the model was given embeddings.
        expert_ids: (B, 1|S) long, the expert that a label asks for at each token, -1 for none; None without labels.
        extra: (B, 1|S, m) float, features that the caller adds to what routers read (an accent, a domain).
        memory: what routers of one forward pass on to later routers; None outside of a model's forward.
        causal: whether tokens may only look back; False where the model reads the whole input at once (BERT, encoders).
        edits: pairs of an edit and the site it is asked at (see edit.py).
    """

    valid: Tensor | None = None
    prompt: Tensor | None = None
    task_ids: Tensor | None = None
    progress: float = 0.0
    pinned: Tensor | None = None
    training: bool = False
    token_ids: Tensor | None = None
    expert_ids: Tensor | None = None
    extra: Tensor | None = None
    memory: Memory | None = None
    causal: bool = True
    edits: tuple[Any, ...] = ()

    def fit(self, x: Tensor) -> Context:
        """Return the context with the masks that do not describe the leading axes of `x` (B, S, d) removed."""
        tokens = x.shape[:-1]

        def misfits(mask: Tensor | None) -> bool:
            return mask is not None and mask.shape[:2] != tokens

        wrong = [name for name in ("valid", "prompt", "token_ids") if misfits(getattr(self, name))]
        ids = self.token_ids
        if ids is not None and "token_ids" in wrong and tokens == (ids.shape[0], 1):
            # one state per row: a pooled head, which stands for the row's first token
            first = 0 if self.valid is None or self.valid.shape != ids.shape else self.valid.long().argmax(1)
            ids = ids[torch.arange(len(ids)), first][:, None]
            return dataclasses.replace(self, token_ids=ids).fit(x)
        for name in ("expert_ids", "extra"):
            given = getattr(self, name)
            if given is not None and (given.shape[0] != tokens[0] or given.shape[1] not in (1, tokens[1])):
                wrong.append(name)
        return dataclasses.replace(self, **dict.fromkeys(wrong)) if wrong else self

    def weights(self, like: Tensor) -> Tensor:
        """Return (B, S) float32 weights of the decisions in `like` (B, S, E): 1 at real tokens, 0 at padding.

        A decision per row (S = 1) counts unless the row is all padding.
        """
        valid = self.valid
        if valid is not None and like.shape[1] == 1 and valid.shape[0] == like.shape[0]:
            valid = valid.any(1, keepdim=True)
        if valid is not None and valid.shape == like.shape[:-1]:
            return valid.to(device=like.device, dtype=torch.float32)
        return torch.ones(like.shape[:-1], dtype=torch.float32, device=like.device)


class Memory:
    """What routers leave for other routers, by name.

    Attributes:
        now: of this forward; gone when it ends (but kept for a checkpoint's recompute).
        past: of the tokens that came before, kept together with the key-value cache of a generation; empty in a
            forward without a cache. A router reads and writes only its own entries, whose first axis is the batch.
        seed: what the random draws of this forward follow from, so that the recompute of a checkpoint draws the same;
            None lets them come from torch's own generator.
    """

    def __init__(self) -> None:
        self.now: dict[str, Any] = {}
        self.past: dict[str, Any] = {}
        self.seed: int | None = None

    def generator(self, name: str, device: torch.device) -> torch.Generator | None:
        """Return the generator of one router's draws in this forward: the same one each time it is asked for."""
        if self.seed is None:
            return None
        digest = hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=7).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


@dataclass(frozen=True)
class Routing:
    """One routing decision, all float32.

    E counts the experts that are routed; N = E + m where m null experts take part in the choice.

    Attributes:
        scores: (B, S, N) raw scores of the scorer; S is 1 when the decision is per prompt or per task.
        probs: (B, S, N) scores after the link function.
        gates: (B, S, E) weights that multiply the experts; zero means "not routed".
        always: (B, S, n) weights of the shared experts, which no choice touches; None without them.
        choices: (B, S, N) bool, what was selected, null experts included; None: exactly the gates that are not zero.
        notes: further tensors (B, S, ...) or scalars that a scorer or a selector leaves for its losses.
        branches: the decisions that this one was mixed from (see branches.py).
        passes: what the experts are given, pairs of an input (B, S, d_in), None for that of their layer, and its gates
            (B, S, E + n) (see views.py); empty: the input of the layer, once, under `applied`.
    """

    scores: Tensor
    probs: Tensor
    gates: Tensor
    always: Tensor | None = None
    choices: Tensor | None = None
    notes: Mapping[str, Tensor] | None = None  # not a default factory: torch.compile cannot trace those
    branches: tuple[Routing, ...] = ()
    passes: tuple[tuple[Tensor | None, Tensor], ...] = ()

    @property
    def num_experts(self) -> int:
        """The number of routed experts E."""
        return self.gates.shape[-1]

    @property
    def selected(self) -> Tensor:
        """(B, S, N) bool: which experts were chosen, null experts included."""
        return self.gates != 0 if self.choices is None else self.choices

    @property
    def applied(self) -> Tensor:
        """(B, S, E + n): the weights of all experts of the bank, shared experts last."""
        return self.gates if self.always is None else torch.cat([self.gates, self.always], -1)

    def detach(self) -> Routing:
        """Return the same decision without its graph."""
        notes = {name: value.detach() for name, value in (self.notes or {}).items()}
        always = None if self.always is None else self.always.detach()
        branches = tuple(branch.detach() for branch in self.branches)
        passes = tuple((None if x is None else x.detach(), gates.detach()) for x, gates in self.passes)
        own = (self.scores.detach(), self.probs.detach(), self.gates.detach())
        return Routing(*own, always, self.choices, notes, branches, passes)
