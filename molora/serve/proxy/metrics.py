"""RouteMeter: what a router counts, for Prometheus; of adapters only those chosen most are named."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest
from prometheus_client import Counter as Count
from prometheus_client.core import CounterMetricFamily, Metric

from ..http.metrics import SECONDS
from ..request import ServeError
from .plan import Plan
from .proxy import Proxy

MOST, KEPT = 20, 10_000  # adapters that are named, and that are counted apart
ABSTAINED, OTHER = "(base)", "other"


class RouteMeter:
    """What is counted of one router.

    Args:
        proxy: whose choices are counted.
    """

    def __init__(self, proxy: Proxy) -> None:
        self.registry = CollectorRegistry()
        self.requests = Count("molora_http_requests", "HTTP requests.", ["route", "status"], registry=self.registry)
        self.failures = Count(
            "molora_route_failures", "Requests that the upstream server failed.", ["code"], registry=self.registry
        )
        self.running = Gauge("molora_route_waiting", "Requests that wait for the upstream server.",
                             registry=self.registry)  # fmt: skip
        self.choosing = Histogram(
            "molora_route_choosing_seconds", "Choosing an adapter.", buckets=SECONDS, registry=self.registry
        )
        self._chosen: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.registry.register(self)
        proxy.watchers.append(self.note)

    def note(self, plan: Plan, seconds: float) -> None:
        """Count a choice."""
        self.choosing.observe(seconds)
        with self._lock:
            name = ABSTAINED if plan.told["abstained"] else plan.shown
            self._chosen[name if name in self._chosen or len(self._chosen) < KEPT else OTHER] += 1

    @contextlib.contextmanager
    def forwarding(self) -> Iterator[None]:
        """Count a request that waits, and its failure."""
        with self.running.track_inprogress():
            try:
                yield
            except ServeError as error:
                self.failed(error)
                raise

    def failed(self, error: ServeError) -> None:
        """Count a failure."""
        own = error.code if error.code.startswith("upstream_") else f"status_{error.status}"
        self.failures.labels(own).inc()

    def collect(self) -> Iterator[Metric]:
        """Yield the choices; Prometheus asks for them."""
        with self._lock:
            ranked = sorted(self._chosen.items(), key=lambda one: (-one[1], one[0]))
        family = CounterMetricFamily("molora_route_choices", "Choices of the selector.", labels=["adapter"])
        for name, count in ranked[:MOST]:
            family.add_metric([name], count)
        rest = sum(count for _, count in ranked[MOST:])
        if rest:
            family.add_metric([OTHER], rest)
        yield family

    def text(self) -> bytes:
        """Return the metrics as Prometheus reads them."""
        return generate_latest(self.registry)
