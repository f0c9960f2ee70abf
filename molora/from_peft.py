"""import_peft: plain PEFT LoRAs become the experts of a mixture, exactly.

What a LoRA folder may hold is in lora_files.py; here its pairs are written into the slots of a mixture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from .compat.layers import linear_sizes_of, module_paths
from .config import MoloraConfig, build_config
from .control import routed_layers, tuner_of
from .errors import ConfigError, LoadError, raise_all
from .files import local_folder, look
from .lora_files import Lora, read_lora
from .plan import form_of, regex_of, targets_of
from .undo import undone_on_error
from .wrapping import wrap

_UNIFORM = {"scorer": {"name": "linear", "init": 0.0}, "selector": "softmax"}


def import_peft(
    model: nn.Module,
    dirs: Sequence[str | Path],
    *,
    recipe: str | Path | Mapping[str, Any] | MoloraConfig = _UNIFORM,
    names: Sequence[str] | None = None,
    adapter_name: str = "default",
    **changes: Any,
) -> PeftModel:
    """Make a mixture of plain PEFT LoRAs: each becomes one expert, exactly.

    They may differ in rank, alpha, target layers, rslora, rank and alpha patterns and dtype; a layer that a LoRA does
    not touch gets a fresh expert there, which changes nothing. How tokens are routed comes from the recipe.

    PEFT saves the head, or the embedding, beside a LoRA on it, and the whole head of a classifier. Such a weight is
    left out when it is the base's own to the last bit, which `molora.report` tells, and refused when it is not.

    Args:
        model: the base model of the LoRAs, or a PeftModel that molora made from it.
        dirs: their folders or Hub repository ids, in the order of the experts.
        recipe: as in `wrap`. The default weighs all experts equally at first, and learns a linear router.
        names: of the experts; the names of the folders by default. They are kept as `experts.names`.
        adapter_name: what PEFT calls the mixture.
        changes: as in `wrap`; `experts={"frozen": "all"}` trains the router alone. Number, ranks and scales of the
            experts come from the LoRAs.

    Returns:
        The PeftModel. With `molora.pin(model, one_hot)` it computes what PEFT does with that LoRA.

    Raises:
        LoadError: a LoRA is damaged, holds what an expert cannot, or does not fit the model; all problems at once.
        ConfigError: the recipe cannot hold the experts.
    """
    if isinstance(dirs, (str, Path)) or not dirs:
        raise ConfigError(f"import_peft needs a list of LoRA folders, got {dirs!r}")
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    sizes = linear_sizes_of(base)
    labels = _labels(dirs, names)
    loras = [Lora(label, look(local_folder(path))) for label, path in zip(labels, dirs, strict=True)]
    problems = []
    for lora in loras:
        found = read_lora(lora, sizes, base=base)
        problems += [f"'{lora.label}': {problem}" for problem in found]
    raise_all(problems, LoadError, "these LoRAs cannot all become experts")
    return mix(model, loras, recipe, adapter_name, changes)


def mix(
    model: nn.Module,
    loras: Sequence[Lora],
    recipe: str | Path | Mapping[str, Any] | MoloraConfig,
    adapter_name: str,
    changes: Mapping[str, Any],
) -> PeftModel:
    """Return the mixture whose experts are these LoRAs, which were read without problems; see `import_peft`.

    A pair without tensor names, `Pair("", "", rank, 0.0)`, keeps room of that rank in its layer, filled with zeros.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    config = _mixture_config(loras, module_paths(base), recipe, changes)
    with undone_on_error(model):
        peft_model = _wrapped(model, config, adapter_name)
        layers = routed_layers(peft_model, adapter_name)
        lost = sorted({path for lora in loras for path in lora.pairs} - layers.keys())
        raise_all([f"layer '{path}' of the model cannot be routed" for path in lost], LoadError, "not every LoRA fits")
        for slot, lora in enumerate(loras):
            tensors = dict(lora.contents.read())
            for path, pair in lora.pairs.items():
                bank = layers[path].molora_bank[adapter_name]
                if pair.A:
                    bank.write(slot, tensors[pair.A], tensors[pair.B], pair.scale)
                else:
                    bank.clear(slot)
    tuner_of(peft_model).reports[adapter_name].notes += [
        f"'{lora.label}' also holds the base's own weight of {', '.join(sorted(lora.copies))}, which stays as it is"
        for lora in loras
        if lora.copies
    ]
    return peft_model


def _labels(dirs: Sequence[str | Path], names: Sequence[str] | None) -> list[str]:
    if names is not None:
        if len(names) != len(dirs) or len(set(names)) != len(names):
            raise ConfigError(f"names must hold {len(dirs)} different names, one per LoRA, got {list(names)!r}")
        return list(names)
    own = [Path(path).name or str(path) for path in dirs]
    return [name if own.count(name) == 1 else f"{name}_{number}" for number, name in enumerate(own)]


def _mixture_config(
    loras: Sequence[Lora], all_paths: Sequence[str], recipe: Any, changes: Mapping[str, Any]
) -> MoloraConfig:
    """Return the config of a mixture whose experts have the ranks and scales of the LoRAs."""
    mine = {"num", "rank", "alpha", "scaling", "rslora", "names"} & set(changes.get("experts") or {})
    wrong = sorted(f"experts.{key}" for key in mine)
    wrong += sorted({"target_modules", "exclude_modules", "layers"} & set(changes))
    if wrong:
        raise ConfigError(
            f"number, ranks, scales and layers of imported experts come from the LoRAs; leave out {', '.join(wrong)}"
        )
    config = build_config(recipe, changes)
    if form_of(config.experts) != "lora":
        raise ConfigError(
            f"experts.form '{form_of(config.experts)}' cannot hold LoRAs as they are; use another recipe, or pass "
            "experts={'form': 'lora'}"
        )
    paths = sorted({path for lora in loras for path in lora.pairs})
    own = {path: [lora.pairs[path].rank if path in lora.pairs else 1 for lora in loras] for path in paths}
    ranks = {path: [max(r, lora.room) for r, lora in zip(given, loras, strict=True)] for path, given in own.items()}
    usual = Counter(tuple(r) for r in ranks.values()).most_common(1)[0][0]
    others: dict[tuple[int, ...], list[str]] = {}
    for path, rank in ranks.items():
        if tuple(rank) != usual:
            others.setdefault(tuple(rank), []).append(path)
    scales = {pair.scale for lora in loras for pair in lora.pairs.values() if pair.scale != 0}
    experts = {
        "num": len(loras),
        "rank": list(usual),
        "scaling": scales.pop() if len(scales) == 1 else 1.0,  # one scale for all keeps A and B bit by bit
        "names": [lora.label for lora in loras],
    }
    layers = [{"match": regex_of(members), "experts": {"rank": list(rank)}} for rank, members in others.items()]
    targets = {"target_modules": targets_of(paths, all_paths), "exclude_modules": None}
    return build_config(config, {**targets, "experts": experts, "layers": layers})


def _wrapped(model: nn.Module, config: MoloraConfig, adapter_name: str) -> PeftModel:
    if not isinstance(model, PeftModel):
        return wrap(model, config, adapter_name=adapter_name)
    model.add_adapter(adapter_name, config)
    return model
