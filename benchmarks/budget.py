"""How the time of a run is divided: every section gets its least rounds, and what is left beyond them by shares.

What a section needs before its first round and for each round is known from an earlier run; how much slower or faster
this machine is now, from the sections that are over. A section may so only use what the later ones do not need.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .sections import LEAST


@dataclass(frozen=True)
class Part:
    """One section.

    Attributes:
        run: measures it, given the run's models and the moment until which it may begin rounds.
        setup: seconds for building its models and warming them up.
        round: seconds for a round of all contenders.
        share: its share of the time that the least rounds of all sections leave.
    """

    run: Callable[[Any, float], dict[str, Any]]
    setup: float
    round: float
    share: float

    @property
    def least(self) -> float:
        """The seconds without which it has not its least rounds."""
        return self.setup + LEAST * self.round


class Budget:
    """The time of one run.

    Args:
        minutes: how long it may take; 0: only the least rounds.
        parts: the sections by name, in the order in which they will run.
    """

    def __init__(self, minutes: float, parts: dict[str, Part]) -> None:
        self.minutes = minutes
        self.end = time.monotonic() + 60 * minutes
        self._left = dict(parts)
        self._expected = self._used = 0.0
        self.short: list[str] = []

    @property
    def pace(self) -> float:
        """How many times longer than expected the sections so far have taken."""
        return self._used / self._expected if self._expected else 1.0

    def begin(self, name: str) -> float:
        """Return until when the next section may measure, in the time of `time.monotonic`."""
        self._began = time.monotonic()
        left = max(0.0, self.end - self._began)
        spare = left - self.pace * sum(part.least for part in self._left.values())
        part, shares = self._left[name], sum(part.share for part in self._left.values())
        return self._began + min(left, self.pace * part.least + max(0.0, spare) * part.share / shares)

    def finish(self, name: str, result: dict[str, Any]) -> None:
        """Note what a section has taken, and whether the budget held it to its least rounds."""
        part = self._left.pop(name)
        rounds = min((len(row["ratios"]) for row in result.get("rows", ())), default=0)
        self._used += time.monotonic() - self._began
        self._expected += part.setup + rounds * part.round
        if self.minutes and 0 < rounds <= LEAST:
            self.short.append(name)

    def note(self) -> str:
        """Return what the reader must know about rounds and time."""
        if not self.minutes:
            return ""
        text = f"The budget was {self.minutes:g} minutes. "
        if self.short:
            text += f"It left no more than the least number of rounds, {LEAST}, to: {', '.join(self.short)}. "
        late = (time.monotonic() - self.end) / 60
        if late > 0.05 * self.minutes:
            text += f"It was overrun by {late:.1f} minutes, since no section runs fewer rounds than that."
        return text.strip()
