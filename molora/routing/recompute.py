"""Whether this code runs in a checkpoint's recompute, where nothing may be counted or drawn a second time."""

from __future__ import annotations

import torch


def in_backward() -> bool:
    """Tell whether this code runs inside autograd's backward, that is, in a checkpoint's recompute."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
