"""compose: finished LoRAs become one mixture, which can change while it runs.

model = molora.compose(base, ["adapters/news", "adapters/law@2"], router="arrow", slots=4)
live = molora.live(model)
live.add("poems", "adapters/poems")               # milliseconds, while other threads generate
with live.using("law"): model.generate(...)       # this expert alone
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from ..checkpoint import FREE
from ..compat.layers import linear_sizes_of
from ..config import MoloraConfig, read_recipe, recipe_names
from ..control import tuner_of
from ..errors import ConfigError, LoadError, did_you_mean, raise_all
from ..files import GATES
from ..from_peft import mix
from ..lora_files import Lora, Pair, read_lora
from ..posthoc import parts  # noqa: F401  (registers every router made after training)
from ..posthoc.registry import posthoc_routers
from ..registry import split_spec
from ..undo import undone_on_error
from .ingredients import Ingredient, contents_of, hold, label_of
from .live import LiveMixture, why_not_name
from .requests import Request
from .rows import why_not_close
from .store import Hub

UNIFORM: dict[str, Any] = {"scorer": {"name": "constant", "learn": False}, "selector": "softmax"}
Router = str | Path | Mapping[str, Any] | MoloraConfig


def compose(
    model: nn.Module,
    adapters: Sequence[Ingredient] | Mapping[str, Ingredient],
    router: Router = "uniform",
    *,
    names: Sequence[str] | None = None,
    slots: int | None = None,
    max_rank: int | None = None,
    targets: str | Sequence[str] | None = None,
    hub: Hub | str | Path | None = None,
    adapter_name: str = "default",
    **changes: Any,
) -> PeftModel:
    """Make one mixture of finished LoRAs, each an expert that computes exactly what PEFT does with it.

    They may differ in rank, alpha, target layers, rslora, patterns and dtype; what an expert cannot be is refused.

    Args:
        model: the base model of the LoRAs, or a PeftModel that molora made from it.
        adapters: folders, Hub repository ids, names in a library (`law`, `law@2`) or its entries, PeftModels with one
            LoRA, or pairs (config, tensors) as PEFT saves them; a mapping also says what the experts are called.
        router: `uniform` (all experts, equal weights), the name of a post-hoc router such as `arrow`, or
            `{name, **options}` of one; or a recipe: its name, its path, a mapping of its keys, or a MoloraConfig.
            `phatgoose` and `glider` take the gates that lie beside the adapters when none are given.
        names: of the experts; by default those of the adapters.
        slots: how many experts there is room for; by default as many as there are adapters. One more than that lets
            experts be swapped without a request ever waiting.
        max_rank: the largest rank of adapters to come; with spare slots by default that of the ones that are here.
        targets: further layers that adapters to come may use: the ends of their names (`q_proj`), or `all-linear`.
        hub: the library, or its folder, in which names are looked up.
        adapter_name: what PEFT calls the mixture.
        changes: as in `molora.wrap`, on top of the router.

    Returns:
        The PeftModel. `molora.live(model)` changes its experts while it runs.

    Raises:
        LoadError: an adapter is damaged, holds what an expert cannot, or does not fit the model; all problems at once.
        ConfigError: arguments that contradict each other, or a router that cannot route these experts.
    """
    recipe, posthoc = _router(router)
    if isinstance(adapters, Mapping):
        if names is not None:
            raise ConfigError("names are given twice, by names= and by the mapping of adapters; leave names= out")
        names, adapters = list(adapters), list(adapters.values())
    if isinstance(adapters, (str, Path)) or not adapters:
        raise ConfigError(f"compose needs a list of adapters, got {adapters!r}")
    labels = _labels(adapters, names)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    sizes = linear_sizes_of(base)
    loras, problems = [], []
    for label, source in zip(labels, adapters, strict=True):
        try:
            loras.append(Lora(label, contents_of(source, hub)))
            problems += [f"'{label}': {problem}" for problem in read_lora(loras[-1], sizes, base=base)]
        except (ConfigError, LoadError) as error:
            problems.append(f"'{label}': {error}")
    raise_all(problems, LoadError, "these adapters cannot all become experts")
    _make_room(loras, slots, max_rank, targets, sizes, base)
    with undone_on_error(model):
        peft_model = mix(model, loras, recipe, adapter_name, changes)
        mixture = LiveMixture(peft_model, adapter_name, hub)
        wrong = why_not_close(peft_model.peft_config[adapter_name].scorer) if mixture.free else None
        if wrong:
            raise ConfigError(f"a mixture with this router cannot have free slots: {wrong}; leave slots= out")
        if posthoc is not None:
            name, options = posthoc
            if "gates" in posthoc_routers.options(name) and options.get("gates") is None:
                options = {**options, "gates": _own_gates(loras)}
            try:
                posthoc_routers.get(name)(peft_model, adapter_name, **options)
            except TypeError as error:
                known = ", ".join(posthoc_routers.options(name)) or "(none)"
                raise ConfigError(f"router '{name}' with {options!r}: {error}; its options: {known}") from error
            tuner_of(peft_model).peft_config[adapter_name].recipe = f"posthoc/{name}"
        _register(peft_model, mixture)
    return peft_model


def live(model: nn.Module, adapter: str = "default", *, hub: Hub | str | Path | None = None) -> LiveMixture:
    """Return the mixture of a model whose experts can change while it runs; made on the first call after a load.

    Raises:
        ConfigError: the model has no such adapter, or its experts have no slots that could be written.
    """
    tuner = tuner_of(model)
    found = tuner.__dict__.get("live_mixtures", {}).get(adapter)
    if found is not None and found.is_current:
        if hub is not None:
            found.hub = hub
        return found
    if adapter not in tuner.peft_config:
        raise ConfigError(f"adapter '{adapter}' is unknown{did_you_mean(adapter, tuner.peft_config)}")
    if found is not None:
        found.detach()
    return _register(model, LiveMixture(model, adapter, hub or (found.hub if found is not None else None)))


@contextmanager
def using_experts(
    model: nn.Module, gates: str | Mapping[str, float] | None = None, *, adapter: str = "default", alone: bool = False
) -> Iterator[Request]:
    """Make the block one request: it sees the experts that are there when it begins; see `LiveMixture.using`."""
    with live(model, adapter).using(gates, alone=alone) as request:
        yield request


def _register(model: nn.Module, mixture: LiveMixture) -> LiveMixture:
    tuner = tuner_of(model)
    if "live_mixtures" not in tuner.__dict__:
        tuner.live_mixtures = {}
    tuner.live_mixtures[mixture.adapter] = mixture
    return mixture


def _router(router: Router) -> tuple[Any, tuple[str, dict[str, Any]] | None]:
    """Return the recipe to start from, and name and options of the post-hoc router to put in its place."""
    if router == "uniform":
        return UNIFORM, None
    is_name = isinstance(router, str) and router in posthoc_routers
    if is_name or (isinstance(router, Mapping) and "name" in router):
        raise_all(posthoc_routers.problems(router), ConfigError, "this router cannot be made")
        return UNIFORM, split_spec(router, "router")
    if isinstance(router, str) and router not in recipe_names() and Path(router).suffix not in (".yaml", ".yml"):
        raise ConfigError(
            f"router '{router}' is unknown{did_you_mean(router, ['uniform', *posthoc_routers])}; or name a recipe "
            "(molora recipes lists them)"
        )
    if not isinstance(router, MoloraConfig):
        keys = read_recipe(router)
        keys.pop("train", None)
        # the experts are there, so only what decides comes from a recipe
        decides = {k: v for k, v in keys.items() if k not in ("experts", "target_modules", "exclude_modules", "layers")}
        return decides, None
    return router, None


def _own_gates(loras: Sequence[Lora]) -> dict[str, Path]:
    """Return the folders of adapters, each with gates of its own; ConfigError names those without."""
    used = [lora for lora in loras if not lora.label.startswith(FREE)]
    bare = [lora.label for lora in used if not (lora.contents.folder / GATES).is_file()]
    if bare:
        raise ConfigError(
            f"this router needs gates of each adapter, and there is no {GATES} beside {', '.join(map(repr, bare))}; "
            "make them with `molora hub train-gates`, or pass gates="
        )
    return {lora.label: lora.contents.folder for lora in used}


def _labels(adapters: Sequence[Ingredient], names: Sequence[str] | None) -> list[str]:
    if names is not None and (len(names) != len(adapters) or len(set(names)) != len(names)):
        raise ConfigError(f"names must hold {len(adapters)} different names, one per adapter, got {list(names)!r}")
    own = [label_of(source, number) for number, source in enumerate(adapters)] if names is None else list(names)
    for name in own:
        why_not_name(name)
    return [name if own.count(name) == 1 else f"{name}_{number}" for number, name in enumerate(own)]


def _make_room(
    loras: list[Lora],
    slots: int | None,
    max_rank: int | None,
    targets: str | Sequence[str] | None,
    sizes: Mapping[str, tuple[int, int]],
    base: nn.Module,
) -> None:
    """Add the slots, ranks and layers that adapters to come may need."""
    largest = max((pair.rank for lora in loras for pair in lora.pairs.values()), default=1)
    problems = []
    for what, value, least in (("slots", slots, len(loras)), ("max_rank", max_rank, largest)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            problems.append(f"{what} must be a whole number of at least {least} for these adapters, got {value!r}")
    raise_all(problems, ConfigError, "there is no room like this")
    spare = (slots or 0) - len(loras)
    if spare > 0 or max_rank is not None or targets is not None:
        for lora in loras:
            lora.room = max_rank or largest
    if targets is not None:
        for path in target_paths(targets, sizes, base):
            loras[0].pairs.setdefault(path, Pair("", "", max_rank or largest, 0.0))
    for slot in range(len(loras), len(loras) + max(0, spare)):
        loras.append(Lora(f"{FREE}{slot}", hold({}, {}), room=max_rank or largest))


def target_paths(targets: str | Sequence[str], sizes: Mapping[str, tuple[int, int]], base: nn.Module) -> list[str]:
    """Return the paths of the linear layers that `targets` names, as in `compose`.

    Args:
        targets: the ends of their names, or `all-linear`: all but the output head.
        sizes: (d_in, d_out) of the linear layers of the base by path.
        base: the base model.

    Raises:
        ConfigError: a name that ends no layer's path.
    """
    if targets == "all-linear":
        head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
        heads = {path.replace(".base_layer", "") for path, module in base.named_modules() if module is head}
        return [path for path in sizes if path not in heads]
    wanted = [targets] if isinstance(targets, str) else list(targets)
    found = {end: [path for path in sizes if path == end or path.endswith(f".{end}")] for end in wanted}
    ends = {path.rpartition(".")[2] for path in sizes}
    problems = [f"'{end}' ends no linear layer's name{did_you_mean(end, ends)}" for end in wanted if not found[end]]
    raise_all(problems, ConfigError, "not all of these targets are there")
    return sorted({path for paths in found.values() for path in paths})
