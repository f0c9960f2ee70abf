"""Every router made after training, registered: import this before a name is looked up in `posthoc_routers`."""

from . import (
    arrow,
    average,
    blocks,
    fusion,
    glider,
    kshot,
    lora_mixer,
    lorahub,
    mol_moe,
    phatgoose,
    retrieval,
    roma,
    router_retriever,
    xlora,
)

__all__ = [
    "arrow",
    "average",
    "blocks",
    "fusion",
    "glider",
    "kshot",
    "lora_mixer",
    "lorahub",
    "mol_moe",
    "phatgoose",
    "retrieval",
    "roma",
    "router_retriever",
    "xlora",
]
