"""Attention of a packed batch: sequences that read one token each, all at once, then pieces of prompts one by one.

It is registered with transformers under NAME and does what `sdpa` does whenever no packed batch is open, so a model
that is switched to it can be used as before. transformers' own attention over a paged cache masks one product of all
tokens with the keys of all sequences, so that a decoded token pays for its neighbours' keys.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .paged import Pages

NAME = "molora_packed"
_open = threading.local()


@dataclass(frozen=True)
class Piece:
    """Tokens of one sequence in a packed batch.

    Attributes:
        sequence: its name in the cache.
        past: how many of its tokens come before and have keys there.
        ids: the tokens.
    """

    sequence: str
    past: int
    ids: list[int]

    @property
    def count(self) -> int:
        """How many tokens."""
        return len(self.ids)


@dataclass(frozen=True)
class _Part:
    """A piece of a prompt: its tokens, its keys, and which of them each token sees (None: all before it)."""

    tokens: slice
    keys: slice
    mask: Tensor | None


@dataclass(frozen=True)
class _View:
    """The batch as layers of one kind of attention see it."""

    read: Tensor
    write: Tensor
    width: int
    mask: Tensor | None
    parts: list[_Part]


class Packed:
    """Where the tokens of a packed batch read and write their keys.

    Args:
        pages: the cache; it has grown for all pieces.
        single: sequences of one token each; they come first in the batch.
        pieces: of prompts.
        device: of the model.
    """

    def __init__(self, pages: Pages, single: Sequence[Piece], pieces: Sequence[Piece], device: torch.device) -> None:
        self.pages, self.single = pages, len(single)
        self.views = {kind.index: self._view(kind, single, pieces, device) for kind in pages.kinds}

    def _view(self, kind: Any, single: Sequence[Piece], pieces: Sequence[Piece], device: torch.device) -> _View:
        read: list[int] = []
        write: list[int] = []
        found = [self.pages.places(kind, piece.sequence, piece.past, 1) for piece in single]
        lengths = [len(seen) for seen, _ in found]
        width, mask = max(lengths, default=0), None
        for seen, own in found:
            read += seen + [kind.read_trash_index] * (width - len(seen))
            write += own
        if lengths and min(lengths) < width:
            mask = (torch.arange(width) < torch.tensor(lengths)[:, None])[:, None, None].to(device)
        parts, token = [], len(single)
        for piece in pieces:
            seen, own = self.pages.places(kind, piece.sequence, piece.past, piece.count)
            whole = len(seen) == piece.count and getattr(kind, "sliding_window", piece.count) >= piece.count
            parts.append(
                _Part(
                    slice(token, token + piece.count),
                    slice(len(read), len(read) + len(seen)),
                    None if whole else _causal(piece.count, len(seen), kind).to(device),
                )
            )
            read += seen
            write += own
            token += piece.count
        return _View(torch.tensor(read, device=device), torch.tensor(write, device=device), width, mask, parts)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Return the output (1, T, heads, width) for query (1, heads, T, width) and the keys and values of T tokens."""
        view = self.views[self.pages.by_layer[layer].index]
        keys, values = self.pages.update(layer, key[0].transpose(0, 1), value[0].transpose(0, 1), view.read, view.write)
        tokens, heads, few = query.shape[2], query.shape[1], keys.shape[1]
        outs, one = [], self.single
        if one:
            # heads that share a key are rows of one product, so keys are not repeated
            q = query[0, :, :one].transpose(0, 1).reshape(one, few, heads // few, -1)
            k, v = (t[: one * view.width].view(one, view.width, few, -1).transpose(1, 2) for t in (keys, values))
            out = scaled_dot_product_attention(q, k, v, attn_mask=view.mask, scale=scaling)
            outs.append(out.reshape(one, heads, -1))
        for part in view.parts:
            k, v = (t[part.keys].repeat_interleave(heads // few, 1).transpose(0, 1)[None] for t in (keys, values))
            q, causal = query[:, :, part.tokens], part.mask is None
            out = scaled_dot_product_attention(q, k, v, attn_mask=part.mask, is_causal=causal, scale=scaling)
            outs.append(out[0].transpose(0, 1))
        return (outs[0] if len(outs) == 1 else torch.cat(outs)).view(1, tokens, heads, -1)


def _causal(tokens: int, keys: int, kind: Any) -> Tensor:
    """Return (tokens, keys) bool: which keys, the last of which belong to the tokens, each token sees."""
    at, of = torch.arange(keys - tokens, keys)[:, None], torch.arange(keys)
    seen = of <= at
    window = getattr(kind, "sliding_window", None)
    return seen if window is None else seen & (of > at - window)


@contextmanager
def packed(batch: Packed) -> Iterator[None]:
    """Let forwards of this thread inside the block be about a packed batch."""
    _open.batch = batch
    try:
        yield
    finally:
        _open.batch = None


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' attention functions do; over the cache while a packed batch is open."""
    batch = getattr(_open, "batch", None)
    if batch is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    odd = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if odd or getattr(module, "sinks", None) is not None:
        raise NotImplementedError(f"attention with {odd[0] if odd else 'sinks'}")
    return batch.attend(module.layer_idx, query, key, value, scaling), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
