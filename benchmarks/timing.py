"""How time and memory are measured: side by side, in one process, as ratios to a reference that is timed close by.

Clocks of shared machines drift by tens of per cent within minutes, so absolute times mean little. Here all contenders
take turns in rounds (A x y A z w A, the next round backwards), the reference A is timed again after every second one,
and each time is divided by the mean of the two reference times around it. What is reported is the median of these
ratios over the rounds, with their quartiles. The clock is the processor time of this thread, with one thread at work.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

GROUP = 2  # contenders between two timings of the reference
LONG = 10  # samples that a first, slow call of a work lasts for it to need no repetition


class Work(Protocol):
    """Something to time."""

    def prepare(self) -> None:
        """Do what belongs to no timing, before each sample."""

    def __call__(self) -> None:
        """Do the work once."""


@dataclass
class Plain:
    """Work that needs no preparation."""

    run: Callable[[], object]

    def prepare(self) -> None:
        pass

    def __call__(self) -> None:
        self.run()


@dataclass
class Result:
    """The samples of one contender: seconds per call, and ratios to the reference around them, round by round."""

    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    @property
    def ms(self) -> float:
        return statistics.median(self.seconds) * 1e3

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def quartiles(self) -> tuple[float, float]:
        return quartiles(self.ratios)


def quartiles(values: list[float]) -> tuple[float, float]:
    """Return the lower and the upper quartile; of one value, itself twice."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def against(one: Result, other: Result) -> float:
    """Return the median of the ratios of two contenders, paired by round."""
    return statistics.median([a / b for a, b in zip(one.ratios, other.ratios, strict=True)])


def race(
    works: dict[str, Work], until: float, *, least: int = 3, most: int = 60, sample: float = 0.04
) -> dict[str, Result]:
    """Time works in turns until `time.monotonic()` reaches `until`; the first one is the reference of the ratios.

    Args:
        least, most: rounds that are run at least, whatever the clock says, and at most. No further round is begun
            that would end after `until` if it took as long as the last one.
        sample: seconds that one sample should last at least; short work is repeated inside of it.
    """
    names = list(works)
    first, others = names[0], names[1:]
    repeats = {name: _repeats(works[name], sample) for name in names}
    results = {name: Result() for name in names}
    gc.collect()
    gc.freeze()  # the models stay: the collections between samples need not walk them
    rounds, took = 0, 0.0
    while rounds < least or (rounds < most and time.monotonic() + took < until):
        began = time.monotonic()
        order = others if rounds % 2 == 0 else others[::-1]
        before, references = _sample(works[first], repeats[first]), []
        references.append(before)
        for at in range(0, len(order), GROUP):
            taken = {name: _sample(works[name], repeats[name]) for name in order[at : at + GROUP]}
            after = _sample(works[first], repeats[first])
            references.append(after)
            for name, seconds in taken.items():
                results[name].seconds.append(seconds)
                results[name].ratios.append(seconds / ((before + after) / 2))
            before = after
        results[first].seconds.append(statistics.median(references))
        results[first].ratios.append(1.0)
        rounds, took = rounds + 1, time.monotonic() - began
    gc.unfreeze()
    return results


def _repeats(work: Work, sample: float) -> int:
    """Warm the work up and return how often to repeat it in one sample."""
    if _sample(work, 1) >= LONG * sample:
        return 1  # clear already, and a second call would take seconds
    return max(1, min(400, round(sample / max(_sample(work, 1), 1e-6))))


def _sample(work: Work, repeats: int) -> float:
    work.prepare()
    gc.collect()
    gc.disable()
    try:
        start = time.thread_time()
        for _ in range(repeats):
            work()
        return (time.thread_time() - start) / repeats
    finally:
        gc.enable()


def saved_bytes(model: nn.Module, forward: Callable[[], object]) -> int:
    """Return the bytes that `forward` keeps for backward, each storage once, without parameters."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()  # held: what its graph keeps must not be freed and counted twice
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    del result
    return sum(size for address, size in kept.items() if address not in parameters)
