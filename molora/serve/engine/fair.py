"""Who is served next: weighted fair queueing by virtual token counters (VTC, arXiv 2401.00588).

Every tenant has a counter of the service that it got, `(w_in * input tokens + w_out * output tokens) / weight`, and the
tenant with the smallest counter goes first. Input is charged when a request starts, output as it is generated, so
nobody needs to know how long an answer will be. A tenant that comes back after a pause starts no lower than those that
have been waiting, so idle time earns no credit.

What is guaranteed (section 4 of the paper, divided by the weights): let U be `max(w_in * longest input, w_out * M)`,
with M the tokens that all running requests may hold together, and w the smallest weight. Then the counters of waiting
tenants never differ by more than U / w, and over any time in which two tenants always have something waiting, the
service that they get, each divided by its weight, differs by at most 2 U / w, however greedy one of them is.
"""

from __future__ import annotations

import heapq
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from ...errors import ConfigError

Item = TypeVar("Item")

W_IN = 1.0  # what a token of a prompt costs
W_OUT = 2.0  # what a generated token costs


@dataclass(frozen=True)
class Share:
    """What one tenant got so far.

    Attributes:
        weight: of the tenant.
        counter: its virtual counter; only differences between tenants mean something.
        input, output: tokens charged, as they are.
        waiting: items in its queue.
    """

    weight: float
    counter: float
    input: int
    output: int
    waiting: int


@dataclass
class _Tenant(Generic[Item]):
    """One tenant's queue, by order of arrival, and its counter."""

    weight: float = 1.0
    counter: float = 0.0
    input: int = 0
    output: int = 0
    elsewhere: float = 0.0  # service from other servers that was counted since its last turn here
    is_passed_over: bool = False  # it waits for an adapter, so the others went on without it
    queue: OrderedDict[int, tuple[Item, int]] = field(default_factory=OrderedDict)  # arrival -> (item, input tokens)


class Scheduler(Generic[Item]):
    """Queues of tenants that share one server by weight; any thread may call any method.

    Within a tenant, items go in order of arrival, except that one which cannot start now is passed over until it can.
    The same calls in the same order give the same answers.

    Args:
        w_in, w_out: the price of a token of a prompt and of a generated one.
    """

    def __init__(self, w_in: float = W_IN, w_out: float = W_OUT) -> None:
        self.w_in, self.w_out = w_in, w_out
        self._lock = threading.Lock()
        self._tenants: dict[str, _Tenant[Item]] = {}
        self._active: dict[str, None] = {}  # tenants that have something waiting
        self._where: dict[int, tuple[str, int]] = {}  # id of an item -> tenant and arrival
        self._arrivals = 0
        self._last: _Tenant[Item] = _Tenant()  # the one whose queue was the last to run empty

    def push(self, tenant: str, weight: float, item: Item, input: int = 0) -> None:
        """Let an item wait.

        Args:
            tenant: whose it is.
            weight: of the tenant, above 0; it holds for all that is charged from now on.
            item: any object; it is told apart by identity and may wait only once.
            input: tokens of its prompt, charged when it is popped; 0 if the caller charges them itself.
        """
        if not (isinstance(weight, (int, float)) and 0 < weight < math.inf):
            raise ConfigError(f"the weight of tenant '{tenant}' must be a number above 0, got {weight!r}")
        with self._lock:
            if id(item) in self._where:
                raise ValueError(f"{item!r} waits already")
            one = self._tenants.setdefault(tenant, _Tenant())
            one.weight = weight
            if tenant not in self._active:
                one.counter = max(one.counter, self._floor())
                one.is_passed_over = False
                self._active[tenant] = None
            self._arrivals += 1
            one.queue[self._arrivals] = item, input
            self._where[id(item)] = tenant, self._arrivals

    def _floor(self) -> float:
        """Where a tenant that comes back starts: at the smallest counter of those that wait.

        One that waits for its adapter while the others are served is left out, unless all do: its counter stands
        still, and a start down there would be a credit. Any value between the smallest and the largest counter keeps
        the bound of the paper, so this one does too.
        """
        waiting = [self._tenants[name] for name in self._active]
        moving = [one for one in waiting if not one.is_passed_over] or waiting
        return min((one.counter for one in moving), default=self._last.counter)

    def pop(
        self, admissible: Callable[[Item], bool] | None = None, fits: Callable[[Item], bool] | None = None
    ) -> Item | None:
        """Take the next item and charge its input; None when nothing may start.

        Args:
            admissible: whether an item could start now, for example because its adapter is loaded. One that could not
                keeps its place and is passed over, so that it delays nobody else.
            fits: whether there is room for the item whose turn it is. If not, nothing is taken: were a smaller one to
                overtake it, a large one might wait forever.

        Both are called under the lock of the scheduler: they must be quick and must not call it.
        """
        with self._lock:
            order = [(self._tenants[name].counter, next(iter(self._tenants[name].queue)), name)
                     for name in self._active]  # fmt: skip
            heapq.heapify(order)
            while order:
                name = heapq.heappop(order)[2]
                one = self._tenants[name]
                for arrival, (item, tokens) in one.queue.items():
                    if admissible is None or admissible(item):
                        one.is_passed_over = False
                        if fits is not None and not fits(item):
                            return None
                        self._take(name, arrival)
                        one.elsewhere = 0.0
                        self._charge(one, tokens, 0)
                        if not one.queue:
                            self._leave(name)
                        return item
                one.is_passed_over = True
            return None

    def charge(self, tenant: str, input: int = 0, output: int = 0) -> None:
        """Add tokens to what a tenant got: those that its running requests generated in a step."""
        if input < 0 or output < 0:
            raise ValueError(f"tokens cannot be negative, got input={input}, output={output}")
        with self._lock:
            one = self._tenants.get(tenant)
            if one is None:
                raise KeyError(f"tenant '{tenant}' never had anything waiting")
            self._charge(one, input, output)

    def charge_elsewhere(self, tenant: str, service: float, most: float) -> None:
        """Count service that a tenant got from another server while it waits here.

        Args:
            tenant: whose it is; nothing happens when it does not wait, since pauses earn neither credit nor debt.
            service: as `w_in * input + w_out * output`.
            most: how much of it counts between two of its turns here, so that it never waits for good.
        """
        with self._lock:
            if tenant in self._active:
                one = self._tenants[tenant]
                counted = max(0.0, min(service, most - one.elsewhere))
                one.elsewhere += counted
                one.counter += counted / one.weight

    def remove(self, item: Item) -> bool:
        """Forget a waiting item, for example because its client left; False when it does not wait (any more)."""
        with self._lock:
            tenant, arrival = self._where.get(id(item), (None, 0))
            if tenant is None:
                return False
            self._take(tenant, arrival)
            if not self._tenants[tenant].queue:
                self._leave(tenant)
            return True

    def __len__(self) -> int:
        return len(self._where)

    def waiting(self, tenant: str) -> tuple[int, int]:
        """Return how many items of a tenant wait, and how many tenants have something waiting, this one included."""
        with self._lock:
            own = len(self._tenants[tenant].queue) if tenant in self._active else 0
            return own, len(self._active) + (not own)

    def __iter__(self) -> Iterator[Item]:
        """Yield what waits now, roughly in the order in which it will be served: what to prefetch for."""
        with self._lock:
            tenants = sorted((self._tenants[name].counter, next(iter(self._tenants[name].queue)), name)
                             for name in self._active)  # fmt: skip
            rows = [[item for item, _ in self._tenants[name].queue.values()] for _, _, name in tenants]
        for place in range(max(map(len, rows), default=0)):
            yield from (row[place] for row in rows if place < len(row))

    def shares(self) -> dict[str, Share]:
        """Return what every tenant got so far."""
        with self._lock:
            return {
                name: Share(one.weight, one.counter, one.input, one.output, len(one.queue))
                for name, one in self._tenants.items()
            }

    def _take(self, tenant: str, arrival: int) -> None:
        item, _ = self._tenants[tenant].queue.pop(arrival)
        del self._where[id(item)]

    def _charge(self, one: _Tenant[Item], input: int, output: int) -> None:
        one.input += input
        one.output += output
        one.counter += (self.w_in * input + self.w_out * output) / one.weight

    def _leave(self, tenant: str) -> None:
        """Note that a tenant has nothing waiting any more."""
        del self._active[tenant]
        self._last = self._tenants[tenant]
