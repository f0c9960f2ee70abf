"""Bandit: learns from rewards which adapter to choose for whom; one per tenant, frozen unless told otherwise.

    bandit = Bandit("thompson", tenant="acme", log=EventLog("acme.jsonl"))
    pick = bandit.pick(selector.select([prompt], allowed)[0], response_id)    # pick.name answers
    bandit.feedback(response_id, 1.0)                                         # POST /v1/feedback
    bandit.update()                                                           # version 1: learns what came in so far

The selector's first choice is the situation, and beliefs are kept per situation and adapter: "for what looks like
sports, this tenant is better served by `news`". Every choice is logged with the probabilities it was drawn with. While
frozen, rewards are logged and change nothing until `update`; otherwise each acts at once. The log is all there is to
save: a bandit that is built on it continues where the last one stopped.

In memory is one belief for each situation and adapter, however many rewards came in, one more of those that wait for
`update`, and the latest choices. A log without a file keeps its latest events only (events.py): it is enough to look
back, not to continue from.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, LoadError
from ..registry import Spec
from .choice import Choice
from .events import EventLog
from .offpolicy import Round, Target
from .policies import Belief, Policy
from .registry import policies

WAITING = 10_000  # choices whose reward may still come
ARMS = 8


@dataclass(frozen=True)
class Pick:
    """What a bandit chose.

    Attributes:
        name: the adapter.
        probability: it was drawn with.
        probabilities: of all that could be drawn.
        situation: the selector's first choice.
        version: of the bandit.
    """

    name: str
    probability: float
    probabilities: Mapping[str, float]
    situation: str
    version: int


class Bandit:
    """Chooses adapters for one tenant and learns from rewards.

    Args:
        policy: of the registry `bandit policy`: `thompson` or `softmax`, with options.
        tenant: whose it is.
        frozen: whether rewards wait for `update`.
        seed: with the response id it decides every draw.
        log: where events go, and what it continues from; None: a new one in memory.
        arms: it chooses among so many adapters of the largest shares, not among all of a large library.
        waiting: how many of the latest choices can still be rewarded.

    Raises:
        ConfigError: an unknown policy or an option out of its range.
        LoadError: the log is damaged, or of another tenant.
    """

    def __init__(
        self,
        policy: Spec = "thompson",
        *,
        tenant: str = "default",
        frozen: bool = True,
        seed: int = 0,
        log: EventLog | None = None,
        arms: int = ARMS,
        waiting: int = WAITING,
    ) -> None:
        if arms < 1 or waiting < 1:
            raise ConfigError(f"a bandit needs arms and waiting of at least 1, got {arms} and {waiting}")
        self.policy: Policy = policies.build(policy)
        self.tenant, self.frozen, self.seed = tenant, frozen, seed
        self.arms, self.waiting = arms, waiting
        self.log = EventLog() if log is None else log
        self.version = 0
        self.beliefs: dict[str, dict[str, Belief]] = {}
        self._open: OrderedDict[str, tuple[str, str]] = OrderedDict()  # response id -> situation, name
        self._coming: dict[tuple[str, str], Belief] = {}  # with the rewards that no version has learned from
        self._lock = threading.Lock()
        self._replay()

    # --- choosing -----------------------------------------------------------------------------------------------------

    def pick(self, choice: Choice, response_id: str) -> Pick | None:
        """Choose one of the adapters that a selector has scored, and log it; None when the selector abstained.

        Raises:
            ConfigError: the response id was used before.
        """
        if choice.abstained or not choice.probabilities:
            return None
        situation = choice.names[0]
        with self._lock:
            if response_id in self._open:
                raise ConfigError(f"response '{response_id}' was chosen for before; ids are used once")
            prior = self._prior(choice)
            found = self.policy.probabilities(prior, self.beliefs.get(situation, {}))
            name = self._draw(found, response_id)
            pick = Pick(name, found[name], found, situation, self.version)
            event = {"event": "pick", "tenant": self.tenant, "id": response_id, "situation": situation, "name": name}
            event |= {"probabilities": found, "prior": prior, "version": self.version}
            self.log.append(event | {"selector": choice.version})
            self._remember(response_id, situation, name)
        return pick

    def _prior(self, choice: Choice) -> dict[str, float]:
        best = sorted(choice.probabilities.items(), key=lambda pair: (-pair[1], pair[0]))[: self.arms]
        total = sum(share for _, share in best)
        return {name: share / total for name, share in sorted(best)}

    def _draw(self, probabilities: Mapping[str, float], response_id: str) -> str:
        """Draw by a hash of seed, tenant and response id: the same again, and no state to keep."""
        text = f"{self.seed}\0{self.tenant}\0{response_id}".encode()
        at = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") / 2**64
        names = [name for name, probability in probabilities.items() if probability > 0]
        for name in names:
            at -= probabilities[name]
            if at < 0:
                return name
        return names[-1]

    def _remember(self, response_id: str, situation: str, name: str) -> None:
        self._open[response_id] = (situation, name)
        self._forget()

    def _forget(self) -> None:
        while len(self._open) > self.waiting:
            self._open.popitem(last=False)

    # --- learning -----------------------------------------------------------------------------------------------------

    def feedback(self, response_id: str, reward: float) -> None:
        """Take the reward of a response, once.

        Raises:
            ConfigError: the reward is not in [0, 1], or this tenant has no such response that waits for one.
        """
        if isinstance(reward, bool) or not isinstance(reward, (int, float)) or not math.isfinite(reward):
            raise ConfigError(f"reward must be a number in [0, 1], got {reward!r:.60}")
        if not 0 <= reward <= 1:
            raise ConfigError(f"reward must be in [0, 1], got {reward}")
        with self._lock:
            if response_id not in self._open:
                raise ConfigError(f"no response '{response_id}' waits for a reward; it is unknown, old, or rewarded")
            self.log.append({"event": "reward", "id": response_id, "reward": float(reward)})
            self._reward(response_id, float(reward))
            if not self.frozen:
                self._learn()

    def update(self) -> int:
        """Learn from the rewards that came in since the last version; returns the version, new if there were any."""
        with self._lock:
            if self._coming:
                self._learn()
            return self.version

    def _reward(self, response_id: str, reward: float) -> None:
        situation, name = self._open.pop(response_id)
        known = self._coming.get((situation, name)) or self.beliefs.get(situation, {}).get(name, Belief())
        self._coming[situation, name] = known.plus(reward)

    def _learn(self) -> None:
        """Make the next version; it is logged, so that a restart stops at the same one."""
        self.log.append({"event": "version", "version": self.version + 1})
        self._advance()

    def _advance(self) -> None:
        beliefs = {situation: dict(known) for situation, known in self.beliefs.items()}
        for (situation, name), belief in self._coming.items():
            beliefs.setdefault(situation, {})[name] = belief
        self.beliefs, self._coming, self.version = beliefs, {}, self.version + 1

    def _replay(self) -> None:
        for event in self.log:
            try:
                self._take(event)
            except (KeyError, TypeError, AttributeError) as error:
                raise LoadError(f"the log of tenant '{self.tenant}' holds an event that is none: {error!r}") from None
        self._forget()

    def _take(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "pick":
            if event["tenant"] != self.tenant:
                raise LoadError(f"this is the log of tenant '{event['tenant']}', not of '{self.tenant}'")
            self._open[event["id"]] = (event["situation"], event["name"])
        elif event["event"] == "reward":
            self._reward(event["id"], float(event["reward"]))
        elif event["event"] == "version":
            self._advance()

    # --- looking back -------------------------------------------------------------------------------------------------

    def target(self) -> Target:
        """Return this version of the policy, for a log to be asked about: `ips(rounds(log), bandit.target())`."""
        beliefs = self.beliefs

        def probabilities(one: Round) -> dict[str, float]:
            return self.policy.probabilities(one.prior, beliefs.get(one.situation, {}))

        return probabilities
