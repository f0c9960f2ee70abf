"""A selector with two faces: a soft mixture of all experts in training, the best few at inference."""

from __future__ import annotations

from torch import Tensor

from .selectors import selectors, top_k
from .types import Context


@selectors.register("soft_train", given=("real",), sparse=True)
def soft_train(probs: Tensor, ctx: Context, *, k: int = 3, normalise: str = "sum1", real: int | None = None) -> Tensor:
    """Keep every expert in training forwards, and the k most probable at inference (LoRA-Mixer, arXiv 2507.00029).

    Training and inference differ by design, as in the paper. Whether the paper divides the kept weights by their sum is
    unknown; `sum1` does, so that gates sum to 1 both times and nothing changes where there are at most k experts.

    Options:
        k: experts at inference; all of them where there are fewer.
        normalise: as in top_k, at inference.
    """
    if ctx.training:
        return probs
    return top_k(probs, ctx, k=k, normalise=normalise, clamp=True, real=real)
