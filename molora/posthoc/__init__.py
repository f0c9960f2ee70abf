"""Routers made after training: how finished LoRAs become a mixture, one file per family of routers.

model = molora.import_peft(base, ["news_lora", "law_lora"])
molora.posthoc.arrow.build(model, top_k=2)                                  # or route(model, "arrow", top_k=2)
molora.compose(base, ["news_lora", "law_lora"], router={"name": "arrow", "top_k": 2})             # both in one
"""

from __future__ import annotations

from . import parts
from .blocks import composing
from .gates import load_gates, save_gates
from .glider import describing
from .phatgoose import train_gates
from .prompts import MeanEmbedder, prompt_router, prompted
from .rerouting import route

__all__ = [
    "MeanEmbedder",
    "composing",
    "describing",
    "load_gates",
    "parts",
    "prompt_router",
    "prompted",
    "route",
    "save_gates",
    "train_gates",
]
