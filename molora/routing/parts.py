"""Every module of this folder that registers parts, named here once: importing this one registers them all."""

from __future__ import annotations

from . import entropy, features, links, losses, price, router, schedules, scorers, selectors

__all__ = ["entropy", "features", "links", "losses", "price", "router", "schedules", "scorers", "selectors"]
