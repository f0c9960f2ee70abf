"""Decoder: runs any generating model of transformers on a batch of prompts, one token of each row at a time.

The model makes its own cache, so sliding windows, hybrids and state-space models work as they do in generate(). Rows
that have ended are taken out of the cache between two tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CACHES = ("past_key_values", "cache_params")  # under which names models return their cache and take it back
MARGIN = 1e-3  # of the largest logit, within which a padded row counts as equal to one without padding


@dataclass
class State:
    """Where a batch of B rows is.

    Attributes:
        cache: what the model returned, by the name of its argument.
        mask: (B, S) of the tokens so far, 0 at padding; of the encoder's input in encoder-decoders.
        encoded: (B, S, d) of the encoder; None without one.
    """

    cache: dict[str, Any]
    mask: Tensor
    encoded: Tensor | None = None


class Decoder:
    """Runs one model.

    Args:
        model: of transformers, not PEFT's wrapper; it stays in eval mode.
        pad_id: any token; it fills rows up.
    """

    def __init__(self, model: nn.Module, pad_id: int = 0) -> None:
        self.model: Any = model
        self.pad_id = pad_id
        self.is_pair = bool(getattr(model.config, "is_encoder_decoder", False))
        accepted = inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._positions = "position_ids" in accepted and not self.is_pair
        generation = getattr(model, "generation_config", None)
        start = getattr(generation, "decoder_start_token_id", None)
        start = getattr(model.config, "decoder_start_token_id", None) if start is None else start
        self.start_id = pad_id if start is None else int(start[0] if isinstance(start, list) else start)

    @property
    def device(self) -> torch.device:
        """Where its inputs belong."""
        return next(self.model.parameters()).device

    @torch.inference_mode()
    def begin(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, State]:
        """Read prompts; return the logits (B, V) of the next token of each, and where the batch is."""
        ids, mask = pad(prompts, self.pad_id, left=not self.is_pair, device=self.device)
        if not self.is_pair:
            return self._forward(ids, State({}, mask), True)
        encoder = self.model.get_encoder()
        state = State({}, mask, encoder(input_ids=ids, attention_mask=mask, return_dict=True)[0])
        start = torch.full((len(prompts), 1), self.start_id, device=self.device)
        return self._forward(start, state, True)

    @torch.inference_mode()
    def step(self, state: State, tokens: Sequence[int]) -> tuple[Tensor, State]:
        """Read one more token of each row; return the logits (B, V) of the next, and where the batch is."""
        ids = torch.tensor(tokens, device=self.device)[:, None]
        if not self.is_pair:
            state.mask = torch.cat([state.mask, state.mask.new_ones(len(tokens), 1)], 1)
        return self._forward(ids, state, False)

    def pick(self, state: State, rows: Sequence[int]) -> None:
        """Keep the given rows only, in the given order."""
        kept = torch.tensor(rows, device=self.device)
        for cache in state.cache.values():
            cache.reorder_cache(kept)
        state.mask = state.mask[kept]
        if state.encoded is not None:
            state.encoded = state.encoded[kept]

    def _forward(self, ids: Tensor, state: State, first: bool) -> tuple[Tensor, State]:
        given: dict[str, Any] = {"attention_mask": state.mask, "use_cache": True, **state.cache}
        if self._positions:
            given["position_ids"] = (state.mask.cumsum(-1) - 1).clamp(min=0)
        if state.encoded is not None:
            from transformers.modeling_outputs import BaseModelOutput

            given["encoder_outputs"] = BaseModelOutput(last_hidden_state=state.encoded)
        inputs = self.model.prepare_inputs_for_generation(
            ids, next_sequence_length=ids.shape[1], is_first_iteration=first, **given
        )
        outputs = self.model(**{**inputs, **self._last_only}, return_dict=True)
        state.cache = {name: outputs[name] for name in CACHES if outputs.get(name) is not None}
        return outputs.logits[:, -1], state

    # --- what a model is like -------------------------------------------------------------------------------------

    def takes_padding(self) -> bool:
        """Tell, by trying, whether rows of unequal lengths may share a batch."""
        short, long = [1, 2, 3], [3, 2, 1, 2, 3, 1]
        short, long = ([id % self._vocabulary() for id in ids] for ids in (short, long))
        try:
            alone, _ = self.begin([short])
            together, state = self.begin([short, long])
            self.pick(state, [0])
            after, _ = self.step(state, [short[0]])
            expected, _ = self.step(self.begin([short])[1], [short[0]])
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):
            return False
        scale = MARGIN * max(1.0, float(alone.abs().max()))
        return all(
            bool(((left - right).abs() < scale).all()) for left, right in ((together[:1], alone), (after, expected))
        )

    def bytes_per_token(self) -> tuple[int, int]:
        """Return, by trying, the bytes of cache that a token takes, and those that a row takes on top of it."""
        sizes = [self._bytes(self.begin([[1] * length])[1]) for length in (4, 8)]
        per_token = -(-(sizes[1] - sizes[0]) // 4)
        return per_token, max(0, sizes[0] - 4 * per_token)

    def _vocabulary(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[0])

    @staticmethod
    def _bytes(state: State) -> int:
        found: dict[int, int] = {}
        _weigh(list(state.cache.values()), found, set())
        encoded = 0 if state.encoded is None else state.encoded.nbytes
        return sum(found.values()) + encoded


def pad(
    prompts: Sequence[Sequence[int]], pad_id: int, left: bool, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Return token ids (B, S) and their mask (B, S), filled up on one side."""
    longest = max(len(prompt) for prompt in prompts)
    ids, mask = [], []
    for prompt in prompts:
        fill = longest - len(prompt)
        before, after = ([pad_id] * fill, []) if left else ([], [pad_id] * fill)
        ids.append([*before, *prompt, *after])
        mask.append([0] * len(before) + [1] * len(prompt) + [0] * len(after))
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _weigh(part: Any, found: dict[int, int], seen: set[int]) -> None:
    """Note the bytes of every tensor inside of a cache, each once."""
    if isinstance(part, Tensor):
        found[id(part)] = part.nbytes
    elif id(part) not in seen:
        seen.add(id(part))
        if isinstance(part, dict):
            inside = list(part.values())
        elif isinstance(part, (list, tuple)):
            inside = list(part)
        elif hasattr(part, "layers") or hasattr(part, "self_attention_cache") or "Layer" in type(part).__name__:
            inside = list(vars(part).values())
        else:
            return
        for one in inside:
            _weigh(one, found, seen)
