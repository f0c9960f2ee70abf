"""Ways to spread tokens evenly over experts, and the price per expert that each of them implies.

BASE's assignment, Sinkhorn's plan, BIP's dual variables and Expert Choice's thresholds are one object: a price per
expert, such that `value - price` chooses what the method chooses. Pure functions of values (T, N): T tokens, N choices;
`real` (T,) bool is False at padding, which has no influence. None of them has a gradient, except the plan.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor


def centred(price: Tensor) -> Tensor:
    """Return the price (N,) with mean 0: a constant on all experts changes no choice."""
    return price - price.mean()


def dual_price(values: Tensor, real: Tensor, count: Tensor, price: Tensor, steps: int, *, floor: bool) -> Tensor:
    """Move a price (N,) by `steps` rounds of coordinate descent on the dual of the balanced assignment.

    The linear program of BIP (arXiv 2502.15451): choose at most count_t experts per token and at most
    C = sum(count) / N tokens per expert, at the largest total value. A round sets `p_t` to the (count_t + 1)-th
    largest of `values_t - price`, then `price_e` to the (C + 1)-th largest over tokens of `values_te - p_t`.

    Args:
        values: (T, N).
        real: (T,) bool.
        count: (T,) long, how many experts each token takes.
        price: (N,) to start from.
        steps: how many rounds.
        floor: keep p and the price at 0 or above, as for "at most"; without it the loads are asked for exactly.
    """
    tokens, choices = values.shape
    values = values.detach().masked_fill(~real[:, None], -torch.inf)
    # where every expert is taken nothing is left to compare: the last one stands in
    rival = count.clamp_max(choices - 1)[:, None]
    room = torch.div((count * real).sum(), choices, rounding_mode="floor").clamp_max(tokens - 1)
    for _ in range(steps):
        left = (values - price).sort(-1, descending=True).values.gather(-1, rival)
        left = left.clamp_min(0) if floor else left
        ranked = (values - left.nan_to_num(neginf=0.0)).sort(0, descending=True).values
        found = ranked.gather(0, room.expand(1, choices))[0]
        found = found.clamp_min(0) if floor else found
        price = torch.where(torch.isfinite(found), found, price)  # more room than tokens: nothing to learn
    return price


def threshold_price(values: Tensor, real: Tensor, count: Tensor) -> Tensor:
    """Return the price (N,) above which each expert finds `count` tokens: between the count-th value and the next.

    Expert Choice (arXiv 2202.09368) as a threshold. Count is a 0-dim tensor; at least 1, at most all tokens.
    """
    ranked = values.detach().masked_fill(~real[:, None], -torch.inf).sort(0, descending=True).values
    count = count.long().clamp(1, len(values))
    last = ranked.gather(0, (count - 1).expand(1, values.shape[1]))[0]
    following = ranked.gather(0, count.clamp_max(len(values) - 1).expand(1, values.shape[1]))[0]
    nobody = (count == len(values)) | torch.isinf(following)
    last = last.nan_to_num(neginf=0.0)
    return torch.where(nobody, last - 1, (last + following.nan_to_num(neginf=0.0)) / 2)


def sinkhorn_plan(
    scores: Tensor, real: Tensor, temperature: float, iterations: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Return the plan (T, N) and its price (N,): rows sum to 1 at real tokens, columns to (real tokens) / N.

    `argmax <plan, scores> + temperature H(plan)`, by alternating normalisation in log space. The plan is
    `exp((scores - price) / temperature)` with its rows normalised, so the price chooses what the plan chooses. The
    gradient flows through the iterations.

    Args:
        scores: (T, N) float32.
        real: (T,) bool; the rows of padding are 0.
        temperature: near 0 the plan becomes the balanced assignment.
        iterations: at most so many rounds.
        tolerance: stop when no potential moves by more than this; 0 always does all rounds.
    """
    logits = scores / temperature
    start = torch.where(real, 0.0, -1e9)[:, None].to(logits)  # not -inf: a batch of padding only stays finite
    column = torch.log(real.sum().clamp_min(1) / scores.shape[1])
    rows, columns = start - torch.logsumexp(logits, -1, keepdim=True), logits.new_zeros(scores.shape[1])
    for _ in range(iterations):
        before = columns
        columns = column - torch.logsumexp(logits + rows, 0)
        rows = start - torch.logsumexp(logits + columns, -1, keepdim=True)
        if tolerance > 0 and not torch.compiler.is_compiling() and (columns - before).detach().abs().max() < tolerance:
            break
    return torch.exp(logits + rows + columns), centred(-temperature * columns.detach())


@torch.no_grad()
@torch.compiler.disable
def balanced_assignment(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the expert (T,) of each token and the price (N,) of the best assignment, at most ceil(T / N) tokens each.

    The total value is the largest possible (BASE, arXiv 2103.16716, gets it from an auction). A price makes the best
    choice of each token nearly even; what is left over moves along the cheapest paths from full to empty experts
    (successive shortest paths), which stays optimal at every step. `values - price` is largest at the assigned expert.

    Args:
        values: (T, N), real tokens only.
    """
    tokens, choices = values.shape
    exact = values.detach().to("cpu", torch.float64).nan_to_num(0.0, 0.0, 0.0)  # a broken model must not loop here
    if not tokens:
        return torch.zeros(0, dtype=torch.long, device=values.device), values.new_zeros(choices, dtype=torch.float32)
    room = math.ceil(tokens / choices)
    # tokens that do not care fill the experts up, so that all of them end with exactly `room`
    exact = torch.cat([exact, exact.new_zeros(room * choices - tokens, choices)])
    ones = torch.ones(len(exact), dtype=torch.long)
    price = dual_price(exact, ones.bool(), ones, exact.new_zeros(choices), 16, floor=False)
    chosen = (exact - price).argmax(-1)
    tolerance = 1e-12 * max(1.0, float(exact.abs().max()))
    load = torch.bincount(chosen, minlength=choices)
    while bool((load > room).any()):
        loss = exact.gather(1, chosen[:, None]) - exact
        cost = _cheapest(loss, chosen, choices)
        distance, before = _shortest(cost, load > room, tolerance)
        end = int(torch.where(load < room, distance, torch.inf).argmin())
        path = [end]
        while int(before[path[0]]) >= 0:
            path.insert(0, int(before[path[0]]))
        hops = list(itertools.pairwise(path))
        movable = [((chosen == e) & (loss[:, f] <= cost[e, f] + tolerance)).nonzero()[:, 0] for e, f in hops]
        amount = min(int(load[path[0]]) - room, room - int(load[end]), *(len(found) for found in movable))
        for (_, f), found in zip(hops, movable, strict=True):
            chosen[found[:amount]] = f
        load = torch.bincount(chosen, minlength=choices)
    price = _potential(exact, chosen, tolerance)
    return chosen[:tokens].to(values.device), centred(price).to(values.device, torch.float32)


def _cheapest(loss: Tensor, chosen: Tensor, choices: int) -> Tensor:
    """Return (N, N): the least loss of moving one token from expert e to expert f; loss (T, N) is of moving to f."""
    cost = loss.new_full((choices, choices), torch.inf)
    cost = cost.scatter_reduce(0, chosen[:, None].expand(-1, choices), loss, "amin")
    return cost.fill_diagonal_(0.0)


def _shortest(cost: Tensor, start: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Return the distance (N,) from the nearest start (N,) bool, and the expert before on that path, -1 at a start."""
    distance = torch.where(start, 0.0, torch.inf).to(cost)
    before = torch.full_like(start, -1, dtype=torch.long)
    for _ in range(len(cost)):
        best, through = (distance[:, None] + cost).min(0)
        shorter = best < distance - tolerance
        if not bool(shorter.any()):
            break
        distance, before = torch.where(shorter, best, distance), torch.where(shorter, through, before)
    return distance, before


def _potential(exact: Tensor, chosen: Tensor, tolerance: float) -> Tensor:
    """Return a price (N,) at which every token likes its expert best, in the middle of all that do."""
    cost = _cheapest(exact.gather(1, chosen[:, None]) - exact, chosen, exact.shape[1])
    everyone = torch.ones(exact.shape[1], dtype=torch.bool)
    forward, _ = _shortest(cost, everyone, tolerance)
    backward, _ = _shortest(cost.t(), everyone, tolerance)
    return (backward - forward) / 2
