"""Admission: what is checked of a request before it is queued, and what `auto` becomes."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..request import Auto, Base, Mixture, Program, Sampling, ServeError, Weighted, needs
from ..tenants.tenant import not_found
from .fair import Scheduler

MOST_ADAPTERS = 32  # in one weighted mix


def check_tokens(prompt_ids: list[int], sampling: Sampling, vocabulary: int) -> None:
    """Raise ServeError when tokens of a request do not exist, or its sampling is out of range."""
    if not prompt_ids:
        raise ServeError("the prompt has no tokens; send at least one", param="prompt")
    check_known(prompt_ids, vocabulary)
    sampling.check()
    named = {"logit_bias": [token for token, _ in sampling.logit_bias], "stop_token_ids": sampling.stop_token_ids}
    for name, tokens in named.items():
        unknown = [token for token in tokens if not 0 <= token < vocabulary]
        if unknown:
            raise ServeError(
                f"{name} names token {unknown[0]}, but the model knows tokens 0 to {vocabulary - 1}", param=name
            )


def check_known(tokens: Sequence[int], vocabulary: int) -> None:
    """Raise ServeError when tokens of a prompt do not exist."""
    wrong = [token for token in tokens if not 0 <= token < vocabulary]
    if wrong:
        raise ServeError(
            f"the prompt has token {wrong[0]}, but the model knows tokens 0 to {vocabulary - 1}", param="prompt"
        )


def check_queue(scheduler: Scheduler[Any], most: int, tenant: str | None) -> None:
    """Raise ServeError when the queue is full for a tenant; for None, for everybody.

    A tenant that fills the queue must not shut out the others: each may have its even share of `most`, as long as all
    together have no more than twice as much.
    """
    waiting, (own, tenants) = len(scheduler), (0, 1) if tenant is None else scheduler.waiting(tenant)
    if waiting >= 2 * most or (waiting >= most and own >= most // tenants):
        text = f"{waiting} requests are waiting already; try again later"
        raise ServeError(text, status=429, code="queue_full", retry_after=1)


def check_length(prompt: int, asked: int | None, longest: int, of: str) -> None:
    """Raise ServeError when a prompt and its answer exceed what there is room for.

    Args:
        prompt: tokens.
        asked: `max_tokens` of the request.
        longest: prompt and answer together.
        of: what sets that limit, for the message.
    """
    least = prompt + (asked or 1)
    if least > longest:
        answer = f"{asked} of the answer" if asked else "at least one of the answer"
        raise ServeError(
            f"{of} is {longest} tokens, but this request has {prompt} tokens in the prompt and asks for {answer}; "
            "send a shorter prompt or ask for less",
            code="context_length_exceeded",
            param="prompt" if prompt >= longest else "max_tokens",
        )


def check_program(program: Program, kinds: Mapping[str, str]) -> None:
    """Raise ServeError when a program names what is not there, or weights that mean nothing.

    Args:
        program: which experts act.
        kinds: `lora` or `mixture` by name, of all that is registered.
    """
    for name in needs(program):
        if name not in kinds:
            raise not_found(name)
    if isinstance(program, Mixture) and kinds[program.name] != "mixture":
        raise ServeError(f"'{program.name}' is a plain adapter, not a routed mixture; ask for it by weight")
    if not isinstance(program, Weighted):
        return
    mixtures = [name for name in program.names if kinds[name] == "mixture"]
    if mixtures:
        raise ServeError(f"'{mixtures[0]}' is a routed mixture, which takes no weight; ask for it alone")
    if len(set(program.names)) < len(program.names):
        raise ServeError(f"an adapter is named twice in {', '.join(program.names)}; name each once")
    if not 1 <= len(program.weights) <= MOST_ADAPTERS:
        raise ServeError(f"a mix has 1 to {MOST_ADAPTERS} adapters, got {len(program.weights)}")
    for name, weight in program.weights:
        if not (math.isfinite(weight) and abs(weight) <= 100):
            raise ServeError(f"the weight of '{name}' must be a number from -100 to 100, got {weight!r}")


def settle(
    auto: Auto, selectors: Mapping[str, Any], kinds: Mapping[str, str]
) -> tuple[Base | Weighted | Mixture, dict[str, Any]]:
    """Let a selector read the prompt; return what it chose, and what the caller is told.

    Args:
        auto: what it reads, and what it may choose from.
        selectors: by name; the first one is the default.
        kinds: `lora` or `mixture` by name, of all that is registered.

    Returns:
        The program, and what the caller is told: among it `weights`, of what acts. A mixture acts alone, so where it
        is the first choice all others are left out, and where it is not it is left out itself.
    """
    if not selectors:
        raise not_found("auto")
    name = next(iter(selectors)) if auto.selector is None else auto.selector
    if name not in selectors:
        raise ServeError(f"selector '{name}' is unknown; known: {', '.join(selectors)}", param="selector")
    allowed: Collection[str] = sorted(auto.allowed & kinds.keys())
    if not allowed:
        told = {"why": "there is no adapter to choose from", "abstained": True, "weights": {}, "scores": {}}
        return Base(), {"selector": name, **told}
    choice = selectors[name].select([auto.text], allowed)[0]
    told = {"weights": {}, "scores": dict(choice.scores), "abstained": choice.abstained}
    told |= {"selector": name, "why": choice.why}
    entropy = getattr(choice, "entropy", None)
    if entropy is not None:
        told["entropy"] = entropy
    chosen = [] if choice.abstained else [(one, float(weight)) for one, weight in choice.weights.items() if weight]
    stray = [one for one, _ in chosen if one not in allowed]
    if stray:  # a selector must not widen what a caller may use
        raise ServeError(f"selector '{name}' chose what it was not offered", status=500, code="selector_failed")
    if not chosen:
        return Base(), told
    first = chosen[0][0]
    acting = chosen[:1] if kinds[first] == "mixture" else [pair for pair in chosen if kinds[pair[0]] != "mixture"]
    left = [f"'{pair[0]}'" for pair in chosen if pair not in acting]
    if left:
        were = "was" if len(left) == 1 else "were"
        told["why"] += f"; a routed mixture acts alone, so {' and '.join(left)} {were} left out"
    if kinds[first] == "mixture":
        return Mixture(first), {**told, "weights": {first: 1.0}}
    return Weighted(tuple(acting)), {**told, "weights": dict(acting)}
