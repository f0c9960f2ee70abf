"""What there is to choose from: the recipes that come with molora, and the components that recipes are made of."""

from __future__ import annotations

import json
import re
from typing import Any

from .config import read_recipe
from .experts.forms import forms
from .paths import recipes_dir
from .registry import Registry
from .routing.controllers import controllers
from .routing.entropy import entropies
from .routing.features import features
from .routing.links import links
from .routing.losses import losses
from .routing.objectives import objectives
from .routing.pools import pools
from .routing.price import prices
from .routing.schedules import schedules
from .routing.scorers import scorers
from .routing.selectors import selectors


def recipe_facts(name: str) -> dict[str, Any]:
    """Return name, one line and arXiv id of a recipe, from the header of its YAML."""
    path = recipes_dir() / f"{name}.yaml"
    header = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        header.append(line[1:].strip())
    read_recipe(name)  # a listed recipe can be read
    start = " ".join(header[: header.index("")] if "" in header else header[:1])
    paper = re.search(r"arXiv (\d{4}\.\d{4,5})", " ".join(header))
    return {"name": name, "what": start, "arxiv": paper[1] if paper else None, "path": str(path)}


def components() -> dict[str, list[dict[str, Any]]]:
    """Return every registered component by kind: name, first line of its docstring, options with their defaults."""
    routing: list[Registry] = [features, scorers, links, selectors, prices, pools, losses, objectives]
    registries = [forms, *routing, schedules, controllers, entropies]
    return {registry.kind: [_component(registry, name) for name in registry] for registry in registries}


def _component(registry: Registry, name: str) -> dict[str, Any]:
    options = []
    for key, parameter in registry.options(name).items():
        required = parameter.default is parameter.empty
        options.append(key if required else f"{key}={json.dumps(parameter.default)}")
    return {"name": name, "summary": registry.summary(name), "options": options}
