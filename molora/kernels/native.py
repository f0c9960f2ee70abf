"""The C operator: only active experts, forward and backward, and for a few tokens the router in the same call.

`native.c` is plain C without any header of torch or Python. It is compiled when it is first needed (about a second),
kept in the user's cache folder under a name made from its source, the compiler and the processor, and loaded with
ctypes. Without a compiler, or with MOLORA_NATIVE=0, `library()` is None and torch's own operators do the work.

Right only where the gradient of a gate that is zero does not matter, as with every selector whose gradient goes through
the weights of what it selected. Under `grad: straight_through` it matters, and the rule does not choose this kernel.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import c_float, c_int, c_long, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .fused import writable
from .layout import Layout

logger = logging.getLogger("molora")

SOURCE = Path(__file__).with_name("native.c")
# Sums may be reordered (vector units need it), but nothing assumes that NaN and Inf do not occur. -ffast-math would,
# and with gcc it also makes the whole process flush denormal numbers to zero.
FLAGS = (
    "-O3",
    "-fPIC",
    "-std=gnu11",
    "-ffp-contract=fast",
    "-fassociative-math",
    "-fno-signed-zeros",
    "-fno-trapping-math",
)
# Threads come from the OpenMP runtime that torch has loaded, so the operator is compiled for OpenMP but linked without
# it: a second runtime would keep its idle threads spinning against torch's. If the symbols are not there, the second
# attempt has one thread; the third is for compilers that do not know the processor.
ATTEMPTS = (("-march=native", "-fopenmp"), ("-march=native",), ())


class Layer(ctypes.Structure):
    """The constants of one layer; the same fields, in the same order, as `Layer` in native.c."""

    _fields_ = [
        *((name, c_long) for name in ("d_in", "d_out", "E", "r")),
        *((name, c_void_p) for name in ("A", "Bt")),
        ("scale", c_float),
        *((name, c_int) for name in ("select", "k", "normalise", "constant", "crossing", "entropy")),
        *((name, c_float) for name in ("temperature", "p", "threshold", "q", "omega")),
        *((name, c_void_p) for name in ("W", "bias", "price")),
    ]


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the loaded operator, built if need be; None when it is switched off or cannot be had."""
    if os.environ.get("MOLORA_NATIVE", "1") == "0":
        return None
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        logger.debug("no C compiler was found; torch's operators are used instead of molora's own")
        return None
    for extra in ATTEMPTS:
        try:
            return _load(_built(compiler, (*FLAGS, *extra)))
        except (OSError, subprocess.SubprocessError) as error:
            logger.debug("the C operator cannot be used with %s: %s", " ".join(extra) or "plain flags", error)
    return None


def _built(compiler: str, flags: tuple[str, ...]) -> Path:
    """Return the path of the shared library, compiled unless the cache has it."""
    key = "\0".join((SOURCE.read_text(encoding="utf-8"), compiler, _version(compiler), *flags, _processor()))
    folder = cache_folder()
    path = folder / f"native-{hashlib.sha256(key.encode()).hexdigest()[:20]}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        object_file, shared = Path(scratch, "native.o"), Path(scratch, "native.so")
        run = functools.partial(subprocess.run, check=True, capture_output=True, timeout=60)
        run([compiler, *flags, "-c", str(SOURCE), "-o", str(object_file)])
        run([compiler, "-shared", str(object_file), "-o", str(shared), "-lm"])
        os.replace(shared, path)  # another process may be building the same file
    return path


def cache_folder() -> Path:
    """Return where built operators are kept: $XDG_CACHE_HOME/molora, or ~/.cache/molora."""
    root = os.environ.get("XDG_CACHE_HOME")
    return Path(root if root else Path.home() / ".cache", "molora")


def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, timeout=60, text=True, check=True).stdout


def _processor() -> str:
    # A home folder may be shared by machines whose processors differ.
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    kinds = ("model name", "flags", "Features", "CPU part")
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(kinds)}))


def _load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    pointer = ctypes.POINTER(Layer)
    loaded.molora_layer_size.restype = c_long
    if loaded.molora_layer_size() != ctypes.sizeof(Layer):
        raise OSError("the C compiler lays structures out in another way than ctypes")
    loaded.molora_forward.argtypes = [pointer, c_void_p, c_void_p, c_void_p, c_long, c_long, c_int]
    loaded.molora_backward.argtypes = [pointer, *[c_void_p] * 3, c_long, c_long, *[c_void_p] * 4, c_int]
    loaded.molora_routed.argtypes = [pointer, c_void_p, c_void_p, c_long, c_int]
    loaded.molora_decided.argtypes = [pointer, *[c_void_p] * 5, c_long, c_int]
    loaded.molora_step_backward.argtypes = [pointer, *[c_void_p] * 4, c_long, *[c_void_p] * 5, c_int, c_int]
    return loaded


def why_not(y: Tensor, x: Tensor, A: Tensor, B: Tensor, layout: Layout) -> str | None:
    """Return why the operator cannot take this call, or None when it can."""
    if x.device.type != "cpu" or A.device.type != "cpu":
        return "it runs on the CPU only"
    if layout.shared or layout.rank is None:
        return "it needs experts with their own A and equal ranks"
    if A.dtype != torch.float32 or B.dtype != torch.float32 or not A.is_contiguous():
        return "it needs float32 experts, A contiguous"
    if y.dtype not in _FLOATS or x.dtype not in _FLOATS:
        return f"it does not know {x.dtype}"
    return None if library() is not None else "there is no C compiler, or MOLORA_NATIVE=0"


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def native(y: Tensor, x: Tensor, A: Tensor, B: Tensor, gates: Tensor, layout: Layout, in_place: bool = False) -> Tensor:
    """Return y plus the delta of the experts; arguments as in `fused.fused`. No gradient at gates that are zero."""
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in (y, x, A, B, gates))):
        return _forward(y, x, A, B, gates, layout, in_place)
    return _Native.apply(y, x, A, B, gates, layout, in_place)


def layer_of(A: Tensor, Bt: Tensor, layout: Layout, **router: Any) -> Layer:
    """Return the constants of a layer, for contiguous A (R, d_in) and Bt (R, d_out); `router`: further fields of it."""
    return Layer(
        d_in=A.shape[1],
        d_out=Bt.shape[1],
        E=layout.num_experts,
        r=layout.rank,
        A=A.data_ptr(),
        Bt=Bt.data_ptr(),
        scale=layout.scale,
        **router,
    )


def _gate_rows(gates: Tensor, x: Tensor) -> tuple[Tensor, int]:
    """Return gates as float32 rows (n, E) and how many consecutive tokens of x read each row."""
    experts, tokens = gates.shape[-1], x.numel() // x.shape[-1]
    rows = gates.numel() // experts
    lead = gates.shape[:-1]
    # a row per token, one for all, or one per sequence: (B, 1, E) against (B, S, d)
    regular = rows == tokens or rows == 1 or (x.dim() == 3 and lead == (x.shape[0], 1))
    if not regular:
        gates = gates.expand(*x.shape[:-1], experts)
        rows = tokens
    return gates.reshape(rows, experts).to(torch.float32).contiguous(), max(tokens // max(rows, 1), 1)


def threads_for(tokens: int) -> int:
    """Return on how many of torch's threads to work."""
    # starting threads costs as much as the work of a few tokens
    return min(torch.get_num_threads(), tokens // 32) if tokens >= 64 else 1


def _forward(y: Tensor, x: Tensor, A: Tensor, B: Tensor, gates: Tensor, layout: Layout, in_place: bool) -> Tensor:
    tokens = x.numel() // x.shape[-1]
    rows, div = _gate_rows(gates, x)
    x32 = x.to(torch.float32).contiguous()
    direct = y.dtype == torch.float32 and (y.is_contiguous() or not in_place)
    out = (y if in_place else writable(y, False)) if direct else torch.zeros(y.shape, dtype=torch.float32)
    Bt = B.t().contiguous()  # no copy of a bank's own B
    layer = layer_of(A, Bt, layout)
    failed = library().molora_forward(  # type: ignore[union-attr]
        ctypes.byref(layer), x32.data_ptr(), out.data_ptr(), rows.data_ptr(), div, tokens, threads_for(tokens)
    )
    if failed:
        raise MemoryError("the C operator ran out of memory")
    if direct:
        return out
    return y.add_(out) if in_place else (y + out).to(y.dtype)


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, gates: Tensor, layout: Layout, in_place: bool
    ) -> Tensor:
        ctx.save_for_backward(x, A, B, gates)
        ctx.layout = layout
        return _forward(writable(y, True) if in_place else y, x, A, B, gates, layout, in_place)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, A, B, gates = ctx.saved_tensors
        need_y, need_x, need_A, need_B, need_gates = ctx.needs_input_grad[:5]
        tokens, layout = x.numel() // x.shape[-1], ctx.layout
        rows, div = _gate_rows(gates, x)
        x32, dy32 = x.to(torch.float32).contiguous(), dy.to(torch.float32).contiguous()
        dx = torch.zeros(x.shape, dtype=torch.float32) if need_x else None
        dA = torch.empty_like(A) if need_A else None
        Bt = B.t().contiguous()
        dBt = torch.empty_like(Bt) if need_B else None
        dgates = torch.zeros(*x.shape[:-1], gates.shape[-1]) if need_gates else None
        layer = layer_of(A, Bt, layout)
        grads = [None if t is None else t.data_ptr() for t in (dx, dA, dBt, dgates)]
        failed = library().molora_backward(  # type: ignore[union-attr]
            ctypes.byref(layer),
            x32.data_ptr(),
            dy32.data_ptr(),
            rows.data_ptr(),
            div,
            tokens,
            *grads,
            threads_for(tokens),
        )
        if failed:
            raise MemoryError("the C operator ran out of memory")
        if dx is not None:
            dx = dx.to(x.dtype)
        if dgates is not None:
            dgates = dgates.sum_to_size(gates.shape).to(gates.dtype)
        return dy if need_y else None, dx, dA, None if dBt is None else dBt.t(), dgates, None, None
