"""Lease: adapters that an adapter store lends to a request."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .resident import Resident
from .slots import Place


class Lease:
    """Adapters that stay where they are until `release`.

    Args:
        residents: which ones.
        give_back: takes them back; a second call with the same list, now empty, does nothing.

    Attributes:
        rows: by name, the PEFT adapter that holds it, and its slot there; None for a routed mixture.
        digests: by name, of the content.
        packed: whether all of them can run where the tokens of requests are packed in one row.
    """

    def __init__(self, residents: Sequence[Resident], give_back: Callable[[list[Resident]], None]) -> None:
        self._residents, self._give_back = list(residents), give_back
        self.rows: dict[str, Place] = {one.name: one.place for one in residents if one.place is not None}
        self.digests: dict[str, str] = {one.name: one.digest or "" for one in residents}
        self.packed = all(one.header.packed for one in residents)

    def release(self) -> None:
        """Give them back, once no forward with gates for them runs; may be called more than once, from any thread."""
        self._give_back(self._residents)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()
