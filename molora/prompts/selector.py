"""PromptSelector: reads a prompt and chooses among the adapters that its sender may use, or abstains.

    selector = PromptSelector(build_embedder("sentence"), "centroid", guard="nearest")
    selector.fit({"sports": ["Who won the cup?", ...], "law": [...]})
    selector.select(["When does the match start?"], allowed={"sports", "law"})[0].why

For a set of allowed adapters, method and guard are fitted on the examples of that set alone and kept for the next time
(see parts.py).
So a choice, its scores, its guard and its sentence are those of a selector that has never seen any other adapter,
whatever the method; what is allowed cannot be told from what exists.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, raise_all
from ..registry import Spec, split_spec
from . import contrastive  # noqa: F401  (registers itself)
from .choice import Choice, Judged, explain
from .embedder import Embedder, as_embedder
from .guard import Guard
from .parts import Fitted, Parts
from .registry import guards, prompt_selectors
from .scoring import Method

LIMIT = 200  # examples per adapter


class PromptSelector:
    """Chooses adapters for prompts by their examples.

    Args:
        embed: texts -> vectors: an Embedder (see embed.py), or any function.
        method: of the registry `prompt selector`: `centroid`, `knn`, `pilots`, `classifier`,
            `contrastive`, with options.
        guard: of the registry `prompt guard`: `nearest`, `mahalanobis`, with options; None: never abstain.
        top_k: how many adapters may act; their weights are their shares, scaled to 1.
        temperature: of the shares; None: the method's own.
        limit: at most so many examples per adapter, spread evenly over those that are given.

    Raises:
        ConfigError: an unknown name, or an option out of its range.
    """

    def __init__(
        self,
        embed: Embedder | Callable[[list[str]], Any],
        method: Spec = "centroid",
        *,
        guard: Spec | None = "nearest",
        top_k: int = 1,
        temperature: float | None = None,
        limit: int = LIMIT,
    ) -> None:
        problems = prompt_selectors.problems(method) + ([] if guard is None else guards.problems(guard))
        if top_k < 1:
            problems.append(f"top_k must be at least 1, got {top_k}")
        if temperature is not None and not temperature > 0:
            problems.append(f"temperature must be positive, got {temperature}")
        if limit < 1:
            problems.append(f"limit must be at least 1, got {limit}")
        raise_all(problems, ConfigError, "this prompt selector cannot be made")
        self.embedder = as_embedder(embed)
        self.method, self.guard = _plain(method), None if guard is None else _plain(guard)
        self.top_k, self.temperature, self.limit = top_k, temperature, limit
        self.names: tuple[str, ...] = ()
        self.groups: tuple[Tensor, ...] = ()
        self.sources: dict[str, str] = {}
        self._whole: Fitted | None = None
        self._parts = Parts()
        self._lock = threading.Lock()
        self._build()  # options out of range are told now

    # --- fitting ------------------------------------------------------------------------------------------------------

    def fit(self, examples: Mapping[str, Sequence[str]], sources: Mapping[str, str] | None = None) -> PromptSelector:
        """Learn from examples of what each adapter is asked; returns itself.

        Args:
            examples: name of an adapter -> texts. Copies count once: guards rank examples as if drawn apart.
            sources: name -> digest of the adapter that the examples belong to, kept for those who compare.

        Raises:
            ConfigError: there are no examples, or some are no texts.
        """
        problems = [f"the name {name!r} is no text" for name in examples if not isinstance(name, str) or not name]
        texts: dict[str, list[str]] = {}
        for name, given in examples.items():
            if isinstance(given, str) or not all(isinstance(text, str) and text.strip() for text in given):
                problems.append(f"the examples of '{name}' must be a list of texts that say something")
                continue
            texts[str(name)] = _spread(list(dict.fromkeys(given)), self.limit)
            if not texts[str(name)]:
                problems.append(f"adapter '{name}' has no examples; leave it out, or give some")
        if not examples:
            problems.append("there is no adapter to choose from")
        raise_all(problems, ConfigError, "this prompt selector cannot be fitted")
        names = sorted(texts)
        made = self.embedder([text for name in names for text in texts[name]])
        return self.fit_vectors(
            dict(zip(names, made.split([len(texts[name]) for name in names]), strict=True)), sources
        )

    def fit_vectors(self, groups: Mapping[str, Tensor], sources: Mapping[str, str] | None = None) -> PromptSelector:
        """Learn from unit vectors (n, D) of each adapter's examples; returns itself."""
        names = tuple(sorted(groups))
        sizes = {tuple(groups[name].shape[1:]) for name in names}
        if len(sizes) != 1 or any(groups[name].dim() != 2 or not len(groups[name]) for name in names):
            shapes = {name: tuple(groups[name].shape) for name in names}
            raise ConfigError(f"examples are vectors (n, D) of one size for each adapter, got {shapes}")
        vectors = tuple(groups[name].detach().float().contiguous() for name in names)
        self.take(names, vectors, dict(sources or {}), self._fit(names, vectors))
        return self

    def take(
        self, names: tuple[str, ...], groups: tuple[Tensor, ...], sources: Mapping[str, str], whole: Fitted
    ) -> None:
        """Replace everything that was learned; a select that runs meanwhile uses the old or the new, whole."""
        with self._lock:
            self.names, self.groups, self.sources, self._whole = names, groups, dict(sources), whole
            self._parts = Parts(groups)

    @property
    def digest(self) -> str:
        """sha256 over settings, embedder, names and examples."""
        return self.whole.digest

    @property
    def version(self) -> str:
        """The first twelve digits of the digest."""
        return self.digest[:12]

    @property
    def whole(self) -> Fitted:
        """What was fitted on all adapters; raises ConfigError before `fit`."""
        if self._whole is None:
            raise ConfigError("this prompt selector was not fitted; call fit(examples), or load one")
        return self._whole

    @property
    def settings(self) -> dict[str, Any]:
        """What it was made with, but for the embedder, as plain data."""
        return {
            "method": self.method,
            "guard": self.guard,
            "top_k": self.top_k,
            "temperature": self.temperature,
            "limit": self.limit,
        }

    def _build(self) -> tuple[Method, Guard | None]:
        guard = None if self.guard is None else guards.build(self.guard)
        return prompt_selectors.build(self.method), guard

    def _fit(self, names: tuple[str, ...], groups: Sequence[Tensor]) -> Fitted:
        method, guard = self._build()
        method.fit(groups)
        if guard is not None:
            guard.fit(groups)
        return Fitted(names, method, guard, self._digest_of(names, groups))

    def restored(self, names: tuple[str, ...], groups: Sequence[Tensor], state: Mapping[str, Tensor]) -> Fitted:
        """Return what was fitted when `state` was kept: the method as it was, the guard from the same groups."""
        method, guard = self._build()
        method.restore(state)
        if guard is not None:
            guard.fit(groups)
        return Fitted(names, method, guard, self._digest_of(names, groups))

    def _digest_of(self, names: Sequence[str], groups: Sequence[Tensor]) -> str:
        told = [self.settings, self.embedder.name, self.embedder.digest, list(names), [len(one) for one in groups]]
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
        for group in groups:
            digest.update(group.numpy().tobytes())
        return digest.hexdigest()

    # --- choosing -----------------------------------------------------------------------------------------------------

    def select(self, prompts: Sequence[str], allowed: Collection[str] | None = None) -> list[Choice]:
        """Choose adapters for each prompt.

        Args:
            prompts: texts.
            allowed: the adapters that may be chosen; None: all. Names that it does not know are passed over, so an
                adapter without examples is never chosen.

        Raises:
            ConfigError: it was not fitted, or the prompts are no texts.
        """
        if isinstance(prompts, str):
            raise ConfigError("select takes a list of prompts")
        _ = self.whole
        return self.select_vectors(self.embedder(prompts), allowed)

    def select_vectors(self, vectors: Tensor, allowed: Collection[str] | None = None) -> list[Choice]:
        """Choose adapters for unit vectors (B, D) of prompts, from the same embedder."""
        if isinstance(allowed, str):
            raise ConfigError(f"allowed is a set of names, got the text '{allowed}'")
        part = self._for(allowed)
        if part is None:
            why = "none of the adapters that may be used has examples, so the base model answers"
            return [Choice({}, {}, {}, True, why) for _ in vectors]
        if not len(vectors):
            return []
        size = self.groups[0].shape[1]
        if vectors.dim() != 2 or vectors.shape[1] != size:
            raise ConfigError(f"the examples are vectors of {size} numbers, the prompts are {tuple(vectors.shape)}; "
                              "use the embedder of the examples")  # fmt: skip
        scores = part.method.score(vectors)
        judged = part.guard.judge(vectors) if part.guard is not None else None
        shares = self._shares(part.method, scores)
        return [self._choice(part, row, scores[row], shares[row], judged) for row in range(len(vectors))]

    def _for(self, allowed: Collection[str] | None) -> Fitted | None:
        """Return what is fitted on the allowed adapters alone; None for no adapter."""
        with self._lock:
            whole, groups = self.whole, self.groups
            if allowed is None:
                return whole
            wanted = frozenset(allowed)
            names = tuple(name for name in whole.names if name in wanted)
            if names == whole.names:
                return whole
            if not names:
                return None
            parts = self._parts  # those of a new fit are others
        chosen = [group for name, group in zip(whole.names, groups, strict=True) if name in wanted]
        return parts.get(names, lambda: self._fit(names, chosen))

    def _shares(self, method: Method, scores: Tensor) -> Tensor:
        temperature = self.temperature or method.temperature
        name, _ = split_spec(self.method)
        if prompt_selectors.fact(name, "scores") == "probability":
            scores = scores.clamp_min(1e-30).log()
        return torch.softmax(scores.double() / temperature, -1)

    def _choice(self, part: Fitted, row: int, scores: Tensor, shares: Tensor, judged: Judged | None) -> Choice:
        order = scores.argsort(descending=True, stable=True).tolist()  # ties go to the first name
        how, _ = split_spec(self.method)
        refused = judged is not None and judged.refuses(row)
        kept = [] if refused else order[: self.top_k]
        total = float(shares[kept].sum()) if kept else 1.0
        return Choice(
            weights={part.names[i]: float(shares[i]) / total for i in kept},
            scores=dict(zip(part.names, scores.tolist(), strict=True)),
            probabilities=dict(zip(part.names, shares.tolist(), strict=True)),
            abstained=refused,
            why=explain(how, [(part.names[i], float(scores[i])) for i in order], self.top_k, judged, row),
            entropy=float(torch.special.entr(shares).sum()),
            familiarity=None if judged is None else judged.familiarity[row],
            rate=None if judged is None else judged.rate,
            version=part.digest[:12],
        )


def _plain(spec: Spec) -> Spec:
    return spec if isinstance(spec, str) else dict(spec)


def _spread(texts: list[str], limit: int) -> list[str]:
    """Return at most `limit` texts, evenly spread."""
    if len(texts) <= limit:
        return texts
    return [texts[i * len(texts) // limit] for i in range(limit)]
