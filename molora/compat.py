"""The few places that touch the internals of PEFT and transformers, each with its reason.

If a new version of either breaks molora, the mend belongs here. tests/test_compat.py fails loudly when one of the
assumptions no longer holds.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
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

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return all arguments by name."""
        return {**dict(zip(self.names, args, strict=False)), **kwargs}


def labels_are_shifted(model: nn.Module) -> bool:
    """Tell whether the model's loss shifts labels by one, by the rule of transformers' Trainer.

    Trainer counts `labels[..., 1:]` for such models and all labels for others; the token share must count likewise.
    """
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    shifts = LOSS_MAPPING.get(getattr(model, "loss_type", None)) is ForCausalLMLoss
    return shifts and not is_encoder_decoder(model)


def loss_is_shifted(model: nn.Module) -> bool:
    """Tell whether the model's own loss compares each position with the label after it.

    Not the rule that Trainer counts by: a class whose name says nothing (GPT2LMHeadModel) gets the causal loss too.
    """
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    loss = LOSS_MAPPING.get(getattr(model, "loss_type", None) or "ForCausalLM")
    return loss is ForCausalLMLoss and generates(model) and not is_encoder_decoder(model)


def generates(model: nn.Module) -> bool:
    """Tell whether a model continues a prompt, so that its labels tell the prompt from the answer."""
    return bool(hasattr(model, "can_generate") and model.can_generate())


def is_encoder_decoder(model: nn.Module) -> bool:
    """Tell whether a model has an encoder and a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def looks_both_ways(model: nn.Module) -> bool:
    """Tell whether every attention of a model sees the whole input (BERT, encoders); False when there is none."""
    causal = [module.is_causal for module in model.modules() if hasattr(module, "is_causal")]
    return bool(causal) and not any(causal)


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


class _Followed:
    """A method of one cache that tells somebody which rows of it were picked."""

    def __init__(self, cache: Any, name: str, told: Callable[[Any, Any], None]) -> None:
        self.cache, self.name, self.told = weakref.ref(cache), name, told

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method of the class, then tell."""
        cache = self.cache()
        result = getattr(type(cache), self.name)(cache, *args, **kwargs)
        rows = next(iter((*args, *kwargs.values())), None) if self.name in _ROWS_PICKED else None
        self.told(cache, rows)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Leave a copied cache its own method."""
        copied = memo.get(id(self.cache()))
        return getattr(type(copied), self.name).__get__(copied)


# Methods of transformers' caches that pick rows (beam search), and those that change them in other ways.
_ROWS_PICKED = ("reorder_cache", "batch_select_indices")
_ROWS_CHANGED = ("crop", "batch_repeat_interleave", "reset")


def follow_rows(cache: Any, told: Callable[[Any, Any], None]) -> None:
    """Let `told(cache, rows)` know when a cache picks rows (beam search does, without a word to the model).

    `rows` is the tensor of picked rows, or None for any other change that is not a forward.
    """
    for name in (*_ROWS_PICKED, *_ROWS_CHANGED):
        if hasattr(type(cache), name) and name not in vars(cache):
            setattr(cache, name, _Followed(cache, name, told))


def self_attentions(model: nn.Module) -> dict[str, nn.Module]:
    """Return the self-attention modules of a model by path: the innermost ones called so, without cross-attention."""
    called = {
        path: module
        for path, module in model.named_modules()
        if "Attention" in type(module).__name__ and PREFIX not in path
    }
    return {
        path: module
        for path, module in called.items()
        if not any(other.startswith(f"{path}.") for other in called)
        and not any(segment in CROSS_ATTENTION for segment in path.split("."))
    }


def use_eager_attention(model: nn.Module) -> None:
    """Switch a transformers model to the only attention that gives its weights away."""
    if getattr(getattr(model, "config", None), "_attn_implementation", "eager") != "eager":
        model.set_attn_implementation("eager")


def weights_of_attention(output: Any) -> Tensor | None:
    """Return the weights (B, heads, S, P + S) in what an attention module returned, None when it gave none."""
    last = output[-1] if isinstance(output, tuple) and len(output) > 1 else None
    return last if isinstance(last, Tensor) and last.dim() == 4 else None


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


def shifted_labels(model: Any, labels: Tensor) -> Tensor | None:
    """Return the decoder's ids (B, S) that an encoder-decoder makes of its labels; None when it has no such way."""
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    return shift(labels=labels) if shift is not None and labels.dim() == 2 else None


def vocabulary_of(model: Any) -> int | None:
    """Return how many token ids a model knows; None when it reads no tokens."""
    config = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()  # models of images and text keep it one level down
    size = getattr(config, "vocab_size", None)
    return size if isinstance(size, int) and size > 0 else None


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


def keep_columns(trainer: Any, names: Sequence[str]) -> None:
    """Let Trainer keep columns of the data that are no arguments of the model; it drops the others by default."""
    trainer._set_signature_columns_if_needed()
    trainer._signature_columns = list(dict.fromkeys([*trainer._signature_columns, *names]))


def accumulation_left_to_the_loss(trainer: Any, total: Any) -> int:
    """Return by what a mean over a micro-batch must be divided because Trainer does not (see its `training_step`)."""
    told = getattr(trainer, "loss_is_scaled_for_ga", None)
    scaled = (trainer.model_accepts_loss_kwargs and total is not None) or trainer.compute_loss_func is not None
    return trainer.current_gradient_accumulation_steps if (scaled if told is None else told) else 1


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
    found = [getattr(embedding, "base_layer", embedding) for embedding in found]
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


# --- native mixtures of experts: 3-D parameters ---------------------------------------------------------------------


def native_experts(module: nn.Module) -> dict[str, tuple[int, int]] | None:
    """Return {parameter: (d_in, d_out)} of a module of stacked native experts, wrapped or not; None for others.

    These are the classes under transformers' `use_experts_implementation` (Mixtral, Qwen-MoE, ...): whatever they look
    like inside, transformers itself replaces their forward by the grouped one that `run_native_experts` follows.
    """
    while hasattr(module, "base_layer"):
        module = module.base_layer
    facts = ("has_gate", "has_bias", "is_transposed", "num_experts", "_apply_gate", "_is_expert_parallel")
    if not all(hasattr(module, fact) for fact in facts) or module._is_expert_parallel:
        return None
    sizes = {}
    for name in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
        weight = getattr(module, name, None)
        if not isinstance(weight, Tensor) or weight.dim() != 3 or weight.element_size() < 2:
            return None  # quantised to less than 16 bits
        if not weight.is_floating_point():
            return None
        sizes[name] = tuple(weight.shape[1:]) if module.is_transposed else (weight.shape[2], weight.shape[1])
    return sizes  # type: ignore[return-value]


def run_native_experts(module: nn.Module, x: Tensor, index: Tensor, weights: Tensor, add: Any) -> Tensor:
    """Run stacked native experts as transformers' grouped forward does, with something added to each product.

    Args:
        module: the module of the experts (see `native_experts`).
        x: (N, d); index, weights: (N, k), the native router's choice.
        add: called as `add(parameter, y, rows, expert, token)` with y (M, d_out) the product of the M = N k sorted
            rows (M, d_in) and the 3-D parameter of that name, the native expert and the token of each row; returns
            what takes the place of y.

    Returns:
        (N, d).
    """
    from transformers.integrations.moe import _grouped_linear

    k = index.shape[-1]
    expert, order = torch.sort(index.reshape(-1), stable=True)
    token = order // k
    ends = torch.bincount(expert, minlength=module.num_experts).cumsum(0).to(torch.int32)
    rows = x.index_select(0, token)
    up, down = native_experts(module) or ()
    for name in (up, down):
        bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
        weight = getattr(module, name)
        y = add(name, _grouped_linear(rows, weight, ends, bias, module.is_transposed), rows, expert, token)
        rows = y if name == down else module._apply_gate(y) if module.has_gate else module.act_fn(y)
    if getattr(module, "has_post_expert_norm", False):
        rows = module.post_expert_norm(rows)
    weighted = rows * weights.reshape(-1)[order][:, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return weighted[back].view(len(x), k, -1).sum(1).to(x.dtype)
