"""Every router made after training, registered: import this before a name is looked up in `posthoc_routers`."""

from . import arrow, average, glider, phatgoose, retrieval, router_retriever, xlora

__all__ = ["arrow", "average", "glider", "phatgoose", "retrieval", "router_retriever", "xlora"]
