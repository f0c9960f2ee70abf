"""Ingress: the HTTP side of a cluster. Keys, rights and quotas are checked here, and answers are written down here."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError
from ..feedback import make_feedback
from ..http import create_app
from ..options import ServeOptions
from ..service import Service
from ..start import open_tenants, tokenizer_of
from .desired import RemoteStore
from .fleet import Fleet
from .options import ClusterOptions
from .remote import RemoteEngine

logger = logging.getLogger("molora.serve")


class Ingress:
    """A Service whose engine and store are those of the replicas, as an ASGI application for Ray Serve.

    Args:
        options: of the server; see `ServeOptions.to_dict`.
        engines: handle of the engine deployment.
    """

    async def __init__(self, options: Mapping[str, Any], engines: Any) -> None:
        self.options = ServeOptions(**options)
        logging.basicConfig(level=self.options.log_level.upper())
        self.service = await asyncio.to_thread(service_of, self.options, engines)

    def __serve_build_asgi_app__(self) -> Any:
        """Return the application; it closes the service when Ray Serve ends it."""
        options = self.options
        return create_app(
            self.service,
            drain=options.drain,
            max_body=int(options.max_body),
            docs=options.docs,
            open_metrics=options.open_metrics,
        )

    async def check_health(self) -> None:
        """Nothing to check: it lives as long as it answers."""


def service_of(options: ServeOptions, engines: Any) -> Service:
    """Return a service on the replicas behind a handle, once one of them is ready.

    Raises:
        ConfigError: no replica gets ready.
    """
    told = ClusterOptions.of(options.cluster, options.replicas)
    tenants, _ = open_tenants(options)
    try:
        facts = engines.facts.remote().result(timeout_s=told.patience)
    except TimeoutError as error:
        raise ConfigError(f"no replica was ready in {told.patience:g} s; their logs say why") from error
    fleet = Fleet(engines, told.interval)
    end = time.monotonic() + told.patience
    while not fleet.states and time.monotonic() < end:
        fleet.refresh()
    fleet.start()
    engine = RemoteEngine(engines, fleet, facts)
    store = RemoteStore(engines, fleet, options.manifest, options.hub)
    return Service(
        engine,
        store,
        name=str(options.name),
        tokenizer=tokenizer_of(options),
        tenants=tenants,
        feedback=make_feedback(options.feedback),
    )
