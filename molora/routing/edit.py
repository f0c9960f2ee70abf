"""Edits: training-free interventions on any trained router, switched on with `molora.edit(model, edit, ...)`.

An edit changes the scores before the link function, the prices of selection, or the gates after it, of the sites it
names. It needs no gradient and leaves no trace in the model: outside of the block everything is as it was.

    with molora.edit(model, Boost({"model.layers.3.mlp.up_proj": [1, 5]}, factor=8.0)):
        model.generate(...)

Statistics for choosing experts come from `Activation`, a reader of the trace that counts choices per class of
token. Sources: RICE's cognitive experts (`npmi`, `Boost`) and routing of multilingual models (`differences`, `Steer`);
their arXiv ids are not known to us, and the latter was read in a third-party re-implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..errors import ConfigError
from .trace import Site, Trace
from .types import Context, Routing

Experts = Sequence[int] | Mapping[str, Sequence[int]]


class Edit:
    """Leaves everything as it is; subclasses change scores or gates.

    Args:
        experts: which experts, at every site, or a mapping from layer path to experts of that site alone.
    """

    def __init__(self, experts: Experts) -> None:
        by_site = isinstance(experts, Mapping)
        self.by_site = {site: _indices(chosen) for site, chosen in experts.items()} if by_site else None
        self.everywhere = None if by_site else _indices(experts)

    def mask(self, site: str, like: Tensor) -> Tensor | None:
        """Return (N,) bool for the experts of a site, None where the edit has nothing to do.

        Raises:
            ConfigError: an expert that the site does not have.
        """
        chosen = self.everywhere if self.by_site is None else self.by_site.get(site)
        if not chosen:
            return None
        if max(chosen) >= like.shape[-1]:
            raise ConfigError(
                f"edit names expert {max(chosen)} of site '{site}', which has experts 0 to {like.shape[-1] - 1}"
            )
        mask = torch.zeros(like.shape[-1], dtype=torch.bool, device=like.device)
        mask[list(chosen)] = True
        return mask

    def scores(self, scores: Tensor, site: str) -> Tensor:
        """Return the scores (B, S, N) to use at a site."""
        return scores

    def prices(self, prices: Tensor, site: str) -> Tensor:
        """Return the prices (N,) to use at a site."""
        return prices

    def gates(self, gates: Tensor, site: str) -> Tensor:
        """Return the gates (B, S, E) to use at a site."""
        return gates


class Boost(Edit):
    """Multiply the gates of some experts by a factor where they were chosen (RICE; 64 was best in its grid).

    Args:
        experts: see `Edit`; RICE takes the two experts of largest `npmi` with tokens such as `<think>`.
        factor: what multiplies the gate; gates are not normalised afterwards.
    """

    def __init__(self, experts: Experts, *, factor: float = 64.0) -> None:
        super().__init__(experts)
        self.factor = float(factor)

    def gates(self, gates: Tensor, site: str) -> Tensor:
        """Return the gates (B, S, E) with those of the chosen experts multiplied."""
        mask = self.mask(site, gates)
        return gates if mask is None else torch.where(mask, gates * self.factor, gates)


class Steer(Edit):
    """Raise the scores of some experts by `strength` standard deviations of each token's scores (soft steering).

    The size follows the token's own scores, so that scaling all scores scales the edit. `hard=True` instead lifts the
    experts to the largest score of the token, with noise of 1e-6 among them. Forcing more experts than the router
    selects (k) is reported to derail models.

    Args:
        experts: see `Edit`.
        strength: lambda; 0.5 in the source.
        hard: lift to the maximum instead.
    """

    def __init__(self, experts: Experts, *, strength: float = 0.5, hard: bool = False) -> None:
        super().__init__(experts)
        self.strength, self.hard = float(strength), hard

    def scores(self, scores: Tensor, site: str) -> Tensor:
        """Return the scores (B, S, N) with those of the chosen experts raised."""
        mask = self.mask(site, scores)
        if mask is None:
            return scores
        if not self.hard:
            return scores + self.strength * scores.std(-1, keepdim=True, correction=0) * mask
        top = scores.amax(-1, keepdim=True)
        noise = torch.randn_like(scores).abs() * 1e-6 * top.abs().clamp_min(1.0)
        return torch.where(mask, top + noise, scores)


class Forbid(Edit):
    """Never use some experts: their scores fall below all others, and their gates are zero.

    Where gates are normalised over the selected experts, the others take their share.

    Args:
        experts: see `Edit`; at least one expert of a site must stay.
    """

    def scores(self, scores: Tensor, site: str) -> Tensor:
        """Return the scores (B, S, N) with those of the forbidden experts at the bottom."""
        mask = self.mask(site, scores)
        if mask is None:
            return scores
        if bool(mask.all()):
            raise ConfigError(f"edit forbids every expert of site '{site}'; switch the adapter off instead")
        return scores.masked_fill(mask, -1e4)  # softmax of it is 0 in float32, and the logarithm stays finite

    def prices(self, prices: Tensor, site: str) -> Tensor:
        """Return the prices (N,) with those of the forbidden experts above all others."""
        mask = self.mask(site, prices)
        return prices if mask is None else prices.masked_fill(mask, 1e4)

    def gates(self, gates: Tensor, site: str) -> Tensor:
        """Return the gates (B, S, E) with those of the forbidden experts zero."""
        mask = self.mask(site, gates)
        return gates if mask is None else gates.masked_fill(mask, 0.0)


class Pin(Edit):
    """Give some experts a fixed gate at every token, whatever the router thinks; the others keep theirs.

    Args:
        experts: see `Edit`.
        gate: the weight.
    """

    def __init__(self, experts: Experts, *, gate: float = 1.0) -> None:
        super().__init__(experts)
        self.gate = float(gate)

    def gates(self, gates: Tensor, site: str) -> Tensor:
        """Return the gates (B, S, E) with those of the pinned experts fixed."""
        mask = self.mask(site, gates)
        return gates if mask is None else gates.masked_fill(mask, self.gate)


# --- statistics -------------------------------------------------------------------------------------------------------


class Activation:
    """A reader of the trace that counts which experts are chosen, per class of token.

        seen = Activation(classes=2)
        with seen.reading(trace_of(model), lambda ids: (ids == think).long()): ...

    Args:
        classes: how many classes of tokens there are.
        adapter: whose decisions count.

    Attributes:
        chosen: site -> (classes, E) float64, how many tokens of a class chose an expert.
        tokens: site -> (classes,) float64, how many tokens of a class were seen.
        shares: site -> list of (E,) per sequence: the part of its tokens that chose each expert.
    """

    def __init__(self, classes: int = 1, *, adapter: str = "default") -> None:
        self.classes, self.adapter = classes, adapter
        self.chosen: dict[str, Tensor] = {}
        self.tokens: dict[str, Tensor] = {}
        self.shares: dict[str, list[Tensor]] = {}
        self._class_of: Callable[[Tensor], Tensor] | None = None

    @contextmanager
    def reading(self, trace: Trace, class_of: Callable[[Tensor], Tensor] | None = None) -> Iterator[Activation]:
        """Count the decisions of all forwards inside the block.

        Args:
            trace: of the model.
            class_of: token ids (B, S) -> class of each token (B, S) long; none puts all in class 0.
        """
        self._class_of = class_of
        with trace.telling(self):
            yield self

    @torch.no_grad()
    def __call__(self, site: Site, routing: Routing, ctx: Context) -> None:
        """Count one decision; this is what the trace calls."""
        if site.adapter != self.adapter:
            return
        selected = (routing.gates != 0).double().cpu()
        weights = ctx.weights(routing.gates).double().cpu()
        labels = torch.zeros(weights.shape, dtype=torch.long)
        if self._class_of is not None:
            if ctx.token_ids is None or ctx.token_ids.shape != weights.shape:
                raise ConfigError("classes of tokens need token ids and a decision per token at every site")
            labels = self._class_of(ctx.token_ids).cpu()
        onehot = torch.nn.functional.one_hot(labels, self.classes).double() * weights[..., None]
        chosen = torch.einsum("bsc,bse->ce", onehot, selected)
        zeros = torch.zeros_like(chosen)
        self.chosen[site.name] = self.chosen.get(site.name, zeros) + chosen
        self.tokens[site.name] = self.tokens.get(site.name, zeros[:, 0]) + onehot.sum((0, 1))
        per_row = (selected * weights[..., None]).sum(1) / weights.sum(1, keepdim=True).clamp_min(1.0)
        self.shares.setdefault(site.name, []).extend(per_row.unbind(0))

    def npmi(self, of_class: int = 1) -> dict[str, Tensor]:
        """Return, per site, the normalised pointwise mutual information (E,) of each expert with a class of tokens.

        `ln(P(x, e) / (P(x) P(e))) / -ln P(x, e)`, in [-1, 1]: 0 if independent, 1 if they only occur together, -1 if
        never. P counts choices: P(x, e) is the share of all choices that are expert e at a token of the class.
        """
        return {site: npmi(counts, of_class) for site, counts in self.chosen.items()}

    def mean_share(self, site: str) -> Tensor:
        """Return (E,): the mean over sequences of the part of their tokens that chose each expert."""
        return torch.stack(self.shares[site]).mean(0)


def npmi(counts: Tensor, of_class: int) -> Tensor:
    """Return (E,) normalised pointwise mutual information of experts with one class, from counts (classes, E)."""
    total = counts.sum().clamp_min(1.0)
    joint = counts[of_class] / total
    apart = (counts[of_class].sum() / total) * (counts.sum(0) / total)
    tiny = torch.finfo(counts.dtype).tiny
    value = (joint.clamp_min(tiny) / apart.clamp_min(tiny)).log() / -joint.clamp_min(tiny).log().clamp_max(-1e-12)
    value = torch.where(joint > 0, value.clamp(-1.0, 1.0), torch.full_like(value, -1.0))
    return torch.where(apart > 0, value, torch.zeros_like(value))  # an expert or a class that was never seen


def cognitive_experts(seen: Activation, *, of_class: int = 1, top: int = 2) -> dict[str, list[int]]:
    """Return the `top` (site, expert) pairs of largest npmi over the whole model, as the `experts` of an edit.

    RICE takes the two experts that go most with tokens such as `<think>`.
    """
    scored = [
        (float(value), site, expert)
        for site, values in seen.npmi(of_class).items()
        for expert, value in enumerate(values)
    ]
    chosen: dict[str, list[int]] = {}
    for _, site, expert in sorted(scored, key=lambda one: (-one[0], one[1], one[2]))[:top]:
        chosen.setdefault(site, []).append(expert)
    return chosen


def differences(task: Activation, generic: Activation, *, threshold: float) -> dict[str, list[int]]:
    """Return the experts that a task uses more than generic text does, per site, as the `experts` of an edit.

    Multilingual routing: the mean over sequences of the share of tokens that choose an expert, on the task minus on
    generic text; experts above `threshold` are kept. The source steers the middle layers only: drop the others.
    """
    found = {}
    for site in task.shares:
        delta = task.mean_share(site) - generic.mean_share(site)
        experts = [e for e, value in enumerate(delta.tolist()) if value > threshold]
        if experts:
            found[site] = experts
    return found


def _indices(experts: Sequence[int]) -> tuple[int, ...]:
    wrong = [e for e in experts if isinstance(e, bool) or not isinstance(e, int) or e < 0]
    if wrong:
        raise ConfigError(f"edit names experts {wrong}; write their numbers, from 0")
    return tuple(experts)
