"""Fleet: what the replicas of an engine tell of themselves, together as one."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..engine.fair import Share
from ..engine.stats import Stats
from ..store.resident import Residence

logger = logging.getLogger("molora.serve")
STATES = ("ready", "loading", "queued", "warm", "disk", "errored")  # of one adapter on several replicas: the first
SILENT = 30.0  # seconds without any replica that answers, after which the server is not healthy
ADDED = ("waiting", "running", "started", "tokens_in", "tokens_cached", "tokens_out", "steps", "kv_used")
ADDED += ("kv_capacity", "model_seconds", "engine_seconds")


class Fleet:
    """Asks all replicas how things stand, again and again, on a thread of its own.

    Args:
        handle: of the engine deployment.
        interval: seconds between two rounds.
        timeout: seconds after which a replica that does not answer is left out of a round.
    """

    def __init__(self, handle: Any, interval: float, timeout: float = 10.0) -> None:
        self._handle, self._interval, self._timeout = handle, interval, timeout
        self._lock, self._stop = threading.Lock(), threading.Event()
        self.states: list[dict[str, Any]] = []
        self._entries: list[Residence] = []
        self._heard = time.monotonic()
        self._thread = threading.Thread(target=self._go_on, name="molora-fleet", daemon=True)

    def start(self) -> None:
        """Ask for the first time, and go on."""
        self.refresh()
        self._thread.start()

    def close(self) -> None:
        """Stop asking."""
        self._stop.set()

    def all(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every replica; returns what those returned that could."""
        with self._lock:  # broadcasts are for few callers
            answers = self._handle.broadcast(method, *args).results(timeout_s=self._timeout, return_exceptions=True)
        lost = [answer for answer in answers if isinstance(answer, BaseException)]
        if lost:
            logger.warning("%d of %d replicas did not answer: %s", len(lost), len(answers), type(lost[0]).__name__)
        return [answer for answer in answers if not isinstance(answer, BaseException)]

    def refresh(self) -> None:
        """Ask all replicas now."""
        found = self.all("state")
        if found:  # otherwise all are lost for the moment, and what they had will be there again
            self.states, self._entries, self._heard = (
                found,
                together([one["entries"] for one in found]),
                time.monotonic(),
            )

    def _go_on(self) -> None:
        while not self._stop.wait(self._interval):
            try:
                self.refresh()
            except Exception as error:
                logger.warning("the replicas cannot be asked: %s", type(error).__name__)

    # --- together -------------------------------------------------------------------------------------------------

    def stats(self, draining: bool) -> Stats:
        """Return the numbers of all replicas, added up."""
        every: list[Stats] = [state["stats"] for state in self.states]
        added: dict[str, Any] = {name: sum(getattr(one, name) for one in every) for name in ADDED}
        counted = {
            name: dict(sum((Counter(getattr(one, name)) for one in every), Counter()))
            for name in ("ended", "batch", "by_tenant", "by_adapter")
        }
        return Stats(
            healthy=time.monotonic() - self._heard < SILENT and any(one.healthy for one in every),
            draining=draining,
            backends=tuple(sorted({name for one in every for name in one.backends})),
            **added,
            **counted,
        )

    def shares(self) -> dict[str, Share]:
        """Return what each tenant got from all replicas."""
        found: dict[str, Share] = {}
        for state in self.states:
            for name, one in state["shares"].items():
                so_far = found.get(name)
                found[name] = one if so_far is None else _added(so_far, one)
        return found

    def entries(self) -> list[Residence]:
        """Return the adapters that every replica knows; so one is offered when it can be had everywhere."""
        return self._entries

    def counters(self) -> dict[str, float]:
        """Return the counters of all stores, added up."""
        return dict(sum((Counter(state["counters"]) for state in self.states), Counter()))


def together(replicas: Sequence[Sequence[Residence]]) -> list[Residence]:
    """Return the adapters that all replicas have, each told once: where it stands best, and all that use it."""
    by_name: list[Mapping[str, Residence]] = [{one.name: one for one in entries} for entries in replicas]
    found = []
    for name in by_name[0] if by_name else ():
        every = [entries[name] for entries in by_name if name in entries]
        if len(every) == len(by_name):
            best = min(every, key=lambda one: STATES.index(one.state))
            found.append(
                dataclasses.replace(
                    best,
                    in_use=sum(one.in_use for one in every),
                    waiting=sum(one.waiting for one in every),
                    digest=next((one.digest for one in every if one.digest is not None), None),
                    error=next((one.error for one in every if one.error is not None), None),
                )
            )
    return found


def _added(one: Share, other: Share) -> Share:
    return Share(
        other.weight,
        one.counter + other.counter,
        one.input + other.input,
        one.output + other.output,
        one.waiting + other.waiting,
    )
