"""Imported before everything else: PEFT imports bitsandbytes, which then tells that kernels are not installed.

That is about its 4-bit layers on a CPU, which work without; it stood above the answer of every command. A level that
somebody has set is kept.
"""

from __future__ import annotations

from logging import ERROR, NOTSET, getLogger

_kernels = getLogger("bitsandbytes.backends.cpu.ops")
if _kernels.level == NOTSET:
    _kernels.setLevel(ERROR)
