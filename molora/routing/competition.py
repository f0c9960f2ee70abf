"""Competition: on some training steps the experts themselves say who acts, and the router learns to foresee it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError, RoutingError
from ..registry import Spec, split_spec
from .features import Place
from .scorers import scorers
from .types import Context

RESPONSES = ("softplus", "norm", "rank")


def responses(bank: Any, x: Tensor, kind: str, num_experts: int) -> Tensor:
    """Return how strongly each expert responds to x (B, S, d) -> (B, S, E), positive.

    Args:
        bank: an ExpertBank; its shared experts, which come last, do not compete.
        x: the input of its layer, float32.
        kind: `softplus` (mean over outputs of softplus(E_e(x)); ln 2 for an expert that gives 0), `norm`
            (`||E_e(x)||`) or `rank` (`||A_e x||`, which needs no second product).
        num_experts: E.
    """
    A, B = bank.stack()
    inner = F.linear(x, A.float())  # (B, S, R), or (B, S, r) where all experts share one A
    if bank.layout.rank is not None and not bank.layout.shared:
        own = inner.unflatten(-1, (bank.num_experts, -1))[..., :num_experts, :]
        up = B.t().float().unflatten(0, (bank.num_experts, -1))[:num_experts]
        return _strength(own, lambda own: torch.einsum("bser,ero->bseo", own, up), bank.scaling, kind)
    spread = bank.spread(torch.eye(bank.num_experts, device=x.device))[:num_experts]  # (E, R): whose rank is whose
    if inner.shape[-1] < spread.shape[-1]:
        inner = inner.repeat(1, 1, spread.shape[-1] // inner.shape[-1])
    own = inner[..., None, :] * spread  # (B, S, E, R)
    return _strength(own, lambda own: F.linear(own, B.float()), bank.scaling, kind)


def _strength(own: Tensor, up: Callable[[Tensor], Tensor], scaling: float, kind: str) -> Tensor:
    """Return the responses (B, S, E) from what each expert's A gives (B, S, E, .); `up` -> (B, S, E, d_out)."""
    tiny = torch.finfo(torch.float32).tiny
    if kind == "rank":
        return (own**2).sum(-1).clamp_min(tiny).sqrt()
    outputs = scaling * up(own)
    if kind == "norm":
        return (outputs**2).sum(-1).clamp_min(tiny).sqrt()
    return F.softplus(outputs).mean(-1)


@scorers.register("competition", given=("bank", "x", "notes", "place"), follows_progress=True)
class Competition(nn.Module):
    """A router that watches its experts compete (CompeteSMoE, arXiv 2402.02526 and its second version).

    On a competing step the scores are `log a`, a (B, S, E) the responses of the experts: with `link: softmax` and
    `normalise: sum1` the gates become `a / sum of a over the selected`. The note `target` then holds softmax(a), which
    `match` teaches to the router's own softmax (note `own`). On all other steps, and in evaluation, the router decides;
    the note `quiet` marks such training steps.

    Each step every layer competes with probability `rate`, at most `at_most` of them at once. The draws follow from
    `seed` and the number of steps, so that all layers, ranks and micro-batches of a step agree; `settle()` counts.

    Options:
        scorer: the router.
        response: `softplus`, `norm` (the first version of the paper) or `rank` (our cheaper variant).
        rate: chance of a layer to compete in a step.
        warmup: share of training without competition. Experts that start at zero all respond alike.
        at_most: how many layers compete in one step.
        seed: of the draws.
    """

    steps: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        scorer: Spec = "linear",
        response: str = "softplus",
        rate: float = 0.07,
        warmup: float = 0.05,
        at_most: int = 2,
        seed: int = 0,
        place: Place | None = None,
    ) -> None:
        super().__init__()
        name = split_spec(scorer, "scorer")[0]
        if scorers.fact(name, "given", ()) or scorers.fact(name, "reads"):
            raise ConfigError(f"scorer 'competition' cannot teach '{name}'; use linear, mlp or cosine")
        if response not in RESPONSES:
            raise ConfigError(f"response {response!r} is unknown; known: {', '.join(RESPONSES)}")
        if not (0 <= rate <= 1 and 0 <= warmup <= 1 and at_most >= 1):
            raise ConfigError(
                "scorer 'competition' needs rate and warmup in [0, 1] and at_most >= 1, "
                f"got rate={rate}, warmup={warmup}, at_most={at_most}"
            )
        self.inner = scorers.build(scorer, dim, num_experts)
        self.num_experts, self.response, self.place = num_experts, response, place or Place()
        self.rate, self.warmup, self.at_most, self.seed = float(rate), float(warmup), at_most, seed
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.used = False

    def competes(self, progress: float) -> bool:
        """Tell whether this layer competes in the current step."""
        if progress < self.warmup:
            return False
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + int(self.steps))
        flips = torch.rand(self.place.count, generator=generator) < self.rate
        order = torch.randperm(self.place.count, generator=generator)
        return self.place.index in order[flips[order]][: self.at_most].tolist()

    def forward(self, read: Tensor, ctx: Context, *, bank: Any, x: Tensor, notes: dict[str, Tensor]) -> Tensor:
        """Score what the router reads -> (B, S, E)."""
        scores = self.inner(read, ctx)
        if not ctx.training:
            return scores
        self.used = True
        if not self.competes(ctx.progress):
            notes["quiet"] = scores.new_ones(())
            return scores
        if bank is None or not hasattr(bank, "stack") or x.shape[1] != read.shape[1]:
            raise RoutingError("scorer 'competition' needs LoRA experts to compete, and granularity: token")
        answers = responses(bank, x, self.response, self.num_experts)
        notes["target"], notes["own"] = torch.softmax(answers.detach(), -1), torch.softmax(scores, -1)
        return answers.log()

    @torch.no_grad()
    def settle(self) -> None:
        """Count a step, if there was a training forward since the last call."""
        if self.used:
            self.used = False
            self.steps += 1

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Put the experts in another order."""
        self.inner.permute(order)
