"""Calls: what belongs to one call of a wrapped model while it runs: a forward, a generate(), or a block of using().

Calls nest, and several threads, or tasks of asyncio, may be in the middle of calls to one model. Each sees its own.
What belongs to whoever runs the code is a context variable: forwards have no argument that PEFT and generate() would
pass on untouched. Compiled code cannot read one, so there the call that began last, in any thread, is seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import torch


class Call:
    """One call.

    Attributes:
        given: own arguments for all forwards inside.
        prompt_rows, prompt_length: shape of the prompt that generate() has begun with, if it is one.
        own: own arguments of the forward that is open.
        encoded_ids: the token ids that the encoder has read last.
        is_traced: whether it began in code that is being compiled.
    """

    # not a dataclass: torch.compile cannot trace default factories
    def __init__(self, given: dict[str, Any], prompt_rows: int | None = None, prompt_length: int | None = None) -> None:
        self.given = given
        self.prompt_rows, self.prompt_length = prompt_rows, prompt_length
        self.own: dict[str, Any] = {}
        self.encoded_ids: Any = None
        self.is_traced = False


# the calls of whoever runs this, to any model: which model's, and the call; the innermost is the last
_calls: ContextVar[tuple[tuple[Calls, Call], ...]] = ContextVar("molora_calls", default=())


class Calls:
    """The calls to one model that are running."""

    def __init__(self) -> None:
        self._open: list[Call] = []  # of all threads, in the order in which they began
        self._idle = Call({})  # of forwards of the base model itself, outside of any call

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is running: a copy starts without."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, without calls."""
        self.__init__()  # type: ignore[misc]

    @property
    def now(self) -> Call:
        """The innermost call that the caller is in the middle of."""
        if not torch.compiler.is_compiling():
            for calls, call in reversed(_calls.get()):
                if calls is self:
                    return call
            traced = [call for call in self._open if call.is_traced]  # this runs between two pieces of compiled code
            return traced[-1] if traced else self._idle
        return self._open[-1] if self._open else self._idle

    @contextmanager
    def inside(self, given: dict[str, Any], prompt: tuple[int, int] | None = None) -> Iterator[None]:
        """Make the block one call.

        Args:
            given: own arguments, on top of those of the call around this one.
            prompt: (B, S) of the token ids that it begins with; by default those of the call around it.
        """
        outer = self.now
        rows, length = prompt if prompt is not None else (outer.prompt_rows, outer.prompt_length)
        call = Call({**outer.given, **given}, rows, length)
        call.is_traced = torch.compiler.is_compiling()
        self._open.append(call)
        if call.is_traced:
            try:
                yield
            finally:
                self._open.pop()
            return
        token = _calls.set((*_calls.get(), (self, call)))
        try:
            yield
        finally:
            with suppress(ValueError):  # left in another context than it was entered in, as generators may be
                _calls.reset(token)
            self._open = [other for other in self._open if other is not call]


__all__ = ["Call", "Calls"]
