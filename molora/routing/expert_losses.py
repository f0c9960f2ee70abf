"""Auxiliary losses that read the experts or the router's weights, not the decision alone.

What a router's bank holds is that of the first layer of its decision: where layers share a decision, the others are
not pressed. `given=("parts",)` losses see `parts.router` and `parts.hidden`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError
from .losses import Parts, losses, mean_over_tokens, shares
from .types import Context, Routing

MATCHES = ("mse", "ce", "kl")


def experts_of_ranks(router: Any) -> Tensor:
    """Return (E, R) float32: 1 where a row of the bank's Bt belongs to a routed expert; shared experts come after."""
    bank = router.bank
    own = torch.eye(bank.num_experts, device=bank.Bt.device)[: router.num_experts]
    return bank.spread(own)


def _why_no_bank(router: Any) -> str | None:
    if router.bank is None:
        return "it reads the experts, but this router stands alone"
    if router.bank.num_experts < router.num_experts:
        return "the experts of form 'module' are whole layers, which share no router to read them"
    return None


def _why_not_coupled(router: Any) -> str | None:
    weight = getattr(router.scorer, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return "it needs a scorer with one row per expert (linear)"
    if _why_no_bank(router) is not None:
        return _why_no_bank(router)
    if weight.shape[1] != router.bank.d_in:
        return f"the router reads {weight.shape[1]} features but the experts {router.bank.d_in}: leave `feature` out"
    if router.bank.form == "shared_a":
        return "experts of form 'shared_a' have one A, so that no row can prefer its own expert; use form: lora"
    return None


@losses.register("expert_router_coupling", at_balance=lambda experts: 0.0, given=("parts",), why_not=_why_not_coupled)
def expert_router_coupling(
    routing: Routing, ctx: Context, *, alpha: float = 1.0, noise: bool = True, parts: Parts
) -> Tensor:
    """Return `1/E^2 sum_{i != j} relu(M_ij - alpha M_ii) + relu(M_ji - alpha M_ii)`, `M_ij = ||A_j R_i||` (ERC).

    The row R_i of the router stands for the tokens that choose expert i: its own expert must answer it strongest, and
    each expert must answer its own row strongest. 0 if and only if alpha times the diagonal of M is the largest of its
    row and of its column. In training the rows are multiplied by noise U(1 - eps_i, 1 + eps_i), elementwise, with
    `eps_i = min_j ||R_i - R_j|| / (2 ||R_i||)`, which keeps each within its own cell. The loss grows with the scale of
    A, so that shrinking A cheats it; it reads no token.

    The paper's first projection is A here. alpha is 1 for 64 experts and 0.5 for 256; the weight 1 is inferred.

    Options:
        alpha: how much weaker than the diagonal the others must be.
        noise: whether rows are moved in training.
    """
    if not alpha > 0:
        raise ConfigError(f"expert_router_coupling needs alpha > 0, got {alpha}")
    router = parts.router
    experts = router.num_experts
    rows, A = router.scorer.weight.float()[:experts], router.bank.stack()[0].float()
    if noise and ctx.training and experts > 1:
        rows = rows * _noise_within_cells(rows, ctx, router)
    answers = ((rows @ A.t()) ** 2) @ experts_of_ranks(router).t()  # (row i, expert j)
    tiny = torch.finfo(answers.dtype).tiny
    M = torch.where(answers > 0, answers, torch.ones_like(answers)).clamp_min(tiny).sqrt() * (answers > 0)
    own = alpha * M.diagonal()[:, None]
    other = ~torch.eye(experts, dtype=torch.bool, device=M.device)
    return ((F.relu(M - own) + F.relu(M.t() - own)) * other).sum() / experts**2


def _noise_within_cells(rows: Tensor, ctx: Context, router: Any) -> Tensor:
    """Return factors (E, d) that keep each row nearer to where it was than to any other row."""
    fixed = rows.detach()
    apart = (fixed[:, None] - fixed[None]).norm(dim=-1)
    apart.fill_diagonal_(torch.inf)
    width = apart.amin(1) / (2 * fixed.norm(dim=-1)).clamp_min(torch.finfo(rows.dtype).tiny)
    generator = None if ctx.memory is None else ctx.memory.generator(f"coupling/{router.place.name}", rows.device)
    draws = torch.rand(fixed.shape, generator=generator, device=fixed.device, dtype=fixed.dtype)
    return 1 + width[:, None] * (2 * draws - 1)


@losses.register("diversity", at_balance=lambda experts: 0.0, given=("parts",), why_not=_why_no_bank)
def diversity(routing: Routing, ctx: Context, *, parts: Parts) -> Tensor:
    """Return the mean cosine of the outputs of two selected experts, over pairs and tokens (CompeteSMoE, 2402.02526).

    In [-1 / (k - 1), 1] for k experts. The authors average over all k^2 entries with a zero diagonal, which is
    (k - 1) / k of it. An expert that answers nothing (B = 0 at the start) has cosine 0 with all others. Tokens with
    fewer than two experts do not count. The outputs are compared through B^T B, and never formed.
    """
    router = parts.router
    A, B = router.bank.stack()
    inner = parts.hidden.float() @ A.float().t()  # (B, S, r)
    member = experts_of_ranks(router)
    if inner.shape[-1] < member.shape[-1]:  # one A for all experts
        inner = inner.repeat(1, 1, member.shape[-1] // inner.shape[-1])
    by_expert = inner[..., None, :] * member  # (B, S, E, R)
    products = by_expert @ (B.float().t() @ B.float()) @ by_expert.transpose(-1, -2)  # (B, S, E, E)
    squares = products.diagonal(dim1=-2, dim2=-1)
    lengths = torch.where(squares > 1e-12, squares, torch.ones_like(squares)).sqrt() + 1e12 * (squares <= 1e-12)
    cosines = products / (lengths[..., None] * lengths[..., None, :])
    chosen = (routing.gates != 0).to(cosines.dtype).expand(*cosines.shape[:-1])
    pairs = chosen[..., None] * chosen[..., None, :] * (1 - torch.eye(chosen.shape[-1], device=chosen.device))
    count = pairs.sum((-2, -1))
    weights = ctx.weights(cosines[..., 0]) * (count > 0)
    return mean_over_tokens((cosines * pairs).sum((-2, -1)) / count.clamp_min(1.0), weights)


@losses.register("orthogonality", at_balance=lambda experts: 0.0, given=("parts",), why_not=_why_no_bank)
def orthogonality(routing: Routing, ctx: Context, *, parts: Parts) -> Tensor:
    """Return the mean squared cosine between the rows of A of two different experts: 0 when they read other directions.

    The subspace penalty of orthogonal LoRA methods, between experts; it reads no token. For form `shared_a`, whose
    experts read the same directions, it is formed from the columns of B.
    """
    router = parts.router
    A, B = router.bank.stack()
    rows = F.normalize((B.t() if router.bank.form == "shared_a" else A).float(), dim=-1, eps=1e-6)
    member = experts_of_ranks(router)
    apart = member.t() @ (1 - torch.eye(member.shape[0], device=member.device)) @ member  # (R, R): different experts
    return (((rows @ rows.t()) ** 2) * apart).sum() / apart.sum().clamp_min(1.0)


@losses.register("match", at_balance=lambda experts: 0.0)
def match(routing: Routing, ctx: Context, *, target: str = "target", kind: str = "mse") -> Tensor:
    """Return how far probs are from a target that a scorer or a selector left in its notes; 0 without one.

    The target gets no gradient. A scorer that decided by something else than its router leaves what the router itself
    says as note `own`, and then that is compared. CompeteSMoE (mse to the softmax of the experts' responses), StableMoE
    (ce to the best expert), Read-ME (kl).

    Options:
        target: name of the note, (B, S, N) with non-negative entries; they are divided by their sum.
        kind: `mse` (mean over experts), `ce` with the target's best expert, or `kl` of the probs from the target.
    """
    if kind not in MATCHES:
        raise ConfigError(f"match kind {kind!r} is unknown; known: {', '.join(MATCHES)}")
    wanted = (routing.notes or {}).get(target)
    if wanted is None:
        return routing.probs.sum() * 0.0
    tiny = torch.finfo(routing.probs.dtype).tiny
    wanted, probs = wanted.detach().to(routing.probs), (routing.notes or {}).get("own", shares(routing))
    wanted = wanted / wanted.sum(-1, keepdim=True).clamp_min(tiny)
    if kind == "mse":
        per_token = ((probs - wanted) ** 2).mean(-1)
    elif kind == "ce":
        per_token = -probs.gather(-1, wanted.argmax(-1, keepdim=True)).clamp_min(tiny).log().squeeze(-1)
    else:
        per_token = (wanted * (wanted.clamp_min(tiny).log() - probs.clamp_min(tiny).log())).sum(-1)
    return mean_over_tokens(per_token, ctx.weights(routing.probs))
