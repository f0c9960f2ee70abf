"""Schedules: numbers that change with training progress.

Any number in the options of a selector, and any weight of a loss, may be written as a schedule:

    {schedule: linear, from: 0.5, to: 0.0}                 # over the whole run
    {schedule: cosine, from: 2, to: 16, start: 0.1, end: 0.6}

A schedule is a function of progress in [0, 1] inside its window `start..end`, with the values outside held constant.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from ..registry import Registry

schedules = Registry("schedule")


@schedules.register("constant")
def constant(progress: float, start_value: float, end_value: float) -> float:
    """Hold the first value."""
    return start_value


@schedules.register("linear")
def linear(progress: float, start_value: float, end_value: float) -> float:
    """Go straight from the first value to the last."""
    return start_value + (end_value - start_value) * progress


@schedules.register("cosine")
def cosine(progress: float, start_value: float, end_value: float) -> float:
    """Go from the first value to the last along half a cosine: slow, fast, slow."""
    return end_value + (start_value - end_value) * 0.5 * (1 + math.cos(math.pi * progress))


@schedules.register("exponential")
def exponential(progress: float, start_value: float, end_value: float) -> float:
    """Multiply by a constant factor: the values must have the same sign and not be zero."""
    return start_value * (end_value / start_value) ** progress


@schedules.register("multi_step")
def multi_step(progress: float, start_value: float, end_value: float) -> float:
    """Double (or halve) again and again, each value held as long as any other: 1 to 16 is 1, 2, 4, 8, 16."""
    doublings = abs(math.log2(end_value / start_value))
    values = math.ceil(doublings - 1e-9) + 1
    step_number = min(int(progress * values + 1e-9), values - 1)
    if step_number == values - 1:
        return end_value
    return start_value * 2.0 ** math.copysign(step_number, end_value / start_value - 1)


@schedules.register("ramp")
def ramp(progress: float, start_value: float, end_value: float) -> float:
    """Rise slowly first and fast at the end, as consistency losses are faded in: along `exp(-5 (1 - t)^2)`."""
    low = math.exp(-5.0)  # where the curve begins, so that the first value is exact
    return start_value + (end_value - start_value) * (math.exp(-5.0 * (1 - progress) ** 2) - low) / (1 - low)


@schedules.register("step")
def step(progress: float, start_value: float, end_value: float) -> float:
    """Jump to the last value at the end of the window."""
    return end_value if progress >= 1 else start_value


def is_schedule(value: object) -> bool:
    """Tell whether an option is written as a schedule."""
    return isinstance(value, Mapping) and "schedule" in value


@dataclass(frozen=True)
class Schedule:
    """A number that depends on training progress: `function` between two values inside the window `start..end`."""

    name: str
    start_value: float
    end_value: float
    start: float = 0.0
    end: float = 1.0

    def __call__(self, progress: float) -> float:
        """Return the value at `progress` in [0, 1]."""
        if self.end == self.start:
            inside = 1.0 if progress >= self.end else 0.0
        else:
            inside = min(max((progress - self.start) / (self.end - self.start), 0.0), 1.0)
        return schedules.get(self.name)(inside, self.start_value, self.end_value)


def build_schedule(spec: Mapping[str, Any]) -> Schedule:
    """Turn `{schedule, from, to, start, end}` into a Schedule; raise ConfigError on bad values."""
    options = dict(spec)
    name = options.pop("schedule")
    schedules.get(name)  # unknown names end here
    start_value, end_value = options.pop("from", None), options.pop("to", None)
    start, end = options.pop("start", 0.0), options.pop("end", 1.0)
    if options:
        raise ConfigError(f"schedule '{name}' has no option {sorted(options)}; known: from, to, start, end")
    if start_value is None or (end_value is None and name != "constant"):
        raise ConfigError(f"schedule '{name}' needs 'from' (and 'to', unless it is constant)")
    end_value = start_value if end_value is None else end_value
    values = {"from": start_value, "to": end_value, "start": start, "end": end}
    wrong = [k for k, v in values.items() if isinstance(v, bool) or not isinstance(v, (int, float))]
    if wrong:
        raise ConfigError(f"schedule '{name}': {', '.join(f'{k}={values[k]!r}' for k in wrong)} must be numbers")
    if not 0 <= start <= end <= 1:
        raise ConfigError(f"schedule '{name}' needs 0 <= start <= end <= 1, got start={start}, end={end}")
    if name in ("exponential", "multi_step") and start_value * end_value <= 0:
        raise ConfigError(f"schedule '{name}' needs values of one sign, got from={start_value}, to={end_value}")
    return Schedule(name, float(start_value), float(end_value), float(start), float(end))


def number(value: float | Mapping[str, Any]) -> Schedule:
    """Turn a number or a schedule mapping into a Schedule."""
    if is_schedule(value):
        return build_schedule(value)  # type: ignore[arg-type]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{value!r} is neither a number nor a schedule; write 0.01 or {{schedule: linear, from, to}}")
    return Schedule("constant", float(value), float(value))


class Scheduled:
    """A component function whose options may be schedules: resolves them, then calls the function.

    Args:
        function: the registered function.
        options: its options, numbers or schedule mappings.
    """

    def __init__(self, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
        self.function = function
        self.fixed = {key: value for key, value in options.items() if not is_schedule(value)}
        self.moving = {key: build_schedule(value) for key, value in options.items() if is_schedule(value)}
        parameters = inspect.signature(function).parameters
        self.whole = {key for key in self.moving if parameters[key].annotation in (int, "int", "int | None")}

    def __call__(self, *args: Any, progress: float, **given: Any) -> Any:
        """Call the function with the options as they are at `progress`."""
        options = self.fixed
        if self.moving:
            now = {key: schedule(progress) for key, schedule in self.moving.items()}
            options = options | {key: round(v) if key in self.whole else v for key, v in now.items()}
        return self.function(*args, **options, **given)
