"""Feedback: what callers say of their answers, and one bandit per tenant that learns from it which adapter to choose.

Every answer of a tenant can be rewarded once, by its id. Where a selector chose (`model: auto`), the tenant's bandit
drew the adapter with probabilities that are logged, and the reward is what it learns from (molora/prompts/bandit.py);
of other answers the rewards are added up by what answered (2,000 names for a tenant, the rest as `(other)`). No tenant
can reward an answer of another one, and cannot tell one from an answer that never was.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..prompts.bandit import Bandit
from ..prompts.choice import Choice
from ..prompts.events import EventLog
from ..registry import Spec
from .ledger import MOST, OTHER
from .request import ServeError

WAITING = 10_000  # answers of a tenant whose reward may still come
MAX_SHOWN = 120  # characters of an id that an error repeats


@dataclass
class _Tenant:
    """What is known of one tenant's answers."""

    bandit: Bandit
    answers: OrderedDict[str, str] = field(default_factory=OrderedDict)  # that no bandit chose: id -> what answered
    picked: OrderedDict[str, str] = field(default_factory=OrderedDict)  # that it chose
    rewards: dict[str, tuple[int, float]] = field(default_factory=dict)  # what answered -> number, sum
    lock: threading.Lock = field(default_factory=threading.Lock)


class Feedback:
    """The bandits of all tenants; any thread may call any method.

    Args:
        folder: where each tenant's choices and rewards are logged, from which its bandit goes on after a restart; one
            server writes a folder at a time. None: in memory, the latest 10,000 events of each tenant.
        policy: of the bandits, with options; see molora/prompts/policies.py.
        frozen: whether rewards are only logged until `update`; otherwise each acts at once.

    Raises:
        ConfigError: an unknown policy or an option out of its range.
    """

    def __init__(self, folder: str | Path | None = None, policy: Spec = "thompson", frozen: bool = True) -> None:
        self.folder = None if folder is None else Path(folder).expanduser()
        self.policy, self.frozen = policy, frozen
        Bandit(policy)  # options out of range are told now
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"feedback cannot be kept in '{self.folder}': {error.strerror}") from error
        self._tenants: dict[str, _Tenant] = {}
        self._lock = threading.Lock()

    def choose(self, tenant: str, choice: Choice, id: str) -> tuple[Choice, dict[str, Any]]:
        """Let a tenant's bandit choose among what a selector has scored.

        Args:
            tenant: its name.
            choice: of the selector, among what the tenant may use.
            id: of the answer to come.

        Returns:
            The choice with the bandit's adapter in place of the selector's, and what the caller is told of it; the
            choice as it is when the selector abstained.
        """
        pick = self._of(tenant).bandit.pick(choice, id)
        if pick is None:
            return choice, {}
        told = {"probability": pick.probability, "probabilities": dict(pick.probabilities), "version": pick.version}
        if pick.name == choice.names[0] and len(choice.names) == 1:
            return choice, {"bandit": told}
        why = f"{choice.why}; the bandit of this tenant drew '{pick.name}' (probability {pick.probability:.3g})"
        return dataclasses.replace(choice, weights={pick.name: 1.0}, why=why), {"bandit": told}

    def note(self, tenant: str, id: str, program: str, picked: bool) -> None:
        """Remember an answer, so that it can be rewarded.

        Args:
            tenant: whose it is.
            id: of the answer.
            program: what answered, as in `usage`.
            picked: whether the bandit chose it.
        """
        known = self._of(tenant)
        with known.lock:
            found = known.picked if picked else known.answers
            found[id] = program
            while len(found) > WAITING:
                found.popitem(last=False)

    def take(self, tenant: str, response_id: str, reward: float) -> dict[str, Any]:
        """Take the reward of one of a tenant's answers, once.

        Raises:
            ServeError: 400 the reward is not in [0, 1]; 404 the tenant has no such answer that waits for a reward.
        """
        if not 0 <= reward <= 1:
            raise ServeError(f"reward must be from 0 to 1, got {reward}", param="reward")
        known, id = self._of(tenant), response_id.rpartition("-")[2]
        with known.lock:
            program = known.answers.pop(id, None)
        if program is None:
            try:
                known.bandit.feedback(id, reward)
            except ConfigError:
                raise unknown_response(response_id) from None
        with known.lock:
            # after a restart the log still knows the choice, but not in what words it was told
            name = program if program is not None else known.picked.pop(id, "auto")
            if name not in known.rewards and len(known.rewards) >= MOST:
                name = OTHER
            number, total = known.rewards.get(name, (0, 0.0))
            known.rewards[name] = number + 1, total + reward
        told = {"object": "feedback", "response_id": response_id, "reward": reward}
        return {**told, "version": known.bandit.version, "frozen": self.frozen}

    def update(self, tenant: str) -> int:
        """Let a tenant's bandit learn from the rewards so far; returns its version."""
        return self._of(tenant).bandit.update()

    def report(self, tenant: str) -> dict[str, Any]:
        """Return what a tenant's bandit is, and the mean reward of what answered since the server started."""
        known = self._of(tenant)
        with known.lock:
            rewards = sorted(known.rewards.items())
        means = [{"program": name, "rewards": n, "mean": total / n} for name, (n, total) in rewards]
        return {"version": known.bandit.version, "frozen": self.frozen, "programs": means}

    def _of(self, tenant: str) -> _Tenant:
        with self._lock:
            if tenant not in self._tenants:
                log = EventLog(None if self.folder is None else self.folder / f"{tenant}.jsonl")
                self._tenants[tenant] = _Tenant(Bandit(self.policy, tenant=tenant, frozen=self.frozen, log=log))
            return self._tenants[tenant]


def make_feedback(told: bool | str | Mapping[str, Any] | None) -> Feedback | None:
    """Return what the option `feedback` says: a folder, or a mapping of folder, policy and frozen; None for nothing."""
    if told is None or told is False:
        return None
    if told is True:
        return Feedback()
    return Feedback(told) if isinstance(told, str) else Feedback(**told)


def unknown_response(id: str) -> ServeError:
    """Return the answer about an id that is unknown, another tenant's, too old, or was rewarded before."""
    shown = id if len(id) <= MAX_SHOWN else f"{id[:MAX_SHOWN]}..."
    return ServeError(
        f"no answer {shown!r} of yours waits for a reward; it is unknown, too old, or was rewarded before",
        status=404,
        code="response_not_found",
        param="response_id",
    )
