"""Auxiliary losses of the load and of the sparsity, further than those of losses.py; conventions are written there."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import ConfigError
from .entropy import shannon
from .losses import losses, mean_over_tokens, shares
from .types import Context, Routing

SIGNS = {"specialise": 1.0, "spread": -1.0}


@losses.register("variation", at_balance=lambda experts: 0.0)
def variation(routing: Routing, ctx: Context, *, of: str = "importance", noise: float = 1.0, k: int = 0) -> Tensor:
    """Return the squared coefficient of variation of a load: 0 at balance, E - 1 at collapse (arXiv 1701.06538).

    Of the importance P it is `importance - 1`. T2MIR and V-MoE add that of the smooth load, the chance that an expert
    is still chosen when its noise is drawn again: `mean_t Phi((z_te - threshold_te) / sigma)`, where the threshold is
    the k-th largest score among the other experts. Authors who take torch's unbiased variance have E / (E - 1) of it.
    (T2MIR's code compares the noise alone with the threshold; here it is the noisy score.)

    Options:
        of: `importance`, `load` (the smooth one) or `both` (their sum).
        noise: sigma, where the scorer leaves no note `noise`; its note `clean` (scores before noise) is read too.
        k: how many experts a token chooses; 0 counts them at each token.
    """
    if of not in ("importance", "load", "both"):
        raise ConfigError(f"variation of {of!r} is unknown; known: importance, load, both")
    if not noise > 0 or k < 0:
        raise ConfigError(f"variation needs noise > 0 and k >= 0, got noise={noise}, k={k}")
    weights, total = ctx.weights(routing.probs), routing.probs.new_zeros(())
    if of in ("importance", "both"):
        total = total + _squared_variation(mean_over_tokens(shares(routing), weights))
    if of in ("load", "both"):
        total = total + _squared_variation(mean_over_tokens(_smooth_load(routing, noise, k), weights))
    return total


def _squared_variation(load: Tensor) -> Tensor:
    """Return var / mean^2 of load (N,), with the population's variance; 0 for no load at all."""
    mean = load.mean()
    return load.var(unbiased=False) / (mean**2).clamp_min(torch.finfo(load.dtype).tiny)


def _smooth_load(routing: Routing, noise: float, k: int) -> Tensor:
    """Return (B, S, N): the chance of each expert to be chosen under fresh noise."""
    notes, noisy = routing.notes or {}, routing.scores
    clean, sigma = notes.get("clean", noisy), notes.get("noise", noise)
    experts = noisy.shape[-1]
    ranked = noisy.sort(-1, descending=True).values
    chosen = routing.selected.sum(-1, keepdim=True) if k == 0 else torch.full_like(noisy[..., :1], k).long()
    chosen = chosen.clamp(1, experts - 1) if experts > 1 else chosen.clamp(1, 1)
    inside, next_one = ranked.gather(-1, chosen - 1), ranked.gather(-1, chosen.clamp_max(experts - 1))
    # among the others, the k-th largest is the (k + 1)-th of all for an expert that is in, else the k-th
    threshold = torch.where(noisy >= inside, next_one, inside)
    return torch.special.ndtr((clean - threshold) / sigma)


@losses.register("sparsity_l1", at_balance=lambda experts: math.sqrt(experts))
def sparsity_l1(routing: Routing, ctx: Context) -> Tensor:
    """Return `mean || p / ||p||_2 ||_1`: from 1 at one-hot to sqrt(E) at uniform (SpeechMoE, arXiv 2105.03036)."""
    squares = (routing.probs**2).sum(-1)
    # a token without any prob has no direction: it costs nothing, and no gradient is divided by zero
    norm = torch.where(squares > 0, squares, torch.ones_like(squares)).sqrt()
    return mean_over_tokens(routing.probs.abs().sum(-1) / norm, ctx.weights(routing.probs))


@losses.register("weighted_l1", at_balance=lambda experts: 1.0 / experts)
def weighted_l1(routing: Routing, ctx: Context, *, k: float = 1.0, balanced: bool = True) -> Tensor:
    """Return `sum_e f_e mean_t gate_te` with `f_e = (E / k) mean_t [gate_te != 0]` detached (ReMoE, 2412.14711).

    An L1 norm that presses harder on experts used more: it is the plain one when all are used equally often, k per
    token. At balance, with one expert per token and gates 1 / E, it is k / E of ... 1 / E for k = 1.

    Options:
        k: experts per token that are aimed at.
        balanced: false for the plain L1 norm, f = 1.
    """
    if not k > 0:
        raise ConfigError(f"weighted_l1 needs k > 0, got {k}")
    weights = ctx.weights(routing.gates)
    gates = mean_over_tokens(routing.gates.abs(), weights)
    if not balanced:
        return gates.sum()
    used = mean_over_tokens((routing.gates != 0).to(gates.dtype), weights).detach()
    return routing.num_experts / k * (used * gates).sum()


@losses.register("cardinality", at_balance=lambda experts: math.log(experts / 2) ** 2)
def cardinality(routing: Routing, ctx: Context, *, k: float = 2.0) -> Tensor:
    """Return `(H(P) - ln k)^2` in nats: 0 when a layer uses k experts in effect, exp(H(P)) = k (UniPool, 2605.06665).

    Options:
        k: how many experts a layer is to use.
    """
    if not k >= 1:
        raise ConfigError(f"cardinality needs k >= 1, got {k}")
    weights = ctx.weights(routing.probs)
    mean_probs = mean_over_tokens(shares(routing), weights)
    distance = shannon(mean_probs) * math.log(mean_probs.shape[-1]) - math.log(k)
    return distance**2 * (weights.sum() > 0)


@losses.register("rsl", at_balance=lambda experts: 1.0 / experts + 0.1 * math.log(experts))
def rsl(routing: Routing, ctx: Context, *, k: int = 3, entropy: float = 0.1, sign: str = "specialise") -> Tensor:
    """Return `sum_e P_e f_e +- entropy * mean H(p_t)`, H in nats: LoRA-Mixer's routing loss (arXiv 2507.00029).

    f is the share of each token's k best experts, whatever the router keeps. There is no factor E, so the first term is
    1 / E at balance. The paper contradicts itself about the sign of the entropy: as printed, minimising the loss
    raises the entropy (`spread`); its text argues for peaked routing (`specialise`, the default here, as the
    specification reads it). Its weights are unknown; `entropy` is relative to the first term.

    Options:
        k: experts per token that f counts; all of them where there are fewer.
        entropy: weight of the entropy.
        sign: `specialise` or `spread`.
    """
    if sign not in SIGNS:
        raise ConfigError(f"rsl sign {sign!r} is unknown; known: {', '.join(SIGNS)}")
    if k < 1 or entropy < 0:
        raise ConfigError(f"rsl needs k >= 1 and entropy >= 0, got k={k}, entropy={entropy}")
    probs, weights = shares(routing), ctx.weights(routing.probs)
    experts = probs.shape[-1]
    best = probs.detach().topk(min(k, experts), dim=-1).indices
    f = mean_over_tokens(torch.zeros_like(probs).scatter(-1, best, 1.0 / best.shape[-1]), weights).detach()
    peaked = mean_over_tokens(shannon(probs), weights) * math.log(experts)
    return (f * mean_over_tokens(probs, weights)).sum() + SIGNS[sign] * entropy * peaked


@losses.register("mutual_information", at_balance=lambda experts: 0.0, reads="tasks")
def mutual_information(routing: Routing, ctx: Context) -> Tensor:
    """Return minus the mutual information of expert and task, in nats, tasks of equal weight (BECoTTA, 2402.08712).

    `- sum_{d,e} P(e, d) ln(P(e, d) / (P(e) P(d)))`, where P(e | d) is the mean of probs over the tokens of task d in
    this batch: 0 when all tasks use the experts alike, minus ln min(D, E) when each has experts of its own. Without
    task ids, or with one task, it is 0. The authors maximise it; their code cuts its gradient, so that it does nothing.
    """
    probs = shares(routing)
    weights = ctx.weights(probs).to(probs.dtype)
    if ctx.task_ids is None:
        return routing.probs.sum() * 0.0
    tasks = ctx.task_ids.to(probs.device).expand(probs.shape[0])
    tokens = weights.sum(1) * (tasks >= 0)
    same = (tasks[:, None] == tasks[None]) & (tokens > 0)  # (B, B): which rows tell of a row's task
    same = same.to(probs.dtype)
    total = (probs * weights[..., None]).sum(1)  # (B, N)
    by_task = (same @ total) / (same @ tokens)[:, None].clamp_min(1.0)  # P(e | d), repeated for each row of d
    row = (tokens > 0) / same.sum(1).clamp_min(1.0)  # each task counts once
    row = row / row.sum().clamp_min(1.0)
    mean = (row[:, None] * by_task).sum(0)
    ratio = by_task.clamp_min(torch.finfo(probs.dtype).tiny).log() - mean.clamp_min(torch.finfo(probs.dtype).tiny).log()
    return -(row[:, None] * by_task * ratio).sum()
