"""Base models and tokenizers for the command line: loaded once, checked, and with errors that name the next step.

Code that comes with a model is never run (`trust_remote_code` stays off everywhere).
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ConfigError, MoloraError, did_you_mean
from ..wrapping import wrap

if TYPE_CHECKING:
    from collections.abc import Iterator

    from peft import PeftModel
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from ..config import MoloraConfig
    from .tasks import LabelMap

QUANTIZE = ("none", "4bit", "8bit")
DTYPES = ("auto", "float32", "bfloat16", "float16")
# Heads are new or tiny, so they are never quantised; PEFT trains and saves the first two whole.
HEADS = ("classifier", "score", "lm_head")


@dataclass
class Base:
    """A loaded base model.

    Attributes:
        model: in eval mode, in memory, not wrapped.
        tokenizer: with a pad token.
        task_type: seq_cls, causal_lm or seq2seq_lm.
        fresh: paths of modules that the model's files did not hold, so they start at random.
        notes: what a user should be told.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task_type: str
    fresh: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the loading bars and reports of transformers inside the block; what matters is in `Base.notes`."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load_config(name: str) -> PretrainedConfig:
    """Read a model's config; raise ConfigError when there is no such model or it needs code of its own."""
    from transformers import AutoConfig

    folder = Path(name).expanduser()
    if not folder.is_dir():
        if folder.exists():
            raise ConfigError(f"model '{name}' is a file; give the folder that holds config.json and the weights")
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise ConfigError(f"model folder '{name}' does not exist; give a folder or the name of a Hub model")
    elif not (folder / "config.json").is_file():
        raise ConfigError(f"model folder '{name}' holds no config.json; give a folder written by save_pretrained")
    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(folder if folder.is_dir() else name, trust_remote_code=False)
    except Exception as error:  # the Hub, the network, JSON and transformers each fail in their own way
        raise ConfigError(_cannot_load(name, "config", error)) from error


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer and give it a pad token: its own, else its eos.

    Raises:
        ConfigError: there is no tokenizer, or it has neither a pad nor an eos token.
    """
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(Path(name).expanduser(), trust_remote_code=False)
    except Exception as error:
        hint = "; save one there with tokenizer.save_pretrained(folder)" if Path(name).is_dir() else ""
        raise ConfigError(_cannot_load(name, "tokenizer", error) + hint) from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ConfigError(
                f"the tokenizer of '{name}' has neither a pad nor an eos token, so rows of different length cannot "
                "be put into one batch; set tokenizer.pad_token and save it"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(
    name: str,
    task_type: str,
    *,
    config: PretrainedConfig | None = None,
    label_map: LabelMap | None = None,
    quantize: str | None = None,
    dtype: str = "auto",
    tokenizer_from: str | None = None,
) -> Base:
    """Load a base model and its tokenizer.

    Args:
        name: a folder or the name of a Hub model.
        task_type: seq_cls (needs `label_map`), causal_lm or seq2seq_lm.
        quantize: 4bit or 8bit, through bitsandbytes; None or `none` leaves the base as it is.
        dtype: of the base weights; `auto` is float32 on a CPU (bfloat16 is many times slower there) and the
            model's own elsewhere.
        tokenizer_from: where the tokenizer is, when not with the model.

    Raises:
        ConfigError: anything that cannot work, with the next step.
    """
    import transformers

    quantize = None if quantize == "none" else quantize
    config = config or load_config(name)
    tokenizer = load_tokenizer(tokenizer_from or name)
    loader = {
        "seq_cls": transformers.AutoModelForSequenceClassification,
        "causal_lm": transformers.AutoModelForCausalLM,
        "seq2seq_lm": transformers.AutoModelForSeq2SeqLM,
    }[task_type]
    options: dict[str, Any] = {"dtype": as_dtype(dtype), "trust_remote_code": False, "output_loading_info": True}
    if task_type == "seq_cls":
        if label_map is None:
            raise ConfigError("a classifier needs its labels; labels.json beside the adapter holds them")
        names = label_map.names
        options |= {"num_labels": len(names), "ignore_mismatched_sizes": True}
        options |= {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    model, fresh = load_with(loader, name, options, quantize)
    for place in (model.config, model.config.get_text_config()):
        place.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    notes = [f"new in this model, trained and saved whole: {', '.join(fresh)}"] if fresh else []
    return Base(model.eval(), tokenizer, task_type, fresh, notes)


def load_with(loader: Any, name: str, options: dict[str, Any], quantize: str | None) -> tuple[Any, list[str]]:
    """Return (model, paths of modules that start at random); new modules are never quantised."""
    keep = list(HEADS)
    for _ in range(2):
        now = options | ({} if quantize is None else {"quantization_config": _quantization(quantize, keep)})
        try:
            with quiet_transformers():
                model, info = loader.from_pretrained(Path(name).expanduser(), **now)
        except Exception as error:
            raise ConfigError(_cannot_load(name, "model", error)) from error
        missing = [*info["missing_keys"], *(_first(key) for key in info["mismatched_keys"])]
        fresh = sorted({key.rpartition(".")[0] for key in missing})
        packed = [path for path in fresh if path and _is_packed(model.get_submodule(path))]
        if not packed:
            return model, [path for path in fresh if path]
        keep += packed
    raise ConfigError(
        f"new modules of '{name}' cannot be kept in full precision: {', '.join(packed)}; leave out --quantize"
    )


def _first(key: Any) -> str:
    return key if isinstance(key, str) else key[0]  # mismatched keys come with their two shapes


def _is_packed(module: nn.Module) -> bool:
    return type(module).__module__.startswith("bitsandbytes")


def _quantization(quantize: str, keep: list[str]) -> Any:
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    if quantize not in QUANTIZE:
        raise ConfigError(f"quantize '{quantize}' is unknown{did_you_mean(quantize, QUANTIZE)}")
    if not is_bitsandbytes_available():
        raise ConfigError("--quantize needs bitsandbytes; install it with pip install 'molora[quant]'")
    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=keep)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
        llm_int8_skip_modules=keep,
    )


def as_dtype(dtype: str) -> Any:
    """Return what transformers calls a dtype; `auto` as in `load_base`."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype '{dtype}' is unknown{did_you_mean(dtype, DTYPES)}")
    if dtype != "auto":
        return getattr(torch, dtype)
    return "auto" if torch.accelerator.is_available() else torch.float32


def longest(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> int | None:
    """Return how many tokens the model can take at most; None when nothing says so."""
    limits = [tokenizer.model_max_length, getattr(config.get_text_config(), "max_position_embeddings", None)]
    # tokenizers without a limit say 1e30
    known = [int(limit) for limit in limits if isinstance(limit, int) and 0 < limit < 10**9]
    return min(known) if known else None


def wrap_base(base: Base, config: MoloraConfig) -> PeftModel:
    """Put routed experts into a loaded base; modules that start at random are trained and saved with the adapter.

    Raises:
        ConfigError: as `molora.wrap`, and when PEFT refuses, for example because target_modules match nothing.
    """
    extra = fresh_to_save(base.fresh, config.modules_to_save)
    if extra:
        config.modules_to_save = [*(config.modules_to_save or []), *extra]
    try:
        return wrap(base.model, config)
    except MoloraError:
        raise
    except ValueError as error:  # PEFT's own refusals, such as target_modules that match nothing
        raise ConfigError(f"the recipe does not fit this model: {' '.join(str(error).split())}") from error


def fresh_to_save(fresh: list[str], saved: list[str] | None) -> list[str]:
    """Return the modules that start at random and that neither PEFT nor the recipe would save.

    PEFT saves `classifier` and `score` of classifiers; others (a missing pooler, DistilBERT's pre_classifier) would
    start at random again whenever the adapter is loaded.
    """
    names = {*HEADS[:2], *(saved or [])}
    return [path for path in fresh if not names & {*path.split("."), path}]


def _cannot_load(name: str, what: str, error: Exception) -> str:
    """One line on why a part of a model could not be loaded."""
    reason = " ".join(str(error).split())
    if "trust_remote_code" in reason or "custom code" in reason:
        return f"model '{name}' needs code of its own, which molora never runs; choose a model that transformers knows"
    if isinstance(error, OSError) and not Path(name).is_dir():
        offline = "; HF_HUB_OFFLINE is set" if _is_offline() else ""
        return f"there is no model folder '{name}', and the Hub gave no such model{offline}: {reason[:200]}"
    return f"cannot load the {what} of '{name}': {type(error).__name__}: {reason[:300]}"


def _is_offline() -> bool:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return bool(HF_HUB_OFFLINE)
