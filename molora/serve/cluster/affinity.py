"""Which replica a request goes to: the one that has its adapters, as long as that one is not full.

Each set of adapters has an order of the replicas of its own, by hashing (rendezvous hashing, Thaler and Ravishankar
1998). Nothing has to be told about what is loaded where: every ingress comes to the same order, a new replica takes
over its part of the sets and no other set moves, and the sets of a lost one spread over all that are left. A mixture
or a weighted mix is one set, since it needs all its experts on one replica.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from ..request import Program, needs

Replica = TypeVar("Replica")


def set_of(program: Program) -> str:
    """Return the id of the set of adapters that a program needs; empty for the base model."""
    return "+".join(sorted(needs(program)))


def ordered(
    key: str,
    replicas: Sequence[Replica],
    name: Callable[[Replica], str],
    load: Callable[[Replica], int],
    spill: int,
) -> list[Replica]:
    """Return replicas in the order in which a request should try them.

    Args:
        key: the set of adapters; empty: any replica will do.
        replicas: all that there are.
        name: of a replica, the same for everybody who asks.
        load: requests that it has.
        spill: from how many requests on it counts as full.
    """
    if not key:
        return sorted(replicas, key=lambda one: (load(one), random.random()))
    by_hash = sorted(replicas, key=lambda one: hashlib.blake2b(f"{key}\0{name(one)}".encode()).digest())
    full = [one for one in by_hash if load(one) >= spill]
    # when all are full, the preferred one may be the least so
    return [one for one in by_hash if load(one) < spill] + sorted(full, key=load)


class AdapterAffinity(RequestRouter):
    """Ray Serve's request router for engine replicas; a request's set of adapters is its multiplexed model id."""

    # a busy machine may be late with its answer; the next replica would have to load the adapters first
    queue_len_response_deadline_s = 2.0
    max_queue_len_response_deadline_s = 5.0

    def initialize_state(self, spill: int = 32) -> None:
        """Take the options: from how many requests on a replica counts as full."""
        self.spill = spill

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return replicas in the order in which they are tried."""
        key = ""
        if pending_request is not None:
            key = pending_request.metadata.multiplexed_model_id
            pending_request.routing_context.should_backoff = True  # after all were tried, not before

        def load(replica: Any) -> int:
            return self.replica_queue_len_cache.get(replica.replica_id) or 0

        found = ordered(key, candidate_replicas, lambda one: one.replica_id.unique_id, load, self.spill)
        return [[one] for one in found]
