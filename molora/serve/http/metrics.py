"""/metrics for Prometheus, /healthz and /readyz.

Labels are bounded: of adapters and tenants only those that have used most are named, the rest is `other`, so that a
thousand adapters cost a scrape no more than twenty.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
from prometheus_client import Counter as Count
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ..request import Chunk, ServeError
from ..service import Service
from ..stream import Stream
from .caller import Key, Served
from .described import ERRORS, HEALTH, READY

router = APIRouter(tags=["operation"])
MOST = 20  # adapters, and tenants, that metrics name
OTHER = "other"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Meter:
    """What is counted of one server; read by Prometheus.

    Args:
        service: whose engine and store are read at each scrape.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self.registry = CollectorRegistry()
        self.requests = Count("molora_http_requests", "HTTP requests.", ["route", "status"], registry=self.registry)
        self.answers = Count("molora_answers", "Answers by how they ended.", ["finish"], registry=self.registry)
        self.first = Histogram(
            "molora_first_token_seconds", "From submission to the first token.", buckets=SECONDS, registry=self.registry
        )
        self.each = Histogram(
            "molora_token_seconds", "Mean time between tokens of an answer.", buckets=SECONDS, registry=self.registry
        )
        self.whole = Histogram("molora_answer_seconds", "Whole answers.", buckets=SECONDS, registry=self.registry)
        self.registry.register(_Readings(service))
        service.watchers.append(self.note)

    def note(self, stream: Stream, last: Chunk) -> None:
        """Count an answer that has ended."""
        self.answers.labels(last.finish or "error").inc()
        end = stream.finished or time.monotonic()
        self.whole.observe(end - stream.submitted)
        if stream.first_token is not None:
            self.first.observe(stream.first_token - stream.submitted)
            tokens = last.usage.completion if last.usage is not None else 0
            if tokens > 1:
                self.each.observe((end - stream.first_token) / (tokens - 1))

    def text(self) -> bytes:
        """Return the metrics as Prometheus reads them."""
        return generate_latest(self.registry)


class _Readings:
    """What is read at a scrape, rather than counted on the way."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        stats = self.service.engine.stats()
        for name, value, text in (
            ("waiting", stats.waiting, "Requests that wait."),
            ("running", stats.running, "Requests in the batch."),
            ("kv_tokens_used", stats.kv_used, "Tokens of keys and values that are taken or reserved."),
            ("kv_tokens_capacity", stats.kv_capacity, "Tokens of keys and values that there is room for."),
            ("healthy", int(stats.healthy), "1 while the engine runs."),
        ):
            yield GaugeMetricFamily(f"molora_{name}", text, value=value)
        for name, value, text in (
            ("prompt_tokens", stats.tokens_in, "Tokens of prompts that were read."),
            ("cached_tokens", stats.tokens_cached, "Tokens of prompts that the prefix cache had."),
            ("answer_tokens", stats.tokens_out, "Tokens that were drawn."),
            ("steps", stats.steps, "Forwards of the model."),
            ("model_seconds", stats.model_seconds, "CPU seconds of the engine's thread inside of the model."),
            ("engine_seconds", stats.engine_seconds, "CPU seconds of the engine's thread."),
        ):
            yield CounterMetricFamily(f"molora_{name}", text, value=value)
        yield _top("molora_adapter_tokens", "Tokens drawn with each adapter.", "adapter", stats.by_adapter)
        yield _top("molora_tenant_tokens", "Tokens read and drawn for each tenant.", "tenant", stats.by_tenant)
        entries = self.service.store.entries()
        states = GaugeMetricFamily("molora_adapters", "Adapters by where they are.", labels=["state"])
        counts = Counter(entry.state for entry in entries)
        for state in ("disk", "queued", "loading", "warm", "ready", "errored"):
            states.add_metric([state], counts[state])
        yield states
        for name, value in self.service.store.counters().items():
            yield CounterMetricFamily(f"molora_adapter_{name}", f"Adapter {name.replace('_', ' ')}.", value=value)


def _top(name: str, text: str, label: str, counts: Any) -> GaugeMetricFamily:
    """Return a metric that names the largest counts, and adds the others up."""
    # a gauge, since `other` falls when one of the others comes to be named
    family = GaugeMetricFamily(name, text, labels=[label])
    ranked: list[tuple[str, float]] = sorted(counts.items(), key=lambda one: (-one[1], one[0]))
    for key, value in ranked[:MOST]:
        family.add_metric([key], value)
    family.add_metric([OTHER], sum(value for _, value in ranked[MOST:]))
    return family


class Watch:
    """ASGI middleware that counts requests by route and status."""

    def __init__(self, app: Any, meter: Meter) -> None:
        self.app, self.meter = app, meter

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, and note its status."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 500

        async def sending(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, sending)
        finally:
            # the pattern, not the path: paths are endless
            route = getattr(scope.get("route"), "path", "(none)")
            self.meter.requests.labels(route, str(status)).inc()


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {CONTENT_TYPE_LATEST.partition(";")[0]: {"schema": {"type": "string"}}}}, **ERRORS},
)
def metrics(request: Request, service: Served, key: Key) -> Response:
    """Return the metrics of this server for Prometheus; they name tenants and adapters, so an admin key is needed."""
    if not (request.app.state.open_metrics or service.is_admin(None if key is None else key.credentials)):
        raise ServeError(
            "metrics name tenants and adapters, so an admin key is needed; or start with open_metrics: true",
            status=401,
            code="invalid_api_key",
        )
    return Response(request.app.state.meter.text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/healthz", responses=HEALTH)
def health(service: Served) -> JSONResponse:
    """Tell whether the engine runs; restart the server when it does not."""
    healthy = service.engine.stats().healthy
    return JSONResponse({"healthy": healthy}, status_code=200 if healthy else 503)


@router.get("/readyz", responses=READY)
def ready(service: Served) -> JSONResponse:
    """Tell whether requests should be sent here: not while starting, draining, or waiting for pinned adapters."""
    stats = service.engine.stats()
    waiting = sorted(_names(e for e in service.store.entries() if e.pinned and e.state not in ("ready", "errored")))
    is_ready = stats.healthy and not stats.draining and not waiting
    told = {"ready": is_ready, "draining": stats.draining, "waiting_for": len(waiting)}
    return JSONResponse(told, status_code=200 if is_ready else 503)


def _names(entries: Iterable[Any]) -> list[str]:
    return [entry.name for entry in entries]
