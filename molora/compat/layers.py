"""The linear layers of a model: their sizes in every backend, their paths, what they read, the MLPs they form."""

from __future__ import annotations

import warnings

from torch import nn

# Names of sibling layers that read one and the same input. Layers under other names decide for themselves.
SAME_INPUT = {
    "attention": ("q", "k", "v", "q_proj", "k_proj", "v_proj", "query", "key", "value", "q_lin", "k_lin", "v_lin"),
    "mlp": ("gate_proj", "up_proj", "wi_0", "wi_1", "w1", "w3"),
}


def input_family(leaf: str) -> str | None:
    """Return which siblings read the same input as a layer of this name: `attention` (q, k, v), `mlp` or None."""
    return next((family for family, names in SAME_INPUT.items() if leaf in names), None)


def query_beside(leaf: str) -> str | None:
    """Return what the query layer is called beside an attention layer of this name: `q_proj` beside `k_proj`."""
    names = SAME_INPUT["attention"]
    return names[names.index(leaf) // 3 * 3] if leaf in names else None


def keep_4bit_layout(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on processors with AVX512-BF16, and undo it where it has.

    There, the first forward in eval mode packs the weights for a kernel that passes no gradient on, so a training
    forward afterwards silently loses the gradient of everything below; and a `state_dict()` in between leaves the
    scales of the weights in the wrong order (bitsandbytes 0.50). Packing also rounds the scales to bfloat16, so a base
    that has been run before it was wrapped is not quite the base it was: that is said.
    """
    packed = 0
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
            state = getattr(module.weight, "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as unpack

                module.weight.data, state = unpack(module.weight.data, state)
                if not state.nested:  # unpack leaves these scales as the packed format had them: (blocks, rows)
                    state.absmax = state.absmax.T.reshape(-1).float()
                packed += 1
    if packed:
        warnings.warn(
            f"{packed} 4-bit layers had been run in eval mode on this CPU, where bitsandbytes rounds their scales to "
            "bfloat16; wrap a model that was just loaded to train on its exact weights",
            stacklevel=2,
        )


def _plain_linears() -> tuple[type, ...]:
    from transformers.pytorch_utils import Conv1D

    return (nn.Linear, Conv1D)


PLAIN_LINEARS = _plain_linears()


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """Return (d_in, d_out) of a linear layer of any backend, wrapped or not; None for anything else.

    nn.Linear covers bitsandbytes, whose layers subclass it; other quantised layers are known by their attributes.
    """
    while hasattr(module, "base_layer"):
        module = module.base_layer
    if isinstance(module, PLAIN_LINEARS[1]):
        return module.weight.shape[0], module.weight.shape[1]
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Module) and any(hasattr(module, name) for name in ("qweight", "W_q")):
        sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
        return sizes if None not in sizes else None  # type: ignore[return-value]
    return None


# Mamba multiplies by `dt_proj.weight` itself, on every path, so a wrapper around that layer would never be called.
_BYPASSED = {"mamba": ("dt_proj",), "falcon_mamba": ("dt_proj",)}


def why_bypassed(model: nn.Module, leaf: str) -> str | None:
    """Return why experts at a layer would never act, if the model is known to read its weight without calling it."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if leaf in _BYPASSED.get(model_type, ()):
        return f"{model_type} reads its weight without calling the layer"
    return None


def module_paths(base: nn.Module) -> list[str]:
    """Return the paths of a base model's own modules, wrapped or not."""
    return [
        path.replace(".base_layer", "").replace(".original_module", "")
        for path, _ in base.named_modules()
        if path and "molora_" not in path and ".modules_to_save" not in path
    ]


def linear_sizes_of(base: nn.Module) -> dict[str, tuple[int, int]]:
    """Return (d_in, d_out) of every linear layer of a base model, wrapped or not, by its path."""
    return {path: sizes for path in module_paths(base) if (sizes := linear_sizes(base.get_submodule(path))) is not None}


# The linear layers of an MLP block, by the names that models give them: those that read its input, and the one that
# writes its output. Between them every known model acts on single rows (activation, product, dropout).
MLP_LAYERS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("gate_up_proj",), "down_proj"),
    (("up_proj",), "down_proj"),
    (("wi_0", "wi_1"), "wo"),
    (("wi",), "wo"),
    (("Wi",), "Wo"),
    (("w1", "w3"), "w2"),
    (("fc1",), "fc2"),
    (("fc_in",), "fc_out"),
    (("c_fc",), "c_proj"),
    (("lin1",), "lin2"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("intermediate.dense",), "output.dense"),
)


def mlp_blocks(model: nn.Module) -> dict[str, tuple[tuple[str, ...], str]]:
    """Return the MLP blocks of a model: (paths of the layers that read the input, path of the last) by module path.

    Found by names and sizes: the layers read one input of size d, and the last takes what they make back to d. One
    layer alone may make gate and up side by side, twice as wide as what the last reads.
    """
    found = {}
    for path, parent in model.named_modules():
        for readers, writer in MLP_LAYERS:
            try:
                sizes = [linear_sizes(parent.get_submodule(name)) for name in (*readers, writer)]
            except AttributeError:
                continue
            if None in sizes or "molora_" in path:
                continue
            *first, (width, d_out) = sizes  # type: ignore[misc]
            wide = {width, 2 * width} if len(first) == 1 else {width}
            if all(d_in == d_out and made in wide for d_in, made in first):
                start = f"{path}." if path else ""
                found[path] = tuple(start + name for name in readers), start + writer
                break
    return found
