"""Which task a model is loaded for: what its data and its architecture allow."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TASK_TYPES = ("auto", "seq_cls", "causal_lm", "seq2seq_lm")


def resolve_task_type(wanted: str, kind: str, config: PretrainedConfig) -> str:
    """Return the task type for this kind of data and this model.

    Args:
        wanted: auto, or what the user insists on.
        kind: of the data: classification, generation or lm.
        config: the model's config.

    Raises:
        ConfigError: data, model and wish do not go together.
    """
    if wanted not in TASK_TYPES:
        raise ConfigError(f"task type '{wanted}' is unknown{did_you_mean(wanted, TASK_TYPES)}")
    pairs = bool(getattr(config, "is_encoder_decoder", False))
    natural = "seq_cls" if kind == "classification" else "seq2seq_lm" if pairs else "causal_lm"
    if wanted not in ("auto", natural):
        if (wanted == "seq_cls") != (natural == "seq_cls"):
            needs = "text + label" if wanted == "seq_cls" else "prompt + answer, or text alone"
            raise ConfigError(f"task type {wanted} needs rows with {needs}, but this is {kind} data; use {natural}")
        what = "an encoder-decoder" if pairs else "not an encoder-decoder"
        raise ConfigError(f"task type {wanted} does not fit: model type '{config.model_type}' is {what}; use {natural}")
    _check_architecture(natural, config)
    return natural


def _check_architecture(task_type: str, config: PretrainedConfig) -> None:
    from transformers.models.auto import modeling_auto as auto

    kind = config.model_type
    if task_type == "seq_cls":
        if kind not in auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
            raise ConfigError(f"transformers has no classifier for model type '{kind}'; choose another base model")
    elif task_type == "causal_lm":
        # Encoders such as BERT also have a causal class, which makes no sense of their weights.
        masked = kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
        if masked or kind not in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            why = "is an encoder" if masked else "has no generating class"
            raise ConfigError(
                f"model type '{kind}' {why} and cannot generate text; give a decoder or an encoder-decoder as --model, "
                "or classification data (text + label)"
            )
    elif kind not in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        raise ConfigError(f"transformers has no generating class for model type '{kind}'; choose another base model")
