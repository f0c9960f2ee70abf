"""EngineReplica: one engine with its adapters, as Ray Serve runs it. It serves whoever reaches it: rights are checked
at the ingress."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import ConfigError, MoloraError
from ..collecting import keep_what_was_loaded
from ..engine.encode import Encoded
from ..engine.programs import Decision
from ..options import ServeOptions
from ..request import Program, Request, ServeError
from ..start import start
from ..store.catalogue import Change
from .options import ClusterOptions
from .scaling import QUEUED, Work
from .sharing import Sharing

logger = logging.getLogger("molora.serve")


class EngineReplica:
    """An engine that follows a manifest.

    It is made by `start`, as the engine of a single server is, and is ready once its pinned adapters are.

    Args:
        options: of the server; see `ServeOptions.to_dict`.
        name: of the replica; None: Ray Serve's.
        balance: the actor of `Balance`; None: every replica is fair for itself.
    """

    def __init__(self, options: Mapping[str, Any], name: str | None = None, balance: Any = None) -> None:
        alone = {"replicas": 1, "cluster": {}, "tenants": None, "database": None, "feedback": None}
        told = ServeOptions(**options)
        self.options = ClusterOptions.of(told.cluster, told.replicas)
        logging.basicConfig(level=told.log_level.upper())
        self.name = _name() if name is None else name
        self.drain = told.drain
        self._manifest = None if told.manifest is None else Path(told.manifest)
        self._applied = self._wanted()  # read before the adapters are, so that a change meanwhile is seen
        self._service, self._report = start(ServeOptions(**{**options, **alone}))
        self.engine, self.store = self._service.engine, self._service.store
        self._failed: list[Change] = []
        self._changing = threading.Lock()
        self._work = Work()
        self._stop = threading.Event()
        try:
            self._preload()
        except BaseException:
            self._service.close(0.0)
            raise
        self._sharing = None
        if balance is not None:
            self._sharing = Sharing(self.engine.scheduler, self.name, _reporter(balance), self.options.credit)
        keep_what_was_loaded()
        self._beat = threading.Thread(target=self._beat_on, name="molora-replica", daemon=True)
        self._beat.start()

    def __del__(self) -> None:
        """Stop: Ray Serve calls this once the running requests have ended, or their time is over."""
        stop = getattr(self, "_stop", None)
        if stop is not None and not stop.is_set() and hasattr(self, "_beat"):
            stop.set()
            self._beat.join(10.0)
            self._service.close(self.drain)

    # --- requests -------------------------------------------------------------------------------------------------

    async def generate(self, request: Request, watch: bool = False) -> AsyncIterator[tuple[str, Any]]:
        """Run a request.

        Args:
            request: with a program that is settled.
            watch: whether to tell what routers decide.

        Yields:
            ("refused", ServeError), and nothing else; or ("accepted", name of the replica), then ("chunk", (chunk,
            whether it was begun)) until the last one, with ("decision", Decision) before the tokens they are of.
        """
        decisions: deque[Decision] = deque()
        try:
            stream = self.engine.submit(request, watcher=decisions.append if watch else None)
        except ServeError as error:
            yield "refused", error
            return
        self._work.asked(request.id, len(request.prompt_ids), request.sampling.max_tokens)
        drawn = 0
        try:
            yield "accepted", self.name
            async for chunk in stream:
                drawn += len(chunk.tokens)
                self._work.drew(request.id, len(chunk.tokens))
                while decisions:
                    yield "decision", decisions.popleft()
                yield "chunk", (chunk, stream.started is not None)
        finally:
            self._work.ended(request.id, drawn)
            if stream.finished is None:  # the ingress, or its client, has gone
                stream.cancel()

    async def embed(
        self, prompts: Sequence[Sequence[int]], program: Program, options: Mapping[str, Any]
    ) -> Encoded | ServeError:
        """Return what `Engine.embed` returns; its error is returned as well, since it is an answer."""
        try:
            return await asyncio.to_thread(self.engine.embed, prompts, program, **options)
        except ServeError as error:
            return error

    async def select(self, selector: str, prompts: Sequence[str], allowed: Sequence[str]) -> list[Any] | ServeError:
        """Ask a selector; see `PromptSelector.select`."""
        try:
            return await asyncio.to_thread(self.engine.selectors[selector].select, prompts, allowed)
        except ServeError as error:
            return error

    # --- what there is --------------------------------------------------------------------------------------------

    async def facts(self) -> dict[str, Any]:
        """Return what is the same of every replica, and never changes."""
        engine = self.engine
        return {
            "is_pair": engine.is_pair,
            "vocabulary": engine.vocabulary,
            "longest": engine.longest,
            "max_length": engine.max_length,
            "timeout": engine.timeout,
            "selectors": list(engine.selectors),
            "report": self._report,
        }

    async def state(self) -> dict[str, Any]:
        """Return how things stand: adapters, counters, what tenants got."""
        return {
            "replica": self.name,
            "pid": os.getpid(),
            "stats": self.engine.stats(),
            "shares": self.engine.shares(),
            "entries": self.store.entries(),
            "counters": self.store.counters(),
            "manifest": self._applied,
            "failed": self._failed,
            "queued_tokens": self._work.tokens,
        }

    async def check(self, name: str, source: str) -> MoloraError | None:
        """Return why an adapter of the library could not be served; None when nothing is seen against it."""
        try:
            await asyncio.to_thread(self.store.sources.find, name, source)
        except MoloraError as error:
            return error
        return None

    def check_health(self) -> None:
        """Raise when the engine's thread has died; Ray Serve then starts another replica."""
        if not self.engine.stats().healthy:
            raise RuntimeError("the engine does not run any more; the log of this replica says why")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return what Ray Serve scales by; see scaling.py."""
        return {QUEUED: self._work.tokens}

    # --- what there should be -------------------------------------------------------------------------------------

    async def reconcile(self) -> list[Change]:
        """Bring the adapters to what the manifest says now; see `AdapterStore.reconcile`."""
        return await asyncio.to_thread(self._reconcile)

    def _reconcile(self) -> list[Change]:
        if self._manifest is None:
            return []
        with self._changing:
            wanted = self._wanted()
            changes = self.store.reconcile(self._manifest)
            self._applied = wanted
            self._failed = [change for change in changes if change.action == "failed"]
        for change in changes:
            if change.action != "keep":
                logger.info("replica %s: %s '%s': %s", self.name, change.action, change.name, change.why)
        return changes

    def _wanted(self) -> str | None:
        """Return what tells one state of the manifest from others; None without one, or while it cannot be read."""
        try:
            return None if self._manifest is None else hashlib.sha256(self._manifest.read_bytes()).hexdigest()
        except OSError:
            return None

    def _preload(self) -> None:
        """Wait for pinned adapters, those of the manifest as well."""
        end = time.monotonic() + self.options.patience
        while waiting := [e.name for e in self.store.entries() if e.pinned and e.state not in ("ready", "errored")]:
            if time.monotonic() > end:
                raise ConfigError(f"pinned adapters were not ready in {self.options.patience:g} s: {waiting}")
            self._stop.wait(0.02)
        for entry in self.store.entries():
            if entry.pinned and entry.state == "errored":
                logger.error("replica %s: pinned adapter '%s' failed: %s", self.name, entry.name, entry.error)

    def _beat_on(self) -> None:
        """Follow the manifest, and tell what tenants got."""
        is_alone = False
        while not self._stop.wait(self.options.interval):
            try:
                wanted = self._wanted()
                if wanted is not None and wanted != self._applied:
                    self._reconcile()
            except Exception as error:  # the server goes on with what it has
                logger.error("replica %s cannot follow the manifest: %s", self.name, error)
                self._applied = wanted  # until it changes again
            if self._sharing is None:
                continue
            try:
                self._sharing.exchange()
                is_alone = False
            except Exception as error:
                if not is_alone:
                    logger.warning("replica %s is fair for itself only: %s", self.name, type(error).__name__)
                is_alone = True


def _name() -> str:
    from ray import serve

    return serve.get_replica_context().replica_id.unique_id


def _reporter(balance: Any) -> Any:
    """Return what reaches the actor, and gives up soon."""
    import ray

    def report(who: str, got: dict[str, float]) -> tuple[str, dict[str, float]]:
        return ray.get(balance.report.remote(who, got), timeout=5.0)

    return report
