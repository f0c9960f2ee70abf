"""Accounts: writes to the accounts of tenants in order, on a thread of its own, beside whoever has them written."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

logger = logging.getLogger("molora.serve")


class Accounts:
    """Writes one after another; a write that fails harms nobody else."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="molora-accounts")

    def later(self, function: Callable[..., None], *args: Any) -> None:
        """Have something written; returns at once, but for a server that goes down: then it is written now."""
        try:
            self._thread.submit(_guarded, function, *args)
        except RuntimeError:
            _guarded(function, *args)

    def close(self) -> None:
        """Write all that is left."""
        self._thread.shutdown(wait=True)


def _guarded(function: Callable[..., None], *args: Any) -> None:
    try:
        function(*args)
    except Exception:  # the answer is out; its account must not take the server down
        logger.exception("an account could not be written")
