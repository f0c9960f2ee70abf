"""Tracer: what the routers of a mixture decided for each token of an answer, in few numbers.

An entry is `{"token": text, "experts": [[number, gate], ...], "entropy": nats}`: the experts with the largest gates,
averaged over the layers, and the mean entropy of the routers' probabilities. That of a token of the answer is the
decision at the position that it was drawn from; that of a token of the prompt, at that token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..engine.programs import Decision
from ..request import Token

MOST = 3  # experts of a token
LONGEST = 512  # tokens of a prompt, its last ones


class Tracer:
    """Takes the decisions for one answer over on the engine's thread, and tells them on another.

    Args:
        tokenizer: of the model.
        prompt: tokens.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self.tokenizer, self.prompt = tokenizer, prompt
        # by how many tokens there were before, by layer: gates and probabilities, forward by forward
        self._heard: dict[int, dict[str, list[tuple[Tensor, Tensor]]]] = {}
        self._told = 0
        self._last: dict[str, Any] = {"experts": [], "entropy": 0.0}

    def __call__(self, decision: Decision) -> None:
        """Take a decision over."""
        # an answer's tokens come after their decisions, so nobody reads what is written here
        heard = self._heard.setdefault(decision.drawn, {})
        parts = heard.setdefault(decision.layer, [])
        gates, probs = decision.gates, decision.probs
        if len(gates) > LONGEST:  # of a long prompt only the last tokens are told; clones let go of the others
            gates, probs = gates[-LONGEST:].clone(), probs[-LONGEST:].clone()
        parts.append((gates, probs))
        while len(parts) > 1 and sum(len(gates) for gates, _ in parts[1:]) >= LONGEST:
            del parts[0]

    def take(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """Return the entries of tokens that were drawn: `trace`, and with the first of them `prompt_trace`."""
        told: dict[str, Any] = {}
        entries = []
        for token in tokens:
            rows = self._rows(self._told)
            if self._told == 0 and len(rows) > 1:
                read = self.prompt[-len(rows) :]  # the rest was in the prefix cache, and was not routed
                pairs = list(zip(read, rows, strict=True))[-LONGEST:]
                told["prompt_trace"] = [{"token": self.tokenizer.decode([one]), **row} for one, row in pairs]
            self._told += 1
            if rows:
                self._last = rows[-1]  # routers that decide once per prompt say nothing more
            if self._last["experts"]:
                entries.append({"token": self.tokenizer.decode([token.id]), **self._last})
        return {"trace": entries, **told} if entries else told

    def _rows(self, drawn: int) -> list[dict[str, Any]]:
        """Return what was decided for the positions that were read before a token, in their order."""
        layers = [
            (torch.cat([gates for gates, _ in parts]), torch.cat([probs for _, probs in parts]))
            for parts in self._heard.pop(drawn, {}).values()
        ]
        if not layers:
            return []
        count = min(max(len(gates) for gates, _ in layers), len(self.prompt))
        width = max(gates.shape[1] for gates, _ in layers)
        total, entropy = torch.zeros(count, width), torch.zeros(count)
        for gates, probs in layers:  # a router that decides once per prompt has one row
            total[:, : gates.shape[1]] += gates[-count:]
            shares = probs.clamp_min(0) / probs.clamp_min(0).sum(-1, keepdim=True).clamp_min(1e-12)
            entropy += torch.special.entr(shares).sum(-1)[-count:]
        total, entropy = total / len(layers), entropy / len(layers)
        best = total.topk(min(MOST, width), -1)
        return [
            {
                "experts": [[one, round(gate, 4)] for one, gate in zip(numbers, gates, strict=True) if gate],
                "entropy": round(nats, 4),
            }
            for numbers, gates, nats in zip(best.indices.tolist(), best.values.tolist(), entropy.tolist(), strict=True)
        ]
