"""Controllers: loss weights that follow what training does, instead of how far it is.

Any weight of a loss may be written as one:

    {controller: sign, start: 1e-8, target: 0.75, factor: 1.2}

A controller measures something in each training forward (never again in a checkpoint's recompute), averages it over
layers, micro-batches and ranks, and moves in `settle()`, once per optimizer step, as prices do. Its weight and its
memory are buffers of the router of the adapter's first decision, so that they are saved, loaded and copied with it.

A rule is a class with keyword-only options; `measure` names what it watches, `start` is the first weight, `memory` the
numbers it starts to remember, and `step(weight, memory, measured)` returns both as they are after one optimizer step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, raise_all
from ..registry import Registry
from .entropy import shannon
from .types import Context, Routing

controllers = Registry("controller")
MEASURES = ("sparsity", "entropy_token", "entropy_batch", "loss")


def is_controller(value: object) -> bool:
    """Tell whether a weight is written as a controller."""
    return isinstance(value, Mapping) and "controller" in value


def _check(name: str, **values: tuple[float, float, float]) -> None:
    """Raise ConfigError for options that are no numbers or lie outside of their bounds (value, lowest, highest)."""
    problems = []
    for key, (value, low, high) in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            problems.append(f"controller '{name}' needs {low} <= {key} <= {high}, got {key}={value!r}")
    raise_all(problems, ConfigError, f"controller '{name}' cannot work")


def _check_measure(name: str, measure: str) -> None:
    if measure not in MEASURES:
        raise ConfigError(f"controller '{name}': measure {measure!r} is unknown; known: {', '.join(MEASURES)}")


@controllers.register("sign")
class Sign:
    """Multiply the weight while what is measured is below its target, divide it otherwise (ReMoE, arXiv 2412.14711).

    `weight <- weight * factor` or `/ factor`, kept in `low..high`. ReMoE has no bounds; without them the weight
    overflows where the target cannot be reached (zero-mean inputs without a router bias stay at a sparsity of 0.5).

    Options:
        target: of the measure; for ReMoE 1 - k / E.
        start, factor, low, high: of the weight.
        measure: `sparsity` (the share of gates that are zero), `entropy_token` or `entropy_batch` (normalised), or
            `loss` (the loss that the weight multiplies).
    """

    memory = ()

    def __init__(
        self,
        *,
        target: float = 0.75,
        start: float = 1e-8,
        factor: float = 1.2,
        low: float = 1e-12,
        high: float = 1e2,
        measure: str = "sparsity",
    ) -> None:
        big = math.inf
        _check(
            "sign", target=(target, -big, big), factor=(factor, 1, big), low=(low, 0, high), start=(start, low, high)
        )
        _check_measure("sign", measure)
        self.target, self.start, self.factor, self.measure = target, start, factor, measure
        self.low, self.high = low, high

    def step(self, weight: float, memory: list[float], measured: float) -> tuple[float, list[float]]:
        """Move the weight by one factor."""
        weight = weight * self.factor if measured < self.target else weight / self.factor
        return min(max(weight, self.low), self.high), memory


@controllers.register("adaptive_linear")
class AdaptiveLinear:
    """Let the weight follow the growth of its loss between two windows, in straight lines (BlockFFN, 2507.08771).

    The weight is held for `hold` steps. Then, every `window` steps, the mean loss of the last window is compared with
    that of the window before: the weight is to be multiplied by their quotient, by `min_growth` at least when the loss
    has risen, and goes there in a straight line over the next window; never above `max_factor * start`.

    The authors' code was read for the specification; where it left a choice (which window is the first to count, that
    the line is one window long) this is our reading.
    """

    measure = "loss"

    def __init__(
        self,
        *,
        start: float = 0.05,
        hold: int = 1000,
        window: int = 100,
        min_growth: float = 1.025,
        max_factor: float = 4.0,
    ) -> None:
        big = math.inf
        _check(
            "adaptive_linear",
            start=(start, 0, big),
            hold=(hold, 0, big),
            window=(window, 1, big),
            min_growth=(min_growth, 1, big),
            max_factor=(max_factor, 1, big),
        )
        self.start, self.hold, self.window = start, hold, window
        self.min_growth, self.high = min_growth, max_factor * start
        # steps so far, sum of this window, mean of the window before (-1: none), where the line starts and ends
        self.memory = (0.0, 0.0, -1.0, start, start)

    def step(self, weight: float, memory: list[float], measured: float) -> tuple[float, list[float]]:
        """Count one step; at the end of a window, aim anew."""
        steps, total, before, origin, aim = memory
        steps, total = steps + 1, total + measured
        place = steps % self.window
        if place == 0:
            mean, total = total / self.window, 0.0
            if steps > self.hold and before > 0:
                ratio = mean / before
                origin, aim = aim, min(aim * (max(ratio, self.min_growth) if ratio > 1 else ratio), self.high)
            else:
                origin = aim
            before = mean
        weight = origin + (aim - origin) * place / self.window
        return weight, [steps, total, before, origin, aim]


@controllers.register("slack")
class Slack:
    """Let a loss act only as far as it is above its minimum: `high * min(1, gain (loss - min) / min)`.

    From the code of 3M-ASR (SpeechMoE's authors), where it is defined but never called: a loss at its minimum is
    switched off. `min` is the smallest value so far.
    """

    measure = "loss"

    def __init__(self, *, high: float = 0.1, gain: float = 3.0) -> None:
        _check("slack", high=(high, 0, math.inf), gain=(gain, 0, math.inf))
        self.high, self.gain, self.start = high, gain, high
        self.memory = (-1.0,)  # the smallest loss so far; -1: none yet

    def step(self, weight: float, memory: list[float], measured: float) -> tuple[float, list[float]]:
        """Weigh the loss by its distance from its minimum."""
        lowest = measured if memory[0] < 0 else min(memory[0], measured)
        if lowest <= 0:
            return self.high if measured > 0 else 0.0, [max(lowest, 0.0)]
        return self.high * min(1.0, self.gain * (measured - lowest) / lowest), [lowest]


@controllers.register("entropy_trigger")
class EntropyTrigger:
    """Hold one weight until the routing covers all experts, then go to another in a straight line, for good.

    MAGNET's phases: first the entropy of the batch is raised (coverage); once its running mean is at least `threshold`
    for `patience` steps in a row, or after `cap` steps, the weight goes to `end` over `ramp` steps. It never goes
    back, however the entropy falls afterwards. Of the paper only the idea was read: the formula, and every default
    here, are inferred.

    Options:
        start, end: the weight before and after.
        threshold: of the normalised entropy, in [0, 1].
        patience, ramp, cap: optimizer steps; cap 0 waits for ever.
        decay: of the running mean.
        measure: `entropy_batch`, or another measure of `sign`.
    """

    def __init__(
        self,
        *,
        start: float = 0.0,
        end: float = 0.01,
        threshold: float = 0.95,
        patience: int = 10,
        ramp: int = 100,
        cap: int = 0,
        decay: float = 0.9,
        measure: str = "entropy_batch",
    ) -> None:
        big = math.inf
        _check(
            "entropy_trigger",
            start=(start, -big, big),
            end=(end, -big, big),
            threshold=(threshold, 0, 1),
            patience=(patience, 1, big),
            ramp=(ramp, 0, big),
            cap=(cap, 0, big),
            decay=(decay, 0, 1),
        )
        _check_measure("entropy_trigger", measure)
        self.start, self.end, self.threshold, self.patience = start, end, threshold, patience
        self.ramp, self.cap, self.decay, self.measure = ramp, cap, decay, measure
        self.memory = (0.0, -1.0, 0.0, -1.0)  # steps, running mean (-1: none), steps above in a row, trigger (-1: none)

    def step(self, weight: float, memory: list[float], measured: float) -> tuple[float, list[float]]:
        """Count one step, and pull the trigger when it is time."""
        steps, mean, above, trigger = memory
        steps += 1
        mean = measured if mean < 0 else self.decay * mean + (1 - self.decay) * measured
        above = above + 1 if mean >= self.threshold else 0.0
        if trigger < 0 and (above >= self.patience or 0 < self.cap <= steps):
            trigger = steps
        if trigger >= 0:
            gone = 1.0 if self.ramp == 0 else min(1.0, (steps - trigger) / self.ramp)
            weight = self.start + (self.end - self.start) * gone
        return weight, [steps, mean, above, trigger]


class Controller(nn.Module):
    """One controlled weight.

    Args:
        spec: `{controller: <rule>, **options}`.

    Attributes:
        state: (1 + m,) float32, the weight now and what the rule remembers.
        settled: whether `settle` was ever called.
    """

    state: Tensor

    def __init__(self, spec: Mapping[str, Any]) -> None:
        super().__init__()
        options = {key: option for key, option in spec.items() if key != "controller"}
        self.rule = controllers.build({"name": spec["controller"], **options})
        self.register_buffer("state", torch.tensor([self.rule.start, *self.rule.memory], dtype=torch.float32))
        self.seen: Tensor | None = None  # sum and count; not a buffer, which DDP would overwrite
        self.settled = False

    def weight(self, like: Tensor) -> Tensor:
        """Return the weight as a fresh tensor () on the device of `like`: the buffer may move before backward."""
        return self.state[0].detach().clone().to(like.device)

    def observe(self, routing: Routing, ctx: Context, loss: Tensor) -> None:
        """Watch one decision of a training forward, whose loss () is unweighted."""
        with torch.no_grad():
            measured = _measured(self.rule.measure, routing, ctx, loss).float()
            new = torch.stack([measured, torch.ones_like(measured)])
            self.seen = new if self.seen is None else self.seen + new.to(self.seen.device)

    @torch.no_grad()
    def settle(self) -> None:
        """Move the weight by what was observed since the last call; does nothing when nothing was."""
        self.settled = True
        if self.seen is None:
            return
        seen, self.seen = self.seen.to(self.state.device), None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(seen)
        measured = float(seen[0] / seen[1])
        if not math.isfinite(measured):
            return  # a broken step teaches nothing
        weight, *memory = self.state.tolist()
        weight, memory = self.rule.step(weight, memory, measured)
        self.state.copy_(torch.tensor([weight, *memory]))

    def __getstate__(self) -> dict[str, Any]:
        """Leave pending observations out of copies and pickles."""
        return self.__dict__ | {"seen": None}


def _measured(measure: str, routing: Routing, ctx: Context, loss: Tensor) -> Tensor:
    """Return what is watched, () float32."""
    if measure == "loss":
        return loss.detach()
    if measure == "sparsity":
        per_token = (routing.gates == 0).float().mean(-1)
    else:
        total = routing.probs.sum(-1, keepdim=True).clamp_min(torch.finfo(routing.probs.dtype).tiny)
        probs = routing.probs / total
    weights = ctx.weights(routing.gates)
    count = weights.sum().clamp_min(1.0)
    if measure == "entropy_batch":
        return shannon((probs * weights[..., None]).flatten(0, 1).sum(0) / count)
    if measure == "entropy_token":
        per_token = shannon(probs)
    return (per_token * weights).sum() / count


def check_controller(spec: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with a weight that is written as a controller."""
    try:
        Controller(spec)
    except (ConfigError, TypeError) as error:
        return [str(error)]
    return []
