"""Sharing: tells the Balance what tenants got here, and holds back here those that got more elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Report = Callable[[str, dict[str, float]], tuple[str, dict[str, float]]]


class Sharing:
    """One replica's side of a Balance.

    Args:
        scheduler: of the replica's engine.
        name: of the replica.
        report: reaches the Balance; it may fail, and then this replica is fair for itself.
        credit: tokens by which a tenant is held back at most.
    """

    def __init__(self, scheduler: Any, name: str, report: Report, credit: float) -> None:
        self.scheduler, self.name, self.report, self.credit = scheduler, name, report, credit
        self._epoch = ""
        self._known: dict[str, float] = {}

    def exchange(self) -> None:
        """Report, and charge what tenants that wait here got elsewhere since the last time."""
        shares, price = self.scheduler.shares(), self.scheduler
        got = {name: price.w_in * one.input + price.w_out * one.output for name, one in shares.items()}
        epoch, elsewhere = self.report(self.name, got)
        known, self._known = self._known, elsewhere
        if epoch != self._epoch:  # its counters start anew, so there is nothing to compare with
            self._epoch = epoch
            return
        for tenant, service in elsewhere.items():
            more = service - known.get(tenant, 0.0)
            if more > 0:
                self.scheduler.charge_elsewhere(tenant, more, self.credit)
