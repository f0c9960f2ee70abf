"""Every form of experts, by name, and how one is built; importing this module registers them all.

lora, rank, shared_a    gates weigh the outputs of low-rank pairs (bank.py; in the kernels)
factor, bottleneck      factors averaged before the product; adapters with an activation (factor.py)
film, chain             one shared pair, whose ranks the experts scale, or pass on step by step (shared.py)
fusion                  LoRAs whose mixture one learned map turns before it is added (fusion.py)
gated                   pairs whose input each expert rescales by itself (gated.py)
ia3                     a vector that rescales what the layer computes (ia3.py)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError
from ..registry import Spec, split_spec
from . import bank, factor, fusion, gated, ia3, shared
from .base import Experts, forms

__all__ = ["bank", "build_experts", "factor", "form_name", "form_problems", "forms", "fusion", "gated", "ia3", "shared"]


def form_name(form: Spec) -> str:
    """Return the name of a form given as a name or as `{name, **options}`."""
    return split_spec(form, "form")[0]


def form_problems(form: Spec) -> list[str]:
    """Return what is wrong with a form, without the sizes of a layer."""
    return forms.problems(form)


def build_experts(form: Spec, d_in: int, d_out: int, ranks: Sequence[int], **given: Any) -> Experts:
    """Build the experts of one site.

    Args:
        form: a name, or `{name, **options}`.
        d_in, d_out: sizes of the base layer.
        ranks: rank of each expert.
        given: scaling, dropout, frozen and init, as in Experts.

    Raises:
        ConfigError: the form is unknown, or its options do not fit this layer.
    """
    problems = forms.problems(form)
    if problems:
        raise ConfigError("\n".join(problems))
    name, options = split_spec(form, "form")
    return forms.get(name)(d_in, d_out, ranks, form=name, **options, **given)
