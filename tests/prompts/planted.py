"""Planted prompts: texts whose vectors are known, as clusters on the sphere."""

import torch
from torch.nn import functional as F

from molora.prompts.embedder import Embedder

SIZE = 16


class Planted(Embedder):
    """Embeds `cluster:number` as a fixed direction per cluster plus a little noise; every text gives one vector."""

    def __init__(self, noise: float = 0.25, size: int = SIZE) -> None:
        super().__init__("planted", {}, f"planted-{noise}-{size}")
        self.noise, self.size = noise, size

    def embed(self, texts):
        return torch.stack([self.vector(text) for text in texts])

    def vector(self, text):
        cluster = text.partition(":")[0]
        return direction(cluster, self.size) + self.noise * direction(text, self.size)


def direction(text, size=SIZE):
    generator = torch.Generator().manual_seed(int.from_bytes(text.encode(), "big") % (2**63 - 1))
    return F.normalize(torch.randn(size, generator=generator), dim=0)


def examples(*clusters, number=30, start=0):
    return {name: [f"{name}:{i}" for i in range(start, start + number)] for name in clusters}
