"""Choice: what was chosen for one prompt, from what, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Choice:
    """What was chosen for one prompt. Only adapters that were allowed are ever named.

    Attributes:
        weights: of the chosen adapters, the largest first, adding up to 1; empty when it abstained.
        scores: of every allowed adapter that the selector knows, in order of their names.
        probabilities: the scores as shares of 1; what entropy and weights are made of.
        abstained: whether the base model shall answer alone.
        why: in a sentence.
        entropy: of the probabilities, in nats; 0 when there was nothing to choose from.
        familiarity: the guard's p-value of the prompt, in (0, 1]; None without a guard.
        rate: the guard abstains at or below this p-value; None without a guard.
        version: of the selector, as far as it concerns the allowed adapters; changes when their examples do.
    """

    weights: Mapping[str, float]
    scores: Mapping[str, float]
    probabilities: Mapping[str, float]
    abstained: bool
    why: str
    entropy: float = 0.0
    familiarity: float | None = None
    rate: float | None = None
    version: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The chosen adapters, the one of the largest weight first."""
        return tuple(self.weights)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for programs."""
        plain = {"weights": dict(self.weights), "abstained": self.abstained, "why": self.why}
        plain |= {"scores": dict(self.scores), "probabilities": dict(self.probabilities), "entropy": self.entropy}
        return plain | {"familiarity": self.familiarity, "rate": self.rate, "version": self.version}


@dataclass(frozen=True)
class Judged:
    """What a guard says of B prompts.

    Attributes:
        familiarity: B p-values in (0, 1]: how many of the examples are as odd as the prompt.
        rate: it abstains at or below this.
        is_blind: there are too few examples to abstain at that rate, so nothing is refused.
    """

    familiarity: list[float]
    rate: float
    is_blind: bool = field(default=False)

    def refuses(self, row: int) -> bool:
        """Tell whether the guard abstains on a prompt."""
        return not self.is_blind and self.familiarity[row] <= self.rate


def explain(method: str, ranked: Sequence[tuple[str, float]], top_k: int, judged: Judged | None, row: int) -> str:
    """Return in a sentence why a prompt got what it got.

    Args:
        method: by which it was scored.
        ranked: (name, score) of every allowed adapter, the best first.
        top_k: how many are chosen.
        judged: what the guard says, if there is one.
        row: of the prompt.
    """
    told = [f"'{name}' ({score:.3f})" for name, score in ranked[: top_k + 1]]
    if judged is not None and judged.refuses(row):
        return (
            "the prompt is unlike the examples of every adapter that may be used "
            f"(p = {judged.familiarity[row]:.3g}, at most {judged.rate:g} abstains), so the base model answers; "
            f"the nearest is {told[0]} by {method}"
        )
    kept, rest = told[:top_k], told[top_k:]
    text = f"{' and '.join(kept)} {'fits' if len(kept) == 1 else 'fit'} best by {method}"
    text += f", before {rest[0]}" if rest else ""
    if judged is None:
        return text
    if judged.is_blind:
        return f"{text}; there are too few examples to tell whether the prompt is like them"
    return f"{text}; the prompt is like the examples (p = {judged.familiarity[row]:.3g})"
