"""Service: a model that tenants may ask. It turns names into gate programs, and accounts for what was used.

The HTTP layer and the replicas of a cluster stand on it; it knows nothing of HTTP. Who may use what is decided here and
in `tenants`, nowhere else.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from torch import Tensor

from ..errors import ConfigError, LoadError
from .request import Auto, Base, Chunk, Mixture, Program, Request, Sampling, ServeError, Stream, Weighted, needs
from .tenants.tenant import EVERYBODY, Tenant, not_found, resolve

logger = logging.getLogger("molora.serve")
AUTO = "auto"


class Service:
    """One engine, its adapters, its tenants.

    Args:
        engine: generates.
        store: the adapters and mixtures.
        name: of the base model, as clients write it.
        tokenizer: of the base model.
        tenants: who may use what; None: everybody may use everything.
        feedback: told what became of answers (see `feedback.py`); None: nobody asks.
    """

    def __init__(
        self,
        engine: Any,
        store: Any,
        *,
        name: str,
        tokenizer: Any,
        tenants: Any = None,
        feedback: Any = None,
    ) -> None:
        self.engine, self.store, self.name, self.tokenizer = engine, store, name, tokenizer
        self.tenants, self.feedback = tenants, feedback
        self.watchers: list[Callable[[Stream, Chunk], None]] = []  # are told of every answer that has ended
        self.started = int(time.time())
        # accounts are written beside the engine's thread, in the order in which answers end
        self._accounts = ThreadPoolExecutor(1, thread_name_prefix="molora-accounts")

    def close(self, timeout: float = 30.0) -> None:
        """Let running answers end, for at most `timeout` seconds; then write what is owed and stop."""
        self.engine.drain(timeout)
        self.engine.close()
        self._accounts.shutdown(wait=True)
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
            raise ServeError(
                "no valid API key was given; send 'Authorization: Bearer KEY' with a key of this server",
                status=401,
                code="invalid_api_key",
            )
        return tenant

    def entries(self, tenant: Tenant) -> list[Any]:
        """Return the adapters and mixtures that a tenant may see, by name."""
        return sorted((one for one in self.store.entries() if tenant.may(one.name)), key=lambda one: one.name)

    def entry(self, tenant: Tenant, name: str) -> Any:
        """Return one adapter or mixture; raise ServeError 404, the same for unknown and for forbidden ones."""
        known = {one.name: one for one in self.store.entries()}
        return known[resolve(tenant, name, frozenset(known))]

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
        if selector is not None and model != AUTO:
            raise ServeError("a selector chooses only when model is 'auto'", param="molora.selector")
        known = {one.name: one for one in self.store.entries()}
        names = frozenset(known)
        if adapters is not None:
            if model != self.name:
                raise ServeError(f"weighted adapters need model '{self.name}', the base model", param="model")
            chosen = []
            for name, weight in adapters.items():
                if known[resolve(tenant, name, names)].kind == "mixture":
                    raise ServeError(f"'{name}' is a routed mixture, which has no weight; name it as model")
                if not -100 <= weight <= 100:
                    raise ServeError(f"the weight of '{name}' must be from -100 to 100, got {weight}")
                chosen.append((name, float(weight)))
            return Weighted(tuple(chosen))
        # an adapter of this name that the caller may not use must not change the answer
        if model == AUTO and not (AUTO in names and tenant.may(AUTO)):
            return self._auto(tenant, text(), selector, names)
        name = resolve(tenant, model, names, base=(self.name,))
        if name == self.name:  # whatever else has this name: the right to the base is no right to an adapter
            return Base()
        return Mixture(name) if known[name].kind == "mixture" else Weighted(((name, 1.0),))

    def _auto(self, tenant: Tenant, text: str, selector: str | None, names: frozenset[str]) -> Auto:
        if not self.engine.selectors:
            raise not_found(AUTO)
        return Auto(text, frozenset(tenant.visible(sorted(names))), selector)

    # --- answers ------------------------------------------------------------------------------------------------

    def submit(
        self,
        tenant: Tenant,
        program: Program,
        prompt_ids: list[int],
        sampling: Sampling,
        timeout: float | None = None,
    ) -> Stream:
        """Admit a request and queue it; what it uses is written to the tenant's account when it ends.

        Raises:
            ServeError: it is too long, over a limit of the tenant, or the server is full or going down.
        """
        request = Request(prompt_ids, program, sampling, tenant.name, tenant.weight, timeout)
        grant = None
        if self.tenants is not None:
            grant = self.tenants.admit(tenant, len(prompt_ids), self.engine.answer_limit(len(prompt_ids), sampling))
        try:
            return self.engine.submit(request, when_done=partial(self._ended, grant))
        except BaseException:
            if grant is not None:
                self._accounts.submit(self._settle, grant, None, program)
            raise

    def _ended(self, grant: Any, stream: Stream, last: Chunk) -> None:
        """Note an answer that has ended; on the engine's thread, so what takes time is left to another."""
        if grant is not None:
            self._accounts.submit(self._settle, grant, last, stream.request.program)
        for watcher in self.watchers:
            watcher(stream, last)

    def _settle(self, grant: Any, last: Chunk | None, program: Program) -> None:
        try:
            if last is None or last.usage is None:
                grant.release()
            else:
                grant.settle(last.usage.prompt, last.usage.completion, "+".join(needs(program)) or "base")
        except Exception:  # the answer is out; the account must not take the server down
            logger.exception("an account could not be written")

    def embed(
        self, tenant: Tenant, program: Program, prompts: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Mapping[str, Any]]:
        """Return unit vectors (N, d) of prompts, and what a selector chose for them.

        Raises:
            ServeError: as of `submit`.
        """
        count = sum(len(prompt) for prompt in prompts)
        grant = None if self.tenants is None else self.tenants.admit(tenant, count, 0)
        try:
            made = self.engine.embed(prompts, program, tenant=tenant.name, weight=tenant.weight)
        except BaseException:
            if grant is not None:
                self._accounts.submit(grant.release)
            raise
        if grant is not None:
            self._accounts.submit(grant.settle, count, 0, "+".join(needs(program)) or "base")
        return made.values, dict(made.chosen or {})

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
        if not tenant.may(source):
            raise not_found(source)
        try:
            entry = self.store.register(name, source, pinned=pinned)
        except ConfigError as error:
            logger.info("'%s' was not loaded as '%s': %s", source, name, error)
            raise not_found(source) from error
        except LoadError as error:
            raise ServeError(f"'{source}' cannot be served: {error}", 400, "adapter_load_failed") from error
        return entry

    def pin(self, tenant: Tenant, name: str, pinned: bool) -> Any:
        """Keep an adapter in its place, or let it be evicted again; returns where it is."""
        found = self.entry(tenant, name)
        self.store.pin(found.name, pinned)
        return self.store.entry(found.name)

    def unload(self, tenant: Tenant, name: str) -> None:
        """Forget an adapter; running requests end with it."""
        self.store.unregister(self.entry(tenant, name).name)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, as the tokenizer makes them."""
        return self.tokenizer(text).input_ids

    def chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> list[int]:
        """Return the tokens of a chat by the model's template; without one, the messages line by line."""
        if self.tokenizer.chat_template is None:
            lines = [f"{message['role']}: {message['content']}" for message in messages]
            return self.encode("\n".join([*lines, *(["assistant:"] if add_generation_prompt else [])]))
        try:
            out = self.tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=True
            )
        except Exception as error:  # templates raise whatever they like
            raise ServeError(
                f"the chat template of the model refuses these messages: {error}", param="messages"
            ) from error
        return list(out["input_ids"])
