"""X-LoRA (arXiv 2402.07148): the model runs once without adapters, and a small head on its last states mixes them.

    S[t, l, e] = softmax_e( head(H_last[t]) / temperature )        y_l = W x + g sum_e S[t, l, e] s_e B_e A_e x

Only the head is trained, and it is saved with the adapter. Each forward costs two; in generation a second key-value
cache is kept beside the model's own (see molora/first_pass.py), so that it stays linear in the length.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..compat.models import is_encoder_decoder
from ..control import tuner_of
from ..errors import ConfigError, raise_all
from .rerouting import expert_names, posthoc_routers, reroute


@posthoc_routers.register("xlora")
def build(
    model: nn.Module,
    adapter: str = "default",
    *,
    depth: int = 1,
    width: int = 2048,
    dropout: float = 0.2,
    per_layer: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    renormalise: bool = True,
    weight: float = 1.0,
    size: int | None = None,
    train_experts: bool = False,
) -> nn.Module:
    """Route a mixture by X-LoRA; the head starts as torch draws it, and training it is up to any trainer.

    PEFT's defaults are these, except that with `top_k` its weights sum to less than 1 unless it takes a second softmax
    of the probabilities (`enable_softmax_topk`), which makes them nearly even. Here the k probabilities are divided by
    their sum per token, which is the softmax of the k logits.

    Args:
        model: a mixture, as `molora.import_peft` makes it.
        adapter: the name of the mixture.
        depth: linear maps of the head.
        width: of the layers between.
        dropout: between them, in training.
        per_layer: weights of their own for each wrapped layer; otherwise all layers use the same.
        temperature: divides the logits.
        top_k: how many experts stay; none for all.
        renormalise: whether the weights of those that stay sum to 1.
        weight: g, which multiplies all weights.
        size: of the model's last states; read from its config when not given.
        train_experts: train the experts, too.

    Returns:
        The model. Its optimizer must be made anew.

    Raises:
        ConfigError: options that cannot work with this mixture; nothing is changed.
    """
    base = tuner_of(model).model
    experts = len(expert_names(model, adapter))
    size = size if size is not None else hidden_size(base)
    problems = []
    if is_encoder_decoder(base):
        problems.append(f"{type(base).__name__} has an encoder and a decoder, and X-LoRA knows one stack of states")
    if size is None:
        problems.append(f"the config of {type(base).__name__} does not tell its hidden size; pass size=")
    if top_k is not None and not 1 <= top_k <= experts:
        problems.append(f"top_k must be between 1 and the number of experts {experts}, got {top_k}")
    raise_all(problems, ConfigError, "X-LoRA cannot route this mixture")
    selector: dict[str, Any] = {"name": "top_k", "k": top_k or experts, "scale": float(weight)}
    selector["normalise"] = "sum1" if top_k and renormalise else "none"
    reroute(
        model,
        adapter,
        feature={"name": "first_pass", "size": size},
        scorer={"name": "xlora", "depth": depth, "width": width, "dropout": dropout},
        link={"name": "softmax", "temperature": temperature},
        selector=selector,
        share="model",
        per_site=per_layer,
        experts={"frozen": [] if train_experts else "all"},
    )
    return model


def hidden_size(base: nn.Module) -> int | None:
    """Return the size of the last states of a transformers model by its config, None when it does not tell."""
    config = getattr(base, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return next(
        (n for name in ("hidden_size", "d_model", "n_embd") if isinstance(n := getattr(config, name, None), int)), None
    )
