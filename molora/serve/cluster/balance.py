"""Balance: what tenants got from each replica, so that all of them together are fair and not each for itself.

The actor that holds it runs without molora (its class is sent to it whole), so it is up again at once. What replicas
tell it is cumulative: a report that is lost or comes twice changes nothing, and an actor that was lost has its counters
again after one round of reports, from then on. While it is away every replica is fair for itself.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable

FORGET = 60.0  # seconds after which a silent replica's counters are only kept as a sum


class Balance:
    """Adds up what tenants got.

    Args:
        clock: seconds, for when replicas are forgotten.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.epoch = secrets.token_hex(8)
        self._clock = clock
        self._first: dict[str, dict[str, float]] = {}  # by replica: when it was first heard of
        self._last: dict[str, dict[str, float]] = {}  # and now
        self._heard: dict[str, float] = {}
        self._gone: dict[str, float] = {}  # of replicas that are forgotten

    def report(self, who: str, got: dict[str, float]) -> tuple[str, dict[str, float]]:
        """Take what tenants got from a replica since it started.

        Returns:
            The epoch, which changes when counters start anew; and what tenants got elsewhere in this epoch.
        """
        now = self._clock()
        self._first.setdefault(who, dict(got))
        self._last[who], self._heard[who] = dict(got), now
        for name in [name for name, heard in self._heard.items() if now - heard > FORGET]:
            for tenant, service in self._of(name).items():
                self._gone[tenant] = self._gone.get(tenant, 0.0) + service
            del self._first[name], self._last[name], self._heard[name]
        elsewhere = dict(self._gone)
        for name in self._last:
            if name != who:
                for tenant, service in self._of(name).items():
                    elsewhere[tenant] = elsewhere.get(tenant, 0.0) + service
        return self.epoch, elsewhere

    def totals(self) -> dict[str, float]:
        """Return what tenants got from all replicas in this epoch."""
        totals = dict(self._gone)
        for name in self._last:
            for tenant, service in self._of(name).items():
                totals[tenant] = totals.get(tenant, 0.0) + service
        return totals

    def _of(self, name: str) -> dict[str, float]:
        first = self._first[name]
        return {tenant: service - first.get(tenant, 0.0) for tenant, service in self._last[name].items()}
