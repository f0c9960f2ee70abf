"""Engine: takes requests from any thread, and runs them on one model, all together, on a thread of its own."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

from torch import nn

from ..backends.choose import choose
from ..request import Auto, Base, Chunk, Program, Request, Sampling, ServeError, needs
from ..stream import Stream
from . import admission
from .detokenise import Detokeniser
from .encode import POOLINGS, Encoded, Encoder, Encoding
from .fair import Scheduler, Share
from .jobs import Job
from .loop import Loop
from .programs import Composer, Decision
from .sampling import Sampler
from .stats import Stats

logger = logging.getLogger("molora.serve")


class Engine:
    """Serves one model.

    Args:
        model: a transformers model, or PEFT's wrapper with the store's adapters inside.
        tokenizer: of the model.
        store: lends adapters (an AdapterStore); None: the base model alone.
        backend: `hf-cb`, `hf-simple`, or `auto`.
        scheduler: who is next; None: fair shares by tenant.
        kv_bytes: memory of keys and values.
        max_batch: requests that run at the same time.
        max_waiting: requests that wait at most; beyond it, tenants with less than an even share may add some.
        max_length: tokens of prompt and answer together; None: what the model takes.
        timeout: seconds that a request may take, unless it asks for less.
        share_prefixes: whether tenants may find each other's prompts in the prefix cache; see `jobs.private`.
        selectors: what `Auto` may ask, by name; the first one is the default.

    Attributes:
        report: what was chosen at the start and why, line by line.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        store: Any = None,
        *,
        backend: str = "auto",
        scheduler: Scheduler[Any] | None = None,
        kv_bytes: int = 1 << 30,
        max_batch: int = 32,
        max_waiting: int = 256,
        max_length: int | None = None,
        timeout: float = 300.0,
        share_prefixes: bool = False,
        selectors: Mapping[str, Any] | None = None,
    ) -> None:
        model.eval()
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.model, self.tokenizer, self.store = model, tokenizer, store
        self.selectors = dict(selectors or {})
        self.max_waiting, self.timeout = max_waiting, timeout
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self._backends = choose(model, backend, kv_bytes, max_batch, pad_id, self._needs_prompt)
        self.report = self._backends.report
        self.is_pair = bool(getattr(base.config, "is_encoder_decoder", False))
        self.max_length = max_length if max_length is not None else _longest(base.config)
        self.vocabulary = int(base.get_input_embeddings().weight.shape[0])
        self._eos = _eos(base, tokenizer)
        self.scheduler: Scheduler[Any] = Scheduler() if scheduler is None else scheduler
        encoder = Encoder(model, pad_id, max_batch, Composer(model))
        self._loop = Loop(store, self.scheduler, self._backends.all, encoder, share_prefixes)
        self._loop.start()

    # --- requests -------------------------------------------------------------------------------------------------

    def submit(
        self,
        request: Request,
        when_done: Callable[[Stream, Chunk], None] | None = None,
        watcher: Callable[[Decision], None] | None = None,
    ) -> Stream:
        """Queue a request.

        Args:
            request: what to generate.
            when_done: called once with the stream and its last chunk.
            watcher: called with what routers decide for the tokens of this request, while it runs.

        Raises:
            ServeError: it cannot be served: 400 wrong or too long, 404 unknown adapter, 429 queue full, 503 draining.
        """
        self._loop.check_open(self.max_waiting, request.tenant)
        admission.check_tokens(request.prompt_ids, request.sampling, self.vocabulary)
        program, chosen = self._settled(request.program)
        if chosen is not None:
            request = dataclasses.replace(request, program=program, chosen=chosen)
        backend, reason = self._backends.of(program)
        if backend is None:
            raise ServeError(f"this server cannot run this request: {reason}", code="not_served")
        limit = self._limit(len(request.prompt_ids), request.sampling.max_tokens, backend)
        stream = Stream(request, self.cancel)
        timeout = self.timeout if request.timeout is None else min(request.timeout, self.timeout)
        if math.isnan(timeout):
            raise ServeError("timeout must be a number of seconds, got nan", param="timeout")
        job = Job(
            request,
            stream,
            Sampler(request.sampling, request.prompt_ids, self._eos),
            Detokeniser(self.tokenizer, request.sampling.stop),
            limit,
            program=program,
            deadline=stream.submitted + timeout,
            done=when_done,
            backend=backend,
            watcher=_guarded(watcher),
        )
        self._loop.push(job, request.tenant, request.weight, len(request.prompt_ids), self.max_waiting)
        return stream

    def check_open(self, tenant: str | None = None) -> None:
        """Raise ServeError when no request of a tenant would be taken now: 429 queue full, 503 draining or failed."""
        self._loop.check_open(self.max_waiting, tenant)

    def cancel(self, id: str) -> None:
        """End a request, wherever it is; unknown ones are ignored."""
        self._loop.cancel(id)

    @property
    def longest(self) -> int:
        """How many tokens prompt and answer may have together, on the backend that takes most."""
        return max([self._longest_of(backend)[0] for backend in self._backends.all], default=0)

    def answer_limit(self, prompt: int, sampling: Sampling) -> int:
        """Return how many tokens the answer to a prompt of so many tokens can have at most."""
        room = max(0, self.longest if self.is_pair else self.longest - prompt)
        return room if sampling.max_tokens is None else min(sampling.max_tokens, room)

    def embed(
        self,
        prompts: Sequence[Sequence[int]],
        program: Program = Base(),  # noqa: B008  frozen
        pooling: str | None = "mean",
        tenant: str = "default",
        weight: float = 1.0,
        timeout: float | None = None,
    ) -> Encoded:
        """Return vectors of prompts, and wait for them.

        Args:
            prompts: tokens.
            program: which experts act.
            pooling: `mean` of the last hidden states, `first` or `last` token, or the `model`'s own; None: class
                probabilities, see `classify`.
            tenant, weight: whose it is.
            timeout: in seconds.

        Raises:
            ServeError: as of `submit`.
        """
        self._loop.check_open(self.max_waiting, tenant)
        if pooling is not None and pooling not in POOLINGS:
            raise ServeError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}", param="pooling")
        if not prompts:
            raise ServeError("there is nothing to encode; send at least one prompt", param="input")
        for prompt in prompts:
            admission.check_tokens(list(prompt), Sampling(), self.vocabulary)
            admission.check_length(len(prompt), 0, self.max_length + 1, "the longest input of this model")
        program, chosen = self._settled(program)
        item = Encoding([list(prompt) for prompt in prompts], program, pooling, tenant)
        self._loop.push(item, tenant, weight, sum(map(len, prompts)), self.max_waiting)
        timeout = self.timeout if timeout is None else min(timeout, self.timeout)
        try:
            return Encoded(item.result.result(timeout), chosen)
        except FutureTimeout:
            self._loop.forget(item)
            raise ServeError(f"not encoded within {timeout:g} s", status=504, code="timeout") from None

    def classify(self, prompts: Sequence[Sequence[int]], program: Program = Base(), **options: Any) -> Encoded:  # noqa: B008
        """Return class probabilities of prompts; options as of `embed`."""
        return self.embed(prompts, program, pooling=None, **options)

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Run a function on the engine's thread between two forwards, for example one that uses the model."""
        return self._loop.call(function)

    # --- life -----------------------------------------------------------------------------------------------------

    def stats(self) -> Stats:
        """Return what it has done and is doing."""
        return self._loop.stats()

    def shares(self) -> dict[str, Share]:
        """Return what each tenant got so far."""
        return self._loop.scheduler.shares()

    def drain(self, timeout: float = 30.0) -> bool:
        """Take no more requests, and let those that are there end; what has not ended by then is cancelled.

        Returns:
            Whether all have ended on their own.
        """
        return self._loop.drain(timeout)

    def close(self) -> None:
        """Stop; whatever is there is cancelled."""
        self._loop.close()

    # --- parts ----------------------------------------------------------------------------------------------------

    def _settled(self, program: Program) -> tuple[Program, Mapping[str, Any] | None]:
        """Check a program and prefetch what it needs; let a selector settle `Auto`."""
        chosen, kinds = None, self._kinds(program)
        if isinstance(program, Auto):
            program, chosen = admission.settle(program, self.selectors, kinds)
        admission.check_program(program, kinds)
        return program, chosen

    def _kinds(self, program: Program) -> dict[str, str]:
        """Return `lora` or `mixture` by name, of what a program names or may choose, as far as it is there."""
        names = program.allowed if isinstance(program, Auto) else needs(program)
        found = {name: self._entry(name) for name in names}
        return {name: entry.kind for name, entry in found.items() if entry is not None}

    def _entry(self, name: str) -> Any:
        """Return what the store tells of an adapter; None when it is unknown."""
        try:
            return None if self.store is None else self.store.entry(name)
        except ServeError:
            return None

    def _needs_prompt(self, name: str) -> str | None:
        """Tell why a mixture cannot run where tokens are packed; None when it can."""
        entry = self._entry(name)
        return None if entry is None or entry.packed else "its routers read the whole prompt"

    def _longest_of(self, backend: Any) -> tuple[int, str]:
        """Return how many tokens prompt and answer may have together, and what sets that."""
        if backend.longest < self.max_length:
            return backend.longest, "the memory of keys and values of this server"
        return self.max_length, "the longest context of this server"

    def _limit(self, prompt: int, asked: int | None, backend: Any) -> int:
        longest, of = self._longest_of(backend)
        if self.is_pair:  # prompt and answer have positions of their own, but share the memory
            admission.check_length(prompt, 0, self.max_length + 1, "the longest input of this model")
            longest = min(self.max_length + prompt, backend.longest)
        admission.check_length(prompt, asked, longest, of)
        return longest - prompt if asked is None else asked


def _guarded(watcher: Callable[[Decision], None] | None) -> Callable[[Decision], None] | None:
    """Return a watcher that cannot harm the batch."""
    if watcher is None:
        return None

    told: list[Callable[[Decision], None]] = [watcher]

    def watch(decision: Decision) -> None:
        try:
            for one in told:
                one(decision)
        except Exception:
            logger.exception("a watcher of routing decisions failed; it is told no more")
            told.clear()

    return watch


def _longest(config: Any) -> int:
    """Return how many positions a model has; 4096 for models that tell no limit."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = (getattr(text, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    return next((size for size in found if isinstance(size, int) and size > 0), 4096)


def _eos(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end an answer: those of the generation config, else of the tokenizer."""
    told = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    told = tokenizer.eos_token_id if told is None else told
    return frozenset(told if isinstance(told, list) else [told] if told is not None else [])
