"""MoloraConfig: everything that defines a routed adapter, one to one with the keys of a recipe's YAML.

A recipe is a YAML whose top-level keys are the fields of this class, plus an optional `train:` mapping that only the
command line reads. Unknown keys are errors, at every level, in recipes and in saved adapters.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from peft import PeftConfig

from .compat.registration import MOLORA
from .config_checks import EXPERTS, problems_of
from .errors import ConfigError, LoadError, did_you_mean, raise_all
from .files import CARD, finish, mention_molora
from .paths import recipes_dir
from .registry import Spec, split_spec
from .routing.schedules import is_schedule
from .routing.scorers import scorers

FORMAT_VERSION = 1


@dataclass
class MoloraConfig(PeftConfig):
    """A routed adapter: which layers, which experts, how they are routed, and what it costs.

    Attributes:
        recipe: name of the recipe it came from, for the record.
        target_modules: as in PEFT: names, a regex, or `all-linear`.
        exclude_modules: names or a regex of layers to leave alone.
        modules_to_save: base modules trained and saved whole, such as a new head.
        experts: `{form, num, rank, alpha, scaling, rslora, dropout, frozen, init, names}`. `form` is `lora`, `rank`,
            `shared_a`, `module` or `block` (an expert is a whole MLP; other layers have one LoRA each), or another
            form of experts/forms.py. `num` may be a list, stretched over the depth (MoLA). `rank` may be a list, one
            per expert. The delta is scaled by `scaling`, else alpha / rank (alpha / sqrt(rank) with `rslora`).
            `frozen` is a list of experts, or `all`. `names` says what each expert is, such as the LoRA it came from.
            `null` experts take part in the choice and do nothing; `shared` experts come after the `num` routed ones
            and are always on, with weight `shared_weight` (times a learned sigmoid with `shared_gate: sigmoid`). `num`
            may also be a profile over the depth, `{profile, min, max, total}` (plan.over_depth). `pool` makes layers
            of equal `shape` (or equal shape and `name`) share one bank, each with its own router.
        scorer, link, selector, price, pool: component specs, a name or `{name, **options}`.
        feature: what scorers read, made from the hidden states: null, a component spec, or a list of them in order.
        weights: `own`, `shared` (routers of the same sizes have one scorer, each with its own input) or `frozen` (the
            scorer stays as it was drawn).
        granularity: `token`, `prompt` or `task`.
        share: who shares a decision: `site` (nobody), `group` (layers that read the same input: q, k, v; gate, up),
            `block` (the layers of one transformer block) or `model`.
        per_site: with `share: block` or `model`: the shared decision holds gates of its own for each of its layers.
        losses: list of `{name, weight, over, **options}`.
        objective: how the training loss is made of several forwards of a batch: null (one forward, its own loss), or
            a component spec; it acts through `molora.attach(trainer)` or `molora.objective_loss(model, inputs)`.
        branches: two or more mappings, for routers that decide side by side: each holds what differs from the keys
            scorer, link, selector, price, pool, feature and granularity at the top, or null for one router.
        mix: how the gates of branches come together: `sum`, `softmax` or `gate`.
        layers: list of `{match, experts, selector}`: regexes of module paths whose experts, or options of the
            selector, differ; for each of the two the first match that names it counts.
        native_experts: with `all-linear`, also adapt the 3-D expert parameters of native mixtures (Mixtral, Qwen-MoE):
            `experts.num` LoRAs for each native expert. Without it, name their module (`experts`) in `target_modules`.
        upcast_base: multiply frozen half-precision layers in float32, on CPUs; null leaves it to the rule of
            molora/kernels/upcast.py, which does so where the processor has no units for half precision.
        format_version: version of the saved layout.
        fingerprint: of the base model, filled in by `wrap` (see molora/fingerprint.py).
    """

    recipe: str | None = None
    target_modules: list[str] | str | None = "all-linear"
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    experts: dict[str, Any] = field(default_factory=dict)
    scorer: Spec = "linear"
    link: Spec = "softmax"
    selector: Spec = "softmax"
    price: Spec | None = None
    pool: Spec = "mean"
    feature: Any = None
    weights: str = "own"
    granularity: str = "token"
    share: str = "site"
    per_site: bool = False
    losses: list[dict[str, Any]] = field(default_factory=list)
    objective: Any = None
    branches: list[dict[str, Any]] | None = None
    mix: str = "sum"
    layers: list[dict[str, Any]] = field(default_factory=list)
    native_experts: bool = False
    upcast_base: bool | None = None
    format_version: int = FORMAT_VERSION
    fingerprint: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MOLORA
        raise_all(self.problems(), ConfigError, "this configuration cannot work")
        self.experts = {**EXPERTS, **self.experts}

    @classmethod
    def from_recipe(cls, recipe: str | Path | Mapping[str, Any] | MoloraConfig, **changes: Any) -> MoloraConfig:
        """Return a recipe's config with changes, for `get_peft_model` or `model.add_adapter`; see `molora.wrap`."""
        return build_config(recipe, changes)

    def problems(self) -> list[str]:
        """Return everything that is wrong with this configuration, without a model."""
        return problems_of(self)

    def selector_at(self, changes: Mapping[str, Any]) -> Spec:
        """Return the selector with the changes of one entry of `layers`."""
        spec = {"name": self.selector} if isinstance(self.selector, str) else dict(self.selector)
        return {**spec, **changes} if changes else self.selector

    def has_schedules(self) -> bool:
        """Tell whether any number of this configuration follows training progress."""
        own = [one[key] for one in self.branches or () for key in ("link", "selector") if key in one]
        specs = [spec for spec in (self.link, self.selector, *self.losses, *own) if isinstance(spec, Mapping)]
        used = [self.scorer, *(one["scorer"] for one in self.branches or () if "scorer" in one)]
        follows = any(scorers.fact(split_spec(scorer)[0], "follows_progress", False) for scorer in used)
        return follows or any(is_schedule(value) for spec in specs for value in spec.values())

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> MoloraConfig:
        """Build the config of a saved adapter; unlike PEFT, unknown keys and newer formats are errors."""
        kwargs.pop("peft_type", None)
        version = kwargs.get("format_version", 0)
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise LoadError(
                f"this adapter was saved in format {version}, but this molora reads up to {FORMAT_VERSION}; "
                "upgrade with pip install -U molora"
            )
        known = {f.name for f in dataclasses.fields(cls)}
        problems = [f"key '{key}' is unknown{did_you_mean(key, known)}" for key in kwargs if key not in known]
        try:
            config = cls(**{key: value for key, value in kwargs.items() if key in known})
        except (ValueError, TypeError, AttributeError) as error:  # ConfigError is a ValueError, as PEFT's checks raise
            problems.append(str(error))
        raise_all(problems, LoadError, "adapter_config.json does not describe a molora adapter")
        return config

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Read a saved config as PEFT does, refusing folders whose weights could only be unpickled."""
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        finish(folder)
        pickles = sorted(p.name for p in folder.glob("adapter_model.*") if p.suffix != ".safetensors")
        if folder.is_dir() and pickles and not (folder / "adapter_model.safetensors").exists():
            raise LoadError(
                f"'{folder}' holds {pickles[0]}, a pickle, which molora never loads; save it as safetensors"
            )
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Write adapter_config.json as PEFT does, and say in the model card beside it how to load the adapter."""
        super().save_pretrained(save_directory, **kwargs)
        if Path(save_directory, CARD).is_file():
            mention_molora(Path(save_directory, CARD))

    def to_dict(self) -> dict[str, Any]:
        """Return the config as plain data, with sets sorted so that files are reproducible."""
        return {k: sorted(v) if isinstance(v, (set, frozenset)) else v for k, v in super().to_dict().items()}


class _RecipeLoader(yaml.SafeLoader):
    """Safe YAML that reads 1e-4 as a number: YAML 1.1 wants 1.0e-4 and makes a string of the former."""


_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with molora."""
    return sorted(path.stem for path in recipes_dir().glob("*.yaml"))


def read_recipe(recipe: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a recipe, `train` included.

    Args:
        recipe: a name that comes with molora (`dynmole`), a path to a YAML, or a mapping.

    Raises:
        ConfigError: no such recipe, not a YAML mapping, or unknown keys.
    """
    if isinstance(recipe, Mapping):
        content: Any = copy.deepcopy(dict(recipe))
        name = "the given mapping"
    else:
        name, path = str(recipe), Path(recipe)
        if path.suffix not in (".yaml", ".yml"):
            path = recipes_dir() / f"{name}.yaml"
        if not path.is_file():
            raise ConfigError(f"recipe '{name}' is unknown{did_you_mean(name, recipe_names())}; or give a .yaml path")
        try:
            content = yaml.load(path.read_text(encoding="utf-8"), Loader=_RecipeLoader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"recipe '{path}' is not readable YAML: {error}") from None
        if not isinstance(content, dict):
            raise ConfigError(f"recipe '{path}' must be a mapping of keys, got {type(content).__name__}")
        content.setdefault("recipe", path.stem)
    known = {f.name for f in dataclasses.fields(MoloraConfig)} | {"train"}
    unknown = [f"key '{key}'{did_you_mean(str(key), known)}" for key in content if key not in known]
    raise_all(unknown, ConfigError, f"recipe '{name}' has unknown keys")
    return content


def build_config(recipe: str | Path | Mapping[str, Any] | MoloraConfig, changes: Mapping[str, Any]) -> MoloraConfig:
    """Return the config of a recipe with changes on top; mappings such as `experts` are merged key by key.

    A component given by another name replaces the recipe's component whole, since its options would not fit.
    """
    if isinstance(recipe, MoloraConfig):
        base = {f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe)}
    else:
        base = read_recipe(recipe)
        base.pop("train", None)
    base = copy.deepcopy(base)
    for key, value in changes.items():
        old = base.get(key)
        renamed = (
            isinstance(value, Mapping)
            and isinstance(old, Mapping)
            and value.get("name", old.get("name")) != old.get("name")
        )
        if isinstance(value, Mapping) and isinstance(old, Mapping) and not renamed:
            base[key] = {**old, **value}
        elif isinstance(value, Mapping) and isinstance(old, str) and "name" not in value:
            base[key] = {"name": old, **value}
        else:
            base[key] = value
    known = {f.name for f in dataclasses.fields(MoloraConfig)}
    unknown = [f"'{key}'{did_you_mean(key, known)}" for key in base if key not in known]
    raise_all(unknown, ConfigError, "unknown keys")
    base.pop("peft_type", None)
    return MoloraConfig(**base)
