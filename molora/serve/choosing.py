"""Choosing: from what a request names to the gate program that runs.

`program_of` reads names, within the rights of who asks; `choose` settles `model: auto`, by a selector that reads the
prompt and by the tenant's bandit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..prompts.choice import Choice
from .engine.admission import settle
from .request import Auto, Base, Mixture, Program, ServeError, Weighted
from .tenants.tenant import Tenant, not_found, resolve

AUTO = "auto"
Draw = Callable[[Choice], tuple[Choice, dict[str, Any]]]


@dataclass
class _Heard:
    """Stands before a selector: hears what it says, and lets a bandit draw."""

    selector: Any
    draw: Draw | None
    told: dict[str, Any] = field(default_factory=dict)

    def select(self, prompts: Sequence[str], allowed: Collection[str]) -> list[Choice]:
        choice = self.selector.select(prompts, allowed)[0]
        if self.draw is not None:
            choice, self.told = self.draw(choice)
        self.told["familiarity"] = getattr(choice, "familiarity", None)
        return [choice]


def choose(
    tenant: Tenant, auto: Auto, selectors: Mapping[str, Any], kinds: Mapping[str, str], draw: Draw | None = None
) -> tuple[Program, dict[str, Any]]:
    """Return the program that a selector chose, and what the caller is told of it.

    Args:
        tenant: who asks.
        auto: the prompt, and what may be chosen.
        selectors: by name; the first one is the default.
        kinds: "mixture" or another word by name, of all that is registered.
        draw: the tenant's bandit; None: what the selector says is done.

    Raises:
        ServeError: 404 there is no selector, or none fits and the tenant may not use the base model alone; 400 the
            selector is unknown.
    """
    heard = {name: _Heard(selector, draw) for name, selector in selectors.items()}
    program, told = settle(dataclasses.replace(auto, allowed=frozenset(tenant.visible(auto.allowed))), heard, kinds)
    told |= heard[told["selector"]].told
    if isinstance(program, Base) and not tenant.base:
        raise ServeError(
            f"no adapter was chosen, and you may not use the base model alone; name an adapter ({told['why']})",
            status=404,
            code="no_adapter_chosen",
            param="model",
        )
    return program, told


def program_of(
    tenant: Tenant,
    base: str,
    kinds: Mapping[str, str],
    has_auto: bool,
    model: str,
    text: Callable[[], str],
    adapters: Mapping[str, float] | None = None,
    selector: str | None = None,
) -> Program:
    """Return the gate program that a request asks for; see `Service.program`.

    Args:
        tenant: who asks.
        base: the base model's name.
        kinds: "mixture" or another word by name, of all that is registered.
        has_auto: whether there is a selector.
        model, text, adapters, selector: of the request.
    """
    if selector is not None and model != AUTO:
        raise ServeError("a selector chooses only when model is 'auto'", param="molora.selector")
    names = frozenset(kinds)
    if adapters is not None:
        return _weighted(tenant, base, kinds, model, adapters)
    # an adapter of this name that the caller may not use must not change the answer
    if model == AUTO and not (AUTO in names and tenant.may(AUTO)):
        if not has_auto:
            raise not_found(AUTO)
        return Auto(text(), frozenset(tenant.visible(names)), selector)
    name = resolve(tenant, model, names, base=(base,))
    if name == base:  # whatever else has this name: the right to the base is no right to an adapter
        return Base()
    return Mixture(name) if kinds[name] == "mixture" else Weighted(((name, 1.0),))


def _weighted(
    tenant: Tenant, base: str, kinds: Mapping[str, str], model: str, adapters: Mapping[str, float]
) -> Weighted:
    if model != base:
        raise ServeError(f"weighted adapters need model '{base}', the base model", param="model")
    chosen = []
    for name, weight in adapters.items():
        if kinds[resolve(tenant, name, frozenset(kinds))] == "mixture":
            text = f"'{name}' is a routed mixture, which has no weight; name it as model"
            raise ServeError(text, param="molora.adapters")
        if not -100 <= weight <= 100:
            raise ServeError(f"the weight of '{name}' must be from -100 to 100, got {weight}", param="molora.adapters")
        chosen.append((name, float(weight)))
    if not (tenant.base or any(weight for _, weight in chosen)):
        raise not_found(base)  # weights of zero are the base model
    return Weighted(tuple(chosen))
