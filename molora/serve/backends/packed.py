"""A model that reads packed batches over a paged cache, and why a model cannot.

A packed batch is one row (1, T): one token of each sequence that is being answered, then pieces of prompts.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.programs import Composer
from . import attention, paged
from .attention import Packed, Piece, packed

PROBE_PAGE = 4
PROBES = (("a", 1, 8), ("b", 2, 7))  # name, first token, length
#: Batches of the trial, as (name, from, to): a whole prompt beside a piece, one token beside a piece, two tokens.
PROBE_STEPS = ((("a", 0, 6), ("b", 0, 3)), (("a", 6, 7), ("b", 3, 6)), (("a", 7, 8), ("b", 6, 7)))
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # of the largest logit; half precision: 5e-2


class PackedModel:
    """A causal language model over a paged cache.

    Args:
        model: wrapped by molora or not.
        kv_bytes, places, page: see `paged.Pages`.
    """

    def __init__(self, model: nn.Module, kv_bytes: int, places: int, page: int) -> None:
        self.model, self.base = model.eval(), base_of(model)
        self.device = next(self.base.parameters()).device
        self._was = self.base.config._attn_implementation
        config = self.base.config.get_text_config()
        self.pages = paged.Pages(config, self.base.dtype, self.device, kv_bytes, places, page)
        if self._was != attention.NAME:
            self.base.set_attn_implementation(attention.NAME)
        # a mask of four axes is passed on as it is; without one, models would make one for the packed row
        self._mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)
        self._keeps = "logits_to_keep" in inspect.signature(self.base.forward).parameters

    def __call__(self, single: Sequence[Piece], pieces: Sequence[Piece], last: Sequence[int]) -> Tensor:
        """Read a batch; return logits (n, V).

        Args:
            single: sequences with one token each, which come first.
            pieces: of prompts, after them.
            last: the places among all tokens whose logits are asked for.
        """
        every = [*single, *pieces]
        ids = [token for piece in every for token in piece.ids]
        positions = [at for piece in every for at in range(piece.past, piece.past + len(piece.ids))]
        wanted = torch.tensor(last, device=self.device, dtype=torch.long)
        with torch.no_grad(), packed(Packed(self.pages, single, pieces, self.device)):
            logits = self.model(
                input_ids=torch.tensor([ids], device=self.device),
                position_ids=torch.tensor([positions], device=self.device),
                attention_mask=self._mask,
                use_cache=False,
                **({"logits_to_keep": wanted} if self._keeps else {}),
            ).logits[0]
        return logits if self._keeps else logits[wanted]

    def close(self) -> None:
        """Give the model its attention back."""
        if self.base.config._attn_implementation != self._was:
            self.base.set_attn_implementation(self._was)


def base_of(model: nn.Module) -> Any:
    """Return the transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def why_not(model: nn.Module) -> str | None:
    """Return why a model cannot be served by continuous batching; None when it can.

    After the reasons that can be read off, the model is tried: two prompts in packed rows, one of them in pieces, must
    get the logits that each gets alone.
    """
    base = base_of(model)
    reason = _unfit(base) or paged.missing()
    if reason is not None:
        return reason
    was = base.config._attn_implementation
    try:
        return _probe(model)
    except Exception as error:  # whatever goes wrong here would go wrong for every request
        return f"{type(base).__name__} failed on a packed batch: {type(error).__name__}: {error}"
    finally:
        if base.config._attn_implementation != was:
            base.set_attn_implementation(was)


def _unfit(base: Any) -> str | None:
    kind, config = type(base).__name__, getattr(base, "config", None)
    if config is None or not getattr(base, "can_generate", lambda: False)():
        return f"{kind} does not generate text"
    if config.is_encoder_decoder:
        return f"{kind} has an encoder, whose output does not grow by tokens"
    if getattr(base, "_is_stateful", False):
        return f"{kind} keeps a state for each sequence, as Mamba does, which has no pages"
    if config._attn_implementation not in ("sdpa", attention.NAME):
        hint = "load it with attn_implementation='sdpa'" if base._supports_sdpa else "it has no sdpa"
        return f"{kind} attends by '{config._attn_implementation}', and only sdpa can be replaced: {hint}"
    if _rope_types(config.get_text_config()) & {"dynamic", "longrope"}:
        return f"the rotary positions of {kind} follow the longest sequence of a batch, so requests would change others"
    return None


def _rope_types(config: Any) -> set[str]:
    """Return the kinds of rotary positions of a model: one for all layers, or one for each kind of layers."""
    told = getattr(config, "rope_parameters", None) or {}
    return {part["rope_type"] for part in (told, *told.values()) if isinstance(part, dict) and "rope_type" in part}


@torch.no_grad()
def _probe(model: nn.Module) -> str | None:
    """Return what is wrong with the logits of packed batches; None when they are those of plain forwards."""
    base, composer = base_of(model), Composer(model)
    kind, config = type(base).__name__, base.config.get_text_config()
    prompts = {name: [(5 * i + first) % config.vocab_size for i in range(n)] for name, first, n in PROBES}
    sizes = paged.bytes_per_block(config, base.dtype, PROBE_PAGE)
    reader = PackedModel(model, math.lcm(*sizes.values(), 128) * (2 + 8 * len(sizes)), len(prompts), PROBE_PAGE)
    if base.config._attn_implementation != attention.NAME:
        return f"{kind} does not let its attention be replaced"
    with composer.acting((), ()):
        alone = {
            name: model(input_ids=torch.tensor([ids], device=reader.device), use_cache=False).logits[0]
            for name, ids in prompts.items()
        }
        for name, ids in prompts.items():
            reader.pages.open(name, b"", len(ids))
        found = []
        for steps in PROBE_STEPS:
            batch = [Piece(name, past, prompts[name][past:until]) for name, past, until in steps]
            for piece in batch:
                reader.pages.grow(piece.sequence, piece.past, len(piece.ids))
            single = [piece for piece in batch if len(piece.ids) == 1]
            pieces = [piece for piece in batch if len(piece.ids) > 1]
            ends, places = 0, []
            for piece in [*single, *pieces]:
                ends += len(piece.ids)
                places.append(ends - 1)
            logits = reader(single, pieces, places)
            expected = [alone[piece.sequence][piece.past + len(piece.ids) - 1] for piece in [*single, *pieces]]
            found.append(float((logits - torch.stack(expected)).abs().max() / torch.stack(expected).abs().max()))
    allowed = TOLERANCE.get(base.dtype, 5e-2)
    if not max(found) <= allowed:
        return (
            f"the logits of {kind} in a packed batch are not those of a plain forward: they differ by "
            f"{max(found):.1%} of the largest"
        )
    return None
