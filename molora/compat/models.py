"""What transformers' models say of themselves: their arguments, losses, encoders, attentions and embeddings."""

from __future__ import annotations

import inspect
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from .registration import PREFIX

# Path segments by which transformers names attention over encoder states, and its key and value projections. They
# matter only for which mask describes a layer's input in encoder-decoder models.
CROSS_ATTENTION = ("EncDecAttention", "encoder_attn", "crossattention", "cross_attn", "multihead_attn")


KEY_VALUE = ("k", "v", "k_proj", "v_proj", "key", "value", "kv", "kv_proj")


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
