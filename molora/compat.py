"""The few places that touch the internals of PEFT and transformers, each with its reason.

If a new version of either breaks molora, the mend belongs here. tests/test_compat.py fails loudly when one of the
assumptions no longer holds.
"""

from __future__ import annotations

import inspect
import warnings
from contextlib import suppress
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import Tensor, nn

PREFIX = "molora_"

# Path segments by which transformers names attention over encoder states, and its key and value projections. They
# matter only for which mask describes a layer's input in encoder-decoder models.
CROSS_ATTENTION = ("EncDecAttention", "encoder_attn", "crossattention", "cross_attn", "multihead_attn")
# Names of sibling layers that read one and the same input. Layers under other names decide for themselves.
SAME_INPUT = {
    "attention": ("q", "k", "v", "q_proj", "k_proj", "v_proj", "query", "key", "value", "q_lin", "k_lin", "v_lin"),
    "mlp": ("gate_proj", "up_proj", "wi_0", "wi_1", "w1", "w3"),
}
KEY_VALUE = ("k", "v", "k_proj", "v_proj", "key", "value", "kv", "kv_proj")


class PeftTypeName(str):
    """A PEFT type that is not in PEFT's enum: a plain string with the `.value` that PEFT and transformers read."""

    @property
    def value(self) -> str:
        """The name itself."""
        return str(self)

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return PeftTypeName, (str(self),)


MOLORA = PeftTypeName("MOLORA")


def register_tuner(config: type, tuner: type) -> None:
    """Make PEFT know the type MOLORA.

    PEFT's `register_peft_method` accepts only names of its enum, so the three tables are written directly; nothing
    else consults the enum on the paths that we use. The prefix must be the lower-case type plus `_`, because
    transformers builds it that way in `delete_adapter`.
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[MOLORA] = config
    PEFT_TYPE_TO_TUNER_MAPPING[MOLORA] = tuner
    PEFT_TYPE_TO_PREFIX_MAPPING[MOLORA] = PREFIX


class Arguments:
    """Reads arguments of a forward by name, whether they came by position or by keyword."""

    def __init__(self, forward: Any) -> None:
        self.names = [name for name in inspect.signature(forward).parameters if name != "self"]

    def get(self, args: tuple[Any, ...], kwargs: dict[str, Any], *names: str) -> Any:
        """Return the first argument among `names` that is not None."""
        for name in names:
            value = kwargs.get(name)
            if value is None and name in self.names and self.names.index(name) < len(args):
                value = args[self.names.index(name)]
            if value is not None:
                return value
        return None


def labels_are_shifted(model: nn.Module) -> bool:
    """Tell whether the model's loss shifts labels by one, by the rule of transformers' Trainer.

    Trainer counts `labels[..., 1:]` for such models and all labels for others; the token share must count likewise.
    """
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    shifts = LOSS_MAPPING.get(getattr(model, "loss_type", None)) is ForCausalLMLoss
    return shifts and not is_encoder_decoder(model)


def generates(model: nn.Module) -> bool:
    """Tell whether a model continues a prompt, so that its labels tell the prompt from the answer."""
    return bool(hasattr(model, "can_generate") and model.can_generate())


def is_encoder_decoder(model: nn.Module) -> bool:
    """Tell whether a model has an encoder and a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def encoder_of(model: nn.Module) -> tuple[str, nn.Module] | None:
    """Return the path and module of the encoder of an encoder-decoder model, else None."""
    if not is_encoder_decoder(model) or not hasattr(model, "get_encoder"):
        return None
    encoder = model.get_encoder()
    return next(((name, module) for name, module in model.named_modules() if module is encoder), None)


def stack_of(path: str, encoder_path: str | None) -> str:
    """Return which masks describe the input of the layer at `path`: main, encoder, or cross."""
    if encoder_path is None:
        return "main"
    if path == encoder_path or path.startswith(encoder_path + "."):
        return "encoder"
    segments = path.split(".")
    if segments[-1] in KEY_VALUE and any(segment in CROSS_ATTENTION for segment in segments):
        return "cross"
    return "main"


def input_family(leaf: str) -> str | None:
    """Return which siblings read the same input as a layer of this name: `attention` (q, k, v), `mlp` or None."""
    return next((family for family, names in SAME_INPUT.items() if leaf in names), None)


def tokens_in_cache(cache: Any) -> int:
    """Return how many tokens a key-value or state-space cache holds; 0 for none."""
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        try:
            return int(cache.get_seq_length())
        except (TypeError, ValueError, IndexError):  # caches of pure state-space models count no tokens
            pass
    previous = getattr(cache, "has_previous_state", False)
    return int(bool(previous() if callable(previous) else previous))


def add_output(outputs: Any, name: str, value: Tensor) -> None:
    """Add a value to a ModelOutput, also under a name that its class does not declare; sums with one that is there.

    Outputs of other types, such as a plain tensor, stay as they are.
    """
    if isinstance(outputs, dict):
        present = outputs.get(name)
        outputs[name] = value if present is None else present + value


def checkpointing_is_on(model: nn.Module) -> bool:
    """Tell whether a transformers model recomputes activations (the flag is set on each block that does)."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def world_size_of(trainer: Any) -> int:
    """Return the factor by which Trainer multiplies a token-normalised loss to undo DDP's averaging (else 1)."""
    if not trainer.args.average_tokens_across_devices:
        return 1
    if trainer.args.n_gpu > 1:
        return trainer.args.n_gpu
    processes = trainer.accelerator.num_processes
    return processes // trainer.get_tp_size() if hasattr(trainer, "get_tp_size") else processes


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


def embeddings_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of the input and output embeddings of a transformers model, wrapped or not, by path."""
    found = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        with suppress(AttributeError, NotImplementedError):  # not a transformers model, or one without them
            found.append(getattr(model, name)())
    return {
        f"{path}.{name}": weight
        for path, module in model.named_modules()
        if any(module is embedding for embedding in found)
        for name, weight in module.named_parameters(recurse=False)
    }


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
