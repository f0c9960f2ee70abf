"""Which routed layer a module of the base model becomes, with which experts, and which layers form MLP blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from .blocks import Role, RoutedBlock
from .compat.layers import linear_sizes, mlp_blocks
from .compat.native import native_experts
from .config_checks import ARRANGED
from .embeddings import EmbeddingBank, RoutedEmbedding, embedding_sizes
from .errors import ConfigError
from .experts.bank import FORMS
from .experts.forms import build_experts
from .layers import RoutedLayer, RoutedLinear
from .native_experts import RoutedExperts, native_bank
from .plan import form_of, ranks_of, scaling_of
from .routing.trace import Trace


def kind_of(module: nn.Module) -> str | None:
    """Return what a module is to molora: `linear`, `embedding`, `native` (stacked native experts) or None."""
    if linear_sizes(module) is not None:
        return "linear"
    if embedding_sizes(module) is not None:
        return "embedding"
    return "native" if native_experts(module) is not None else None


def why_not(module: nn.Module, spec: Mapping[str, Any]) -> str | None:
    """Return why a module takes no experts of this kind, or None when it does."""
    kind, form = kind_of(module), form_of(spec)
    if kind is None:
        if any(p.dim() == 3 for p in module.parameters(recurse=False)):
            return f"3-D expert parameters of {type(module).__name__} are quantised, sharded or of an unknown layout"
        return f"{type(module).__name__} is not a linear layer"
    if kind != "linear" and form not in FORMS:
        return f"experts of form '{form}' cannot act on {type(module).__name__}"
    return None


def alone(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `experts` of a layer outside of any MLP block under `form: block`: one LoRA, always on."""
    rank = spec["rank"]
    rank = rank if isinstance(rank, int) else rank[0]
    frozen = spec["frozen"] if spec["frozen"] == "all" else []
    return {**spec, "form": "lora", "num": 1, "shared": 0, "rank": rank, "frozen": frozen}


def is_fixed(module: nn.Module, spec: Mapping[str, Any]) -> bool:
    """Tell whether a layer has nothing to decide: a single LoRA for each native expert."""
    return kind_of(module) == "native" and spec["num"] + spec["shared"] == 1


def bank_for(module: nn.Module, spec: Mapping[str, Any]) -> Any:
    """Return fresh experts for a module by its resolved `experts` mapping."""
    form = "lora" if form_of(spec) in ARRANGED else spec["form"]
    given = {key: spec[key] for key in ("dropout", "frozen", "init")} | {"scaling": scaling_of(spec)}
    kind = kind_of(module)
    if kind == "native":
        return native_bank(module, ranks_of(spec), form=form_of({"form": form}), **given)
    if kind == "embedding":
        return EmbeddingBank(*(embedding_sizes(module) or ()), ranks_of(spec), form=form_of({"form": form}), **given)
    return build_experts(form, *(linear_sizes(module) or ()), ranks_of(spec), **given)


def layer_for(module: nn.Module, trace: Trace, upcast_base: bool | None) -> RoutedLayer:
    """Return the routed layer around a module."""
    kind = kind_of(module)
    if kind == "native":
        return RoutedExperts(module, trace)
    if kind == "embedding":
        return RoutedEmbedding(module, *(embedding_sizes(module) or ()), trace)
    return RoutedLinear(module, *(linear_sizes(module) or ()), trace, upcast_base)


class Blocks:
    """The MLP blocks of one model, and which of their layers have experts that are whole blocks.

    Args:
        model: the base model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.found = mlp_blocks(model)
        self.of = {path: block for block, (first, last) in self.found.items() for path in (*first, last)}
        self.used: set[str] = set()

    def leads(self, path: str) -> bool:
        """Whether a layer is the first of its block to read the input."""
        return path in self.used and self.found[self.of[path]][0][0] == path

    def assign(self, adapter: str, layers: Mapping[str, RoutedLayer]) -> None:
        """Give the layers of each block in use their parts.

        Raises:
            ConfigError: a block has layers that were left out: an expert is the whole block.
        """
        for block, (first, last) in self.found.items():
            members = (*first, last)
            if not self.used.intersection(members):
                continue
            missing = [path for path in members if path not in self.used]
            if missing:
                raise ConfigError(
                    f"with experts.form: block an expert is a whole MLP, but of '{block}' the layers "
                    f"{', '.join(path.rpartition('.')[2] for path in missing)} were left out; add them to "
                    "target_modules (and give all layers of an MLP the same form), or use form: lora"
                )
            shared = RoutedBlock(block)
            for number, path in enumerate(first):
                layers[path].roles[adapter] = Role(shared, "enters" if number else "opens")
            layers[last].roles[adapter] = Role(shared, "leaves")


def native_paths(model: nn.Module) -> Iterable[str]:
    """Return the paths of the modules of stacked native experts."""
    return [path for path, module in model.named_modules() if kind_of(module) == "native" and "base_layer" not in path]
