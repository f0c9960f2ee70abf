"""Collecting: keeps the garbage collector from looking through what a server has loaded, while it answers."""

from __future__ import annotations

import gc


def keep_what_was_loaded() -> None:
    """Tell the collector that everything there is now stays; called once, when a server process begins to answer.

    Python looks for cycles in all objects at a time, and no thread runs meanwhile: with torch, transformers and a model
    that takes a quarter of a second, and a mixture that comes into the model sets it off, since it makes many objects.
    What was there before is freed as ever when nobody refers to it; only its cycles stay until the process ends.
    """
    gc.collect()
    gc.freeze()
