"""Proxy: picks the adapter of a request for a server that cannot, and decides who may ask for which.

It knows nothing of HTTP's side towards clients (proxy_app.py). What is checked is what is sent: a request is read,
checked and written anew, so that no other reading of the same bytes can ask for another adapter.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..request import ServeError
from ..tenants.tenant import EVERYBODY, Tenant, not_found
from .options import ADAPTER, TENANT
from .plan import MAX_MODEL, Plan, check_body
from .text import Kind, answer_bound, prompt_tokens, text_of

logger = logging.getLogger("molora.serve")
AUTO = "auto"
WAITING = 10_000  # answers whose upstream id is remembered, for feedback
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/@-]{0,127}")


class Proxy:
    """Decides which model of the upstream server answers a request.

    Args:
        upstream: where models are.
        selector: reads prompts; None: `auto` is unknown.
        bases: what the upstream server calls its base model; empty: the first that it lists without a parent.
        names: adapter -> what the upstream server calls it.
        pattern: what it calls the others.
        tenants: who may use what; None: everybody may use everything.
        feedback: the bandits (feedback.py); None: the selector's word counts.
        answer_tokens: reserved for answers of unknown length.
    """

    def __init__(
        self,
        upstream: Any,
        *,
        selector: Any = None,
        bases: Sequence[str] = (),
        names: Mapping[str, str] | None = None,
        pattern: str = ADAPTER,
        tenants: Any = None,
        feedback: Any = None,
        answer_tokens: int = 1024,
    ) -> None:
        if tenants is not None and not bases:
            raise ValueError("rights hang on what the base model is called: give bases")
        self.upstream, self.selector, self.bases = upstream, selector, tuple(bases)
        self.names, self.pattern, self.tenants, self.feedback = dict(names or {}), pattern, tenants, feedback
        self.answer_tokens = answer_tokens
        self.watchers: list[Callable[[Plan, float], None]] = []  # are told of every choice, and its seconds
        self._ids: OrderedDict[tuple[str, str], str] = OrderedDict()
        self._accounts = ThreadPoolExecutor(1, thread_name_prefix="molora-accounts")

    async def close(self) -> None:
        """Write what is owed and close connections."""
        await self.upstream.close()
        self._accounts.shutdown(wait=True)
        if self.tenants is not None:
            self.tenants.close()

    # --- who may use what ---------------------------------------------------------------------------------------------

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

    def is_admin(self, key: str | None) -> bool:
        """Whether this key is an admin's; without tenants everybody is one."""
        return self.tenants is None or (key is not None and self.tenants.is_admin(key))

    def target(self, tenant: Tenant, name: str) -> str:
        """Return what the upstream server calls a model that a client names.

        Whether the upstream server has it is not asked, so that a name which the caller may not use is answered alike
        whether it exists or not.

        Raises:
            ServeError: 404, the caller may not use it.
        """
        if name in self.bases:
            if tenant.base:
                return name
            raise not_found(name)
        # what has a name here is reached by that name alone, or a right to one name would be one to another
        if name not in self.names and name in self.names.values():
            raise not_found(name)
        if self.tenants is not None:
            is_plain = _NAME.fullmatch(name) and not re.search(r"\.\.|//|/$", name)
            if not is_plain or not tenant.may(name):
                raise not_found(name)
        return self.called(tenant, name)

    def called(self, tenant: Tenant, adapter: str) -> str:
        """Return what the upstream server calls an adapter."""
        known = self.names.get(adapter)
        return known if known is not None else self.pattern.replace(TENANT, tenant.name).replace(ADAPTER, adapter)

    def shown(self, tenant: Tenant, model: str) -> str | None:
        """Return what this caller calls a model of the upstream server; None when it cannot or may not use it."""
        back = {theirs: ours for ours, theirs in self.names.items()}
        if model in self.bases:
            name = model
        elif model in back:
            name = back[model]
        else:
            before, _, after = self.pattern.replace(TENANT, tenant.name).partition(ADAPTER)
            if not (model.startswith(before) and model.endswith(after) and len(model) > len(before) + len(after)):
                return model if not self.tenants and not self.bases else None
            name = model[len(before) : len(model) - len(after)]
        try:
            return name if self.target(tenant, name) == model else None
        except ServeError:
            return None

    async def base(self) -> str:
        """Return the name of the base model; raise ServeError when it is not given and cannot be found."""
        if self.bases:
            return self.bases[0]
        for one in await self.upstream.models():
            if one.get("parent") is None:
                return one["id"]
        raise ServeError("the model server lists no base model; start with --base NAME", 502, "upstream_invalid")

    async def listed(self, tenant: Tenant) -> list[dict[str, Any]]:
        """Return what a caller may ask for: the upstream server's models by the caller's names, and `auto`."""
        found = []
        for one in await self.upstream.models():
            name = self.shown(tenant, one["id"])
            if name is None:
                continue
            parent = one.get("parent")
            told = {"id": name, "object": "model", "created": one.get("created", 0)}
            told |= {"owned_by": str(one.get("owned_by", "upstream")), "root": name}
            found.append({**told, "parent": parent if parent in self.bases or self.tenants is None else None})
        if self.selector is not None:
            own = {"id": AUTO, "object": "model", "created": 0, "owned_by": "molora", "root": AUTO, "parent": None}
            found.append(own)
        return found

    # --- deciding -----------------------------------------------------------------------------------------------------

    async def plan(self, tenant: Tenant, body: dict[str, Any], kind: Kind, beside: Callable[..., Any]) -> Plan:
        """Decide what becomes of a request.

        Args:
            tenant: who asks.
            body: of the request.
            kind: of the endpoint.
            beside: calls a function in a thread.

        Raises:
            ServeError: it is not valid, or not allowed, or over a limit.
        """
        check_body(body)
        name, id = body["model"], f"route-{uuid.uuid4().hex}"
        if name == AUTO:
            if self.selector is None:
                raise not_found(AUTO)
            plan = await self._chosen(tenant, body, kind, id, beside)
        else:
            plan = Plan(id, tenant, dict(body), self.target(tenant, name), name, is_auto=False)
        plan.body["model"] = plan.model
        if self.tenants is not None:
            plan.prompt = prompt_tokens(body, kind)
            most = 0 if kind == "embeddings" else answer_bound(body, self.answer_tokens)
            plan.grant = await beside(self.tenants.admit, tenant, plan.prompt, most)
            asked = body.get("stream_options")
            if plan.streams:
                plan.hides_usage = not (isinstance(asked, dict) and asked.get("include_usage") is True)
                plan.body["stream_options"] = {**(asked if isinstance(asked, dict) else {}), "include_usage": True}
        if self.feedback is not None:
            self.feedback.note(tenant.name, id.rpartition("-")[2], plan.shown, picked="bandit" in plan.told)
        return plan

    async def _chosen(self, tenant: Tenant, body: dict[str, Any], kind: Kind, id: str, beside: Any) -> Plan:
        text, began = text_of(body, kind), time.monotonic()
        choice, more = await beside(self._choose, tenant, text, id)
        told: dict[str, Any] = {"weights": dict(choice.weights), "scores": dict(choice.scores)}
        told |= {"abstained": choice.abstained, "why": choice.why, "entropy": choice.entropy}
        told |= {"familiarity": choice.familiarity, "version": choice.version, "response_id": id, **more}
        if choice.abstained:
            if not tenant.base:
                raise ServeError(
                    f"no adapter was chosen, and you may not use the base model alone; name an adapter ({choice.why})",
                    status=404,
                    code="no_adapter_chosen",
                    param="model",
                )
            model = shown = await self.base()
            told["base"] = True
        else:
            shown = choice.names[0]  # an upstream model is one adapter; of several that fit, the best
            model = self.target(tenant, shown)
            told["adapters"] = {shown: 1.0}
        plan = Plan(id, tenant, dict(body), model, shown, is_auto=True, told=told)
        for watcher in self.watchers:
            watcher(plan, time.monotonic() - began)
        return plan

    def _choose(self, tenant: Tenant, text: str, id: str) -> tuple[Any, dict[str, Any]]:
        choice = self.selector.select([text], tenant.visible(self.selector.names))[0]
        if self.feedback is None or choice.abstained:
            return choice, {}
        return self.feedback.choose(tenant.name, choice, id.rpartition("-")[2])

    # --- afterwards ---------------------------------------------------------------------------------------------------

    def settle(self, plan: Plan, usage: Any, counted: int = 0) -> None:
        """Write what a request used to its tenant's account: as the upstream server told, or as it was counted here.

        Args:
            plan: of the request.
            usage: of the answer; None when it did not come so far.
            counted: pieces of text that came.
        """
        grant, plan.grant = plan.grant, None
        if grant is None:
            return
        told = usage if isinstance(usage, dict) else {}
        read, made = (told.get(key) for key in ("prompt_tokens", "completion_tokens"))
        if not isinstance(read, int) and not counted:
            self._accounts.submit(_logged, grant.release)
            return
        read = read if isinstance(read, int) else plan.prompt
        self._accounts.submit(_logged, grant.settle, read, made if isinstance(made, int) else counted, plan.shown)

    def same(self, plan: Plan, theirs: Any) -> None:
        """Remember what the upstream server calls an answer, so that it can be rewarded by that id too."""
        if self.feedback is not None and isinstance(theirs, str) and len(theirs) <= MAX_MODEL:
            self._ids[plan.tenant.name, theirs] = plan.id
            while len(self._ids) > WAITING:
                self._ids.popitem(last=False)

    def take_feedback(self, tenant: Tenant, response_id: str, reward: float) -> dict[str, Any]:
        """Take the reward of one of the caller's answers, by its id here or by that of the upstream server."""
        if self.feedback is None:
            raise ServeError("this router does not learn; start it with --feedback DIR", 404, "feedback_off")
        own = self._ids.get((tenant.name, response_id), response_id)
        return {**self.feedback.take(tenant.name, own, reward), "response_id": response_id}


def _logged(function: Callable[..., Any], *args: Any) -> None:
    try:
        function(*args)
    except Exception:  # the answer is out; the account must not take the router down
        logger.exception("an account could not be written")
