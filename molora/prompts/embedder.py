"""Embedder: texts -> unit vectors (N, D) in float32 on the CPU, each text once; and the one that needs no model."""

from __future__ import annotations

import hashlib
import itertools
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError
from .registry import embedders

CACHED = 10_000  # texts


class Embedder:
    """Turns texts into unit vectors, and remembers the latest.

    Args:
        name: what it is called; for registered ones the name in the registry.
        options: what it was built with, as plain data.
        digest: of everything that decides the vectors; empty when that is not known.
        cached: how many texts to remember.
    """

    def __init__(self, name: str, options: Mapping[str, Any], digest: str, cached: int = CACHED) -> None:
        self.name, self.options, self.digest, self.cached = name, dict(options), digest, cached
        self._known: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return (N, D) unit vectors; a text without any direction gives zeros.

        Raises:
            ConfigError: something else than texts was given, or the embedder returned something else than vectors.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise ConfigError("an embedder takes a list of texts")
        with self._lock:
            found = {text: self._known[text] for text in texts if text in self._known}
            missing = [text for text in dict.fromkeys(texts) if text not in found]
            if missing:
                found.update(zip(missing, self._checked(missing), strict=True))
            for text in found:
                self._known[text] = found[text]
                self._known.move_to_end(text)
            while len(self._known) > self.cached:
                self._known.popitem(last=False)
        return torch.stack([found[text] for text in texts]) if found else torch.zeros(0, 0)

    def embed(self, texts: list[str]) -> Any:
        """Return (N, D) vectors of any length and type; what subclasses define."""
        raise NotImplementedError

    def _checked(self, texts: list[str]) -> Tensor:
        made = self.embed(texts)
        made = (made if isinstance(made, Tensor) else torch.as_tensor(made)).detach().cpu().float()
        if made.dim() != 2 or len(made) != len(texts) or not made.shape[1] or not torch.isfinite(made).all():
            raise ConfigError(
                f"embedder '{self.name}' must return ({len(texts)}, d) finite numbers for {len(texts)} texts, got "
                f"{tuple(made.shape)}"
            )
        return F.normalize(made, dim=-1)


class Given(Embedder):
    """A function from texts to vectors, as its user gave it; it is not saved with a selector.

    Args:
        function: texts -> (N, D), as a tensor, an array or lists; its attributes `name` and `digest`, if any, say which
            vectors compare.
    """

    def __init__(self, function: Callable[[list[str]], Any]) -> None:
        name, digest = getattr(function, "name", None), getattr(function, "digest", "")
        super().__init__(str(name or "given"), {}, str(digest or ""))
        self.function = function

    def embed(self, texts: list[str]) -> Any:
        """Call the function."""
        return self.function(texts)


@embedders.register("words")
class Words(Embedder):
    """Hashed words and pairs of neighbouring words, each counted by its square root; no model.

    Args:
        size: of the vectors.
        cached: how many texts to remember.
    """

    def __init__(self, *, size: int = 1024, cached: int = CACHED) -> None:
        if size < 2:
            raise ConfigError(f"embedder 'words': size must be at least 2, got {size}")
        super().__init__("words", {"size": size}, f"words-1-{size}", cached)
        self.size = size

    def embed(self, texts: list[str]) -> Tensor:
        """Return (N, size)."""
        made = torch.zeros(len(texts), self.size)
        for row, text in enumerate(texts):
            words = re.findall(r"\w+", text.casefold())
            for part in [*words, *(f"{a} {b}" for a, b in itertools.pairwise(words))]:
                number = int.from_bytes(hashlib.blake2b(part.encode(), digest_size=8).digest(), "little")
                made[row, (number >> 1) % self.size] += 1 if number & 1 else -1  # signs, so that clashes cancel out
        return made.sign() * made.abs().sqrt()


def as_embedder(embed: Embedder | Callable[[list[str]], Any]) -> Embedder:
    """Return an Embedder as it is, and any other function from texts to vectors as one."""
    if isinstance(embed, Embedder):
        return embed
    if not callable(embed):
        raise ConfigError(f"an embedder is a function from texts to vectors, got {embed!r:.60}")
    return Given(embed)
