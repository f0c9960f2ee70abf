"""The registry of routers made after training, by which `molora.compose(..., router=name)` finds them.

A router is a function `build(model, adapter="default", **options)` that changes how a mixture is routed. Facts that
may be given with `register(name, ...)`:

- `refresh`: a function `refresh(model, adapter)` that computes anew what the router knows of its experts, called after
  an expert was written into a slot of a running mixture; without it a new expert takes over the scores of an old one.
"""

from __future__ import annotations

from ..registry import Registry

posthoc_routers = Registry("posthoc router")
