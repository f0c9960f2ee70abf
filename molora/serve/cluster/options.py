"""ClusterOptions: the `cluster:` section of a server's YAML.

replicas: 2
manifest: wanted.yaml
cluster:
  max_replicas: 8          # autoscaling between replicas and this
  target_tokens: 20000     # queued tokens that one replica may have before another one is started
  gpus: 1                  # of each replica
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ...errors import ConfigError, did_you_mean, raise_all


@dataclass(frozen=True)
class ClusterOptions:
    """How replicas of an engine are run. Times are seconds.

    Attributes:
        address: of a Ray cluster that runs; None: one is started on this machine, and ends with the server.
        app: name of the server within Ray.
        max_replicas: up to which replicas are added under load; None: there are always `replicas` of them.
        target_tokens: queued tokens that one replica may have; above it, replicas are added.
        upscale_delay, downscale_delay: for how long more, or fewer, replicas must be due before that is done.
        ingresses: processes that take HTTP requests, check keys and count quotas.
        cpus, gpus: that Ray reserves for each replica.
        spill: requests on a replica from which on others with the same adapters go elsewhere; None: `max_batch`.
        interval: at which replicas look at the manifest and tell each other what tenants got.
        credit: tokens by which a tenant that got much elsewhere may be held back on a replica, at most.
        health: at which Ray asks a replica whether it is well; a lost one is noticed that late.
        patience: for replicas to get ready, with their pinned adapters.
    """

    address: str | None = None
    app: str = "molora"
    max_replicas: int | None = None
    target_tokens: float = 8192
    upscale_delay: float = 10.0
    downscale_delay: float = 300.0
    ingresses: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    spill: int | None = None
    interval: float = 1.0
    credit: float = 8192
    health: float = 5.0
    patience: float = 600.0

    @classmethod
    def of(cls, told: Mapping[str, Any], replicas: int) -> ClusterOptions:
        """Return the options of a mapping.

        Raises:
            ConfigError: a key or value is wrong; all problems at once.
        """
        if not isinstance(told, Mapping):
            raise ConfigError(f"cluster must be a mapping of options, got {type(told).__name__}")
        known = [one.name for one in fields(cls)]
        problems = [f"cluster: '{key}' is unknown{did_you_mean(str(key), known)}" for key in told if key not in known]
        raise_all(problems, ConfigError, "these options cannot be used")
        made = cls(**told)
        made._check(replicas)
        return made

    def _check(self, replicas: int) -> None:
        problems = []
        for name, least in (("ingresses", 1), ("spill", 1), ("max_replicas", replicas)):
            value = getattr(self, name)
            optional = name != "ingresses"
            if not (optional and value is None) and (type(value) is not int or value < least):
                problems.append(f"cluster.{name} must be a whole number from {least}, got {value!r}")
        above = ("target_tokens", "interval", "health", "patience")
        for name in (*above, "upscale_delay", "downscale_delay", "cpus", "gpus", "credit"):
            value = getattr(self, name)
            is_number = type(value) in (int, float) and 0 <= value < math.inf
            if not is_number or (name in above and value == 0):
                problems.append(
                    f"cluster.{name} must be a number {'above' if name in above else 'from'} 0, got {value!r}"
                )
        for name in ("address", "app"):
            value = getattr(self, name)
            if not (isinstance(value, str) and value) and not (name == "address" and value is None):
                problems.append(f"cluster.{name} must be a text, got {value!r}")
        raise_all(problems, ConfigError, "these options cannot be used")
