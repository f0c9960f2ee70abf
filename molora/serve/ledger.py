"""Ledger: what became of each tenant's requests since the server started, and the report of it.

It is kept in memory; what is to survive a kill, the tokens of settled answers, is in the tenants' database.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from .engine.stats import named
from .request import Program, Usage

MOST = 2000  # programs of a tenant that are counted by name
RECENT = 1000  # prompts that the drift is measured on
OTHER = "(other)"


@dataclass
class _Account:
    requests: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    by_program: dict[str, list[int]] = field(default_factory=dict)  # name -> requests, tokens
    auto: int = 0
    abstained: int = 0
    familiar: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))


class Ledger:
    """Counts by tenant; any thread may call any method."""

    def __init__(self) -> None:
        self.since = int(time.time())
        self._accounts: dict[str, _Account] = {}
        self._lock = threading.Lock()

    def note(
        self, tenant: str, program: Program, usage: Usage, finish: str, chosen: Mapping[str, Any] | None = None
    ) -> None:
        """Note an answer that has ended.

        Args:
            tenant: whose it was.
            program: what answered.
            usage: its tokens.
            finish: why it ended.
            chosen: what a selector told, where one chose.
        """
        with self._lock:
            account = self._accounts.setdefault(tenant, _Account())
            account.requests += 1
            account.ended[finish] += 1
            account.tokens.update(prompt=usage.prompt, completion=usage.completion, cached=usage.cached)
            for name in named(program):
                known = name in account.by_program or len(account.by_program) < MOST
                counts = account.by_program.setdefault(name if known else OTHER, [0, 0])
                counts[0] += 1
                counts[1] += usage.completion
            if chosen is not None and "selector" in chosen:
                account.auto += 1
                account.abstained += bool(chosen.get("abstained"))
                if chosen.get("familiarity") is not None:
                    account.familiar.append(float(chosen["familiarity"]))

    def report(self, tenant: str, visible: Collection[str]) -> dict[str, Any]:
        """Return how a tenant's requests were routed.

        Args:
            tenant: its name.
            visible: the adapters that it may use now; of others only the sum is told.
        """
        with self._lock:
            account = self._accounts.get(tenant, _Account())
            counts: dict[str, list[int]] = {}
            for name, (requests, tokens) in account.by_program.items():
                shown = name if name in visible or name.startswith("(") else OTHER
                total = counts.setdefault(shown, [0, 0])
                total[0] += requests
                total[1] += tokens
            familiar = list(account.familiar)
            told = {"requests": account.requests, "ended": dict(account.ended), "tokens": dict(account.tokens)}
            auto = {"requests": account.auto, "abstained": account.abstained}
        drawn = sum(tokens for _, tokens in counts.values())
        ranked = sorted(counts.items(), key=lambda one: (-one[1][1], one[0]))
        shares = {name: tokens / drawn if drawn else 0.0 for name, (_, tokens) in ranked}
        loads = [{"name": n, "requests": r, "tokens": t, "share": shares[n]} for n, (r, t) in ranked]
        return {
            "since": self.since,
            **told,
            "load": loads,
            "entropy": -sum(share * math.log(share) for share in shares.values() if share) + 0.0,
            "most_entropy": math.log(len(visible) + 1),
            "dead": sorted(name for name in visible if name not in counts),
            "auto": {**auto, "abstain_rate": auto["abstained"] / auto["requests"] if auto["requests"] else None},
            "drift": drift(familiar),
        }


def drift(familiar: list[float]) -> dict[str, Any] | None:
    """Return how far prompts have moved from the examples that adapters were registered with; None without prompts.

    A guard gives every prompt a p-value among the examples. As long as prompts are like these, the part of them with a
    p-value up to p is about p or less, for every p. `distance` is by how much the worst p exceeds that, from 0 to 1
    (the one-sided Kolmogorov-Smirnov statistic); by chance it exceeds `by_chance` one time in twenty.
    """
    if not familiar:
        return None
    count = len(familiar)
    distance = max(0.0, max((rank / count) - p for rank, p in enumerate(sorted(familiar), start=1)))
    return {"distance": distance, "by_chance": math.sqrt(math.log(20) / (2 * count)), "prompts": count}
