"""GLIDER (arXiv 2410.07172): PHATGOOSE's local gates plus a global score of what the request asks for.

Every expert has a description of its task. A writer (an LLM, or any callable) describes the request in the same way,
an embedder makes vectors of both, and gamma times their cosine is added to the score of each expert, the same at every
layer and token of that request. The bias is per row, so a batch may mix tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..control import tuner_of, using
from ..errors import ConfigError, raise_all
from ..registry import split_spec
from .base import install, slots_of
from .phatgoose import GivenGates, fill_gates, gates_by_slot
from .prompts import Embedder, cosines, embedded
from .registry import posthoc_routers
from .rerouting import expert_names, routers_of

Writer = Callable[[str], str]


@posthoc_routers.register("glider")
def build(
    model: nn.Module,
    adapter: str = "default",
    *,
    gates: GivenGates | None = None,
    descriptions: Mapping[int | str, str] | Sequence[str],
    gamma: float = 3.0,
    sure: float | None = None,
    threshold: float | None = None,
    top_k: int = 2,
    top_p: float | None = None,
    embedder: str | None = None,
) -> nn.Module:
    """Route a mixture by trained gates and by what each request asks for.

    Calls then go inside `with describing(model, requests, embed, write):`, which tells the routers the cosines.

    Args:
        model: a wrapped model.
        adapter: the name of the mixture.
        gates: as for `phatgoose`.
        descriptions: what each expert that has gates is for, one text each; saved with the adapter.
        gamma: weight of the cosines. The authors use 3 for held-out tasks and 100 for tasks that experts were trained
            on, and tune it per evaluation.
        sure, threshold: a rule instead of tuning: the weight is `sure` for a request whose largest cosine reaches
            `threshold`, and gamma for the others.
        top_k: how many experts act per token, at most all.
        top_p: act with the experts that hold this mass instead; their weights sum to 1, too.
        embedder: the name of the embedder that `describing` must use; none: any.

    Returns:
        The model.

    Raises:
        ConfigError, LoadError: gates or descriptions that do not fit; nothing is changed.
    """
    names = expert_names(model, adapter)
    if isinstance(descriptions, Mapping):
        texts = dict(zip(slots_of(names, list(descriptions)), descriptions.values(), strict=True))
    else:
        texts = dict(enumerate(descriptions))
    found = gates_by_slot(model, gates, adapter)
    problems = [
        f"expert '{name}' has no description" for slot, name in enumerate(names) if found[slot] and not texts.get(slot)
    ]
    problems += [f"there is no expert {slot} for '{text}'" for slot, text in texts.items() if slot >= len(names)]
    raise_all(problems, ConfigError, "every expert needs one description")
    selector: dict[str, Any] = {"name": "top_k", "k": min(top_k, len(names)), "normalise": "sum1"}
    if top_p is not None:
        selector = {"name": "top_p", "p": float(top_p), "normalise": "sum1"}
    scorer: dict[str, Any] = {"name": "glider", "gamma": float(gamma)}
    if sure is not None or threshold is not None:
        scorer |= {"sure": sure, "threshold": threshold}
    scorer["descriptions"] = [texts.get(slot, "") for slot in range(len(names))]
    if embedder is not None:
        scorer["embedder"] = embedder
    install(model, adapter, scorer=scorer, selector=selector)
    fill_gates(model, found, adapter)
    return model


class Describer:
    """Turns requests into the cosines that a GLIDER mixture reads; the experts' descriptions are embedded once.

    Args:
        model: a mixture routed by `glider`.
        embed: texts -> vectors (N, D).
        write: request -> a description of its task; None: requests are compared as they are.
        adapter: the name of the mixture.

    Raises:
        ConfigError: the mixture is routed in another way, or by another embedder.
    """

    def __init__(
        self, model: nn.Module, embed: Embedder, write: Writer | None = None, adapter: str = "default"
    ) -> None:
        config = tuner_of(model).peft_config.get(adapter)
        name, options = ("", {}) if config is None else split_spec(config.scorer)
        if name != "glider" or not options.get("descriptions"):
            raise ConfigError(f"adapter '{adapter}' is not routed by glider; see molora.posthoc.glider.build")
        mine, wanted = getattr(embed, "name", None), options.get("embedder")
        if wanted is not None and mine != wanted:
            raise ConfigError(
                f"the descriptions belong to embedder '{wanted}', but this one is called {mine!r}; vectors of "
                "different embedders do not compare"
            )
        bare = {slot for slot, text in enumerate(options["descriptions"]) if not text}
        acting = {slot for router in routers_of(model, adapter) for slot in bare if router.scorer.present[slot]}
        if acting:  # written into a slot that was free
            new = ", ".join(f"'{expert_names(model, adapter)[slot]}'" for slot in sorted(acting))
            raise ConfigError(f"expert {new} has no description; call molora.posthoc.glider.build again with one")
        self.embed, self.write = embed, write
        self._experts = embedded(embed, options["descriptions"])

    def cosines(self, requests: Sequence[str]) -> Tensor:
        """Return (B, E): the cosine of each request's description with that of each expert."""
        texts = [request if self.write is None else self.write(request) for request in requests]
        return cosines(embedded(self.embed, texts), self._experts)


@contextmanager
def describing(
    model: nn.Module,
    requests: Sequence[str],
    embed: Embedder | Describer,
    write: Writer | None = None,
    adapter: str = "default",
) -> Iterator[Tensor]:
    """Tell a GLIDER mixture what the rows of every forward inside the block ask for, also those of generate().

    Args:
        model: a mixture routed by `glider`.
        requests: one text per row of the batch.
        embed: texts -> vectors (N, D); or a Describer, which has embedded the experts' descriptions before.
        write: request -> a description of its task; None: requests are compared as they are.
        adapter: the name of the mixture.

    Yields:
        The cosines (B, E).
    """
    describer = embed if isinstance(embed, Describer) else Describer(model, embed, write, adapter)
    found = describer.cosines(requests)
    with using(model, router_extra=found):
        yield found
