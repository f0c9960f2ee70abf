"""Gates of an adapter: one vector per layer, trained alone on its own data, kept as a file beside it (PHATGOOSE).

`molora_gates.safetensors` holds a tensor (d_in,) for each layer, named by the layer's path in the base model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ConfigError, LoadError, raise_all
from ..files import GATES

FORMAT = "molora-gates-1"
Gates = Mapping[str, Tensor]


def save_gates(gates: Gates, path: str | Path) -> Path:
    """Write the gates of an adapter: into its folder, or as the file that `path` names (.safetensors).

    Raises:
        ConfigError: a gate is no finite vector, or there is none.
    """
    wrong = [f"gate '{name}' has shape {tuple(v.shape)}, not (d,)" for name, v in gates.items() if v.dim() != 1]
    wrong += [f"gate '{name}' holds NaN or Inf" for name, v in gates.items() if not torch.isfinite(v).all()]
    raise_all(wrong if gates else ["there are none"], ConfigError, "these gates cannot be saved")
    file = _file(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.new")
    try:
        tensors = {name: v.detach().float().cpu().contiguous().clone() for name, v in gates.items()}
        save_file(tensors, draft, {"format": "pt", "molora": FORMAT})
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)
    return file


def load_gates(path: str | Path) -> dict[str, Tensor]:
    """Read the gates of an adapter from its folder, or from a .safetensors file.

    Raises:
        LoadError: no such file, or it is damaged, or it holds something else.
    """
    file = _file(path)
    if not file.is_file():
        raise LoadError(f"'{path}' holds no gates ({GATES}); train them with molora.posthoc.train_gates")
    try:
        with safe_open(file, "pt") as content:
            kind, names = (content.metadata() or {}).get("molora"), list(content.keys())
            if kind != FORMAT:
                raise LoadError(f"'{file}' is in format {kind!r}; gates are in format '{FORMAT}'")
            gates = {name: content.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise LoadError(f"gates '{file}' are damaged: {error}") from None
    wrong = [f"gate '{name}' has shape {tuple(v.shape)}, not (d,)" for name, v in gates.items() if v.dim() != 1]
    wrong += [f"gate '{name}' holds NaN or Inf" for name, v in gates.items() if not torch.isfinite(v.float()).all()]
    raise_all(wrong, LoadError, f"gates '{file}' cannot be used")
    return {name: v.float() for name, v in gates.items()}


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / GATES
