"""Service: a model that tenants may ask. It turns names into gate programs, and accounts for what was used.

The HTTP layer and the replicas of a cluster stand on it; it knows nothing of HTTP. Who may use what is decided here and
in `tenants`, nowhere else.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from ..errors import ConfigError, LoadError
from .accounts import Accounts
from .choosing import choose, program_of
from .engine.programs import Decision
from .feedback import Feedback
from .ledger import Ledger
from .request import Auto, Chunk, Program, Request, Sampling, ServeError, Usage, needs
from .stream import Stream
from .tenants.tenant import EVERYBODY, MAX_SHOWN, Tenant, not_found, resolve

logger = logging.getLogger("molora.serve")


class Service:
    """One engine, its adapters, its tenants.

    Args:
        engine: generates.
        store: the adapters and mixtures.
        name: of the base model, as clients write it.
        tokenizer: of the base model.
        tenants: who may use what; None: everybody may use everything.
        feedback: takes rewards of answers, and lets bandits choose where a selector would; None: nobody asks.
    """

    def __init__(
        self,
        engine: Any,
        store: Any,
        *,
        name: str,
        tokenizer: Any,
        tenants: Any = None,
        feedback: Feedback | None = None,
    ) -> None:
        self.engine, self.store, self.name, self.tokenizer = engine, store, name, tokenizer
        self.tenants, self.feedback = tenants, feedback
        self.ledger = Ledger()
        self.watchers: list[Callable[[Stream, Chunk], None]] = []  # are told of every answer that has ended
        self.started = int(time.time())
        self._accounts = Accounts()

    def close(self, timeout: float = 30.0) -> None:
        """Let running answers end, for at most `timeout` seconds; then write what is owed and stop."""
        self.engine.drain(timeout)
        self.engine.close()
        self._accounts.close()
        if self.tenants is not None:
            self.tenants.close()  # what this server held is free at once, not when its lease ends
        self.store.close()

    # --- who may use what ---------------------------------------------------------------------------------------

    def tenant_of(self, key: str | None) -> Tenant:
        """Return whose key this is; raise ServeError 401 when it is nobody's."""
        if self.tenants is None:
            return EVERYBODY
        tenant = None if key is None else self.tenants.authenticate(key)
        if tenant is None:
            text = "no valid API key was given; send 'Authorization: Bearer KEY' with a key of this server"
            raise ServeError(text, status=401, code="invalid_api_key")
        return tenant

    def is_admin(self, key: str | None) -> bool:
        """Tell whether this is a key of an admin; without tenants everybody is one."""
        return self.tenants is None or (key is not None and self.tenants.is_admin(key))

    def entries(self, tenant: Tenant) -> list[Any]:
        """Return the adapters and mixtures that a tenant may see, by name."""
        return sorted((one for one in self.store.entries() if tenant.may(one.name)), key=lambda one: one.name)

    def entry(self, tenant: Tenant, name: str) -> Any:
        """Return one adapter or mixture; raise ServeError 404, the same for unknown and for forbidden ones."""
        return self.store.entry(resolve(tenant, name, self.store.names))

    def program(
        self,
        tenant: Tenant,
        model: str,
        text: Callable[[], str],
        adapters: Mapping[str, float] | None = None,
        selector: str | None = None,
    ) -> Program:
        """Return the gate program that a request asks for.

        Args:
            tenant: who asks.
            model: the base model's name, that of an adapter or of a mixture, or `auto`.
            text: returns the prompt's text, for `auto`.
            adapters: weights of several adapters; `model` then names the base model.
            selector: which selector `auto` asks.

        Raises:
            ServeError: 404 for names that are unknown or forbidden, 400 for what contradicts itself.
        """
        has_auto = bool(self.engine.selectors)
        return program_of(tenant, self.name, self.store.kinds(), has_auto, model, text, adapters, selector)

    # --- answers ------------------------------------------------------------------------------------------------

    def submit(
        self,
        tenant: Tenant,
        program: Program,
        prompt_ids: list[int],
        sampling: Sampling,
        timeout: float | None = None,
        watcher: Callable[[Decision], None] | None = None,
    ) -> Stream:
        """Admit a request and queue it; what it uses is written to the tenant's account when it ends.

        It may read a database and, for `auto`, wait for a forward of the model: not for the thread of an event loop.

        Args:
            tenant: who asks.
            program: from `program`; of an answer that a selector settled, `stream.request.program` tells by what.
            prompt_ids: tokens of the prompt.
            sampling: how tokens are drawn.
            timeout: in seconds; None: the engine's.
            watcher: see `Engine.submit`.

        Raises:
            ServeError: it is too long, over a limit of the tenant, or the server is full or going down.
        """
        request = Request(prompt_ids, program, sampling, tenant.name, tenant.weight, timeout)
        self.engine.check_open(tenant.name)  # before a selector spends anything on it
        grant = None
        if self.tenants is not None:
            grant = self.tenants.admit(tenant, len(prompt_ids), self.engine.answer_limit(len(prompt_ids), sampling))
        try:
            if isinstance(program, Auto):
                request = self._chosen(tenant, program, request)
            # before the engine has it, since a short answer may end before `submit` returns
            if self.feedback is not None:
                picked = request.chosen is not None and "bandit" in request.chosen
                self.feedback.note(tenant.name, request.id, label(request.program), picked)
            return self.engine.submit(request, when_done=partial(self._ended, grant), watcher=watcher)
        except BaseException:
            if grant is not None:
                self._accounts.later(grant.release)
            raise

    def _chosen(self, tenant: Tenant, auto: Auto, request: Request) -> Request:
        """Return a request with what a selector chose for it, or the tenant's bandit."""
        draw = None if self.feedback is None else partial(self.feedback.choose, tenant.name, id=request.id)
        program, told = choose(tenant, auto, self.engine.selectors, self.store.kinds(), draw)
        return dataclasses.replace(request, program=program, chosen=told)

    def _ended(self, grant: Any, stream: Stream, last: Chunk) -> None:
        """Note an answer that has ended; on the engine's thread, so what takes time is left to another."""
        request, usage = stream.request, last.usage
        if grant is not None:
            # what was never begun costs nothing; what was broken off costs what was read and drawn
            if stream.started is None or usage is None:
                self._accounts.later(grant.release)
            else:
                self._accounts.later(grant.settle, usage.prompt, usage.completion, label(request.program))
        spent = Usage(0, 0) if stream.started is None or usage is None else usage
        self.ledger.note(request.tenant, request.program, spent, last.finish or "error", request.chosen)
        for watcher in self.watchers:
            watcher(stream, last)

    def embed(
        self, tenant: Tenant, program: Program, prompts: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Mapping[str, Any]]:
        """Return unit vectors (N, d) of prompts, and what a selector chose for them; waits for them.

        Raises:
            ServeError: as of `submit`.
        """
        count = sum(len(prompt) for prompt in prompts)
        self.engine.check_open(tenant.name)
        grant = None if self.tenants is None else self.tenants.admit(tenant, count, 0)
        chosen: Mapping[str, Any] = {}
        try:
            if isinstance(program, Auto):
                program, chosen = choose(tenant, program, self.engine.selectors, self.store.kinds())
            made = self.engine.embed(prompts, program, tenant=tenant.name, weight=tenant.weight)
        except BaseException:
            if grant is not None:
                self._accounts.later(grant.release)
            raise
        if grant is not None:
            self._accounts.later(grant.settle, count, 0, label(program))
        self.ledger.note(tenant.name, program, Usage(count, 0), "stop", chosen)
        return made.values, chosen

    # --- what tenants say and are told --------------------------------------------------------------------------

    def take_feedback(self, tenant: Tenant, response_id: str, reward: float) -> dict[str, Any]:
        """Take the reward of one of a tenant's answers; see `Feedback.take`."""
        if self.feedback is None:
            raise ServeError(
                "this server takes no feedback; its operator turns it on with the option feedback", code="feedback_off"
            )
        return self.feedback.take(tenant.name, response_id, reward)

    def learn(self, name: str) -> dict[str, Any]:
        """Let the bandit of a tenant learn from the rewards so far; for admins."""
        if self.feedback is None:
            raise ServeError("this server takes no feedback; start it with the option feedback", code="feedback_off")
        tenant = self._named(name)
        return {"object": "bandit", "tenant": tenant.name, "version": self.feedback.update(tenant.name)}

    def routing(self, key: str | None, name: str) -> dict[str, Any]:
        """Report how a tenant's requests were routed, to itself or to an admin.

        Raises:
            ServeError: 401 the key is nobody's; 404 there is no such tenant, or it is another one.
        """
        if self.is_admin(key):
            tenant = self._named(name)
        else:
            tenant = self.tenant_of(key)
            if tenant.name != name:
                raise no_tenant(name)
        told = {"object": "routing", "tenant": tenant.name}
        told |= self.ledger.report(tenant.name, tenant.visible(sorted(self.store.names)))
        told["feedback"] = None if self.feedback is None else self.feedback.report(tenant.name)
        rows = [] if self.tenants is None else self.tenants.usage(tenant.name)
        names = ("requests", "input_tokens", "output_tokens")
        told["settled"] = {one: sum(getattr(row, one) for row in rows) for one in names} if rows else None
        return told

    def _named(self, name: str) -> Tenant:
        if self.tenants is None:
            if name != EVERYBODY.name:
                raise no_tenant(name)
            return EVERYBODY
        try:
            return self.tenants.get(name)
        except ConfigError:
            raise no_tenant(name) from None

    # --- adapters -----------------------------------------------------------------------------------------------

    def load(self, tenant: Tenant, source: str, name: str | None = None, pinned: bool = False) -> Any:
        """Register an adapter of the library, and begin to load it; returns where it is.

        The tenant must have a right both to what the library calls it and to what it shall be called.

        Raises:
            ServeError: 404 for what the library does not have or the tenant may not use, alike.
        """
        name = source if name is None else name
        if not tenant.may(name):
            raise not_found(name)
        try:
            found = self.store.sources.hub.get(source)
            # the right to an alias is no right to its target
            if not (tenant.may(source) and tenant.may(str(found.ref))):
                raise not_found(source)
            entry = self.store.register(name, source, pinned=pinned)
        except ConfigError as error:
            logger.info("'%s' was not loaded as '%s': %s", source, name, error)
            raise not_found(source) from error
        except LoadError as error:
            raise ServeError(f"'{source}' cannot be served: {error}", 400, "adapter_load_failed") from error
        return entry

    def pin(self, tenant: Tenant, name: str, pinned: bool) -> Any:
        """Keep an adapter in its place, or let it be evicted again; returns where it is."""
        self.store.pin(self.entry(tenant, name).name, pinned)
        return self.store.entry(name)

    def unload(self, tenant: Tenant, name: str) -> None:
        """Forget an adapter; running requests end with it."""
        self.store.unregister(self.entry(tenant, name).name)


def label(program: Program) -> str:
    """Return what a program is called in accounts."""
    return "+".join(needs(program)) or "base"


def no_tenant(name: str) -> ServeError:
    """Return the answer about a tenant that is unknown, or another one than who asks."""
    shown = name if len(name) <= MAX_SHOWN else f"{name[:MAX_SHOWN]}..."
    return ServeError(f"the tenant {shown!r} does not exist or is not yours", 404, "tenant_not_found", "tenant")
