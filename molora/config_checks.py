"""What is wrong with a MoloraConfig: the values that each key may have, and the keys that do not go together.

Everything is found without a model and told at once. What only a model can tell (which layers there are, how many of
them share a decision) is refused by the tuner.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .errors import ConfigError, did_you_mean
from .experts.bank import FORMS
from .experts.forms import form_problems, forms
from .experts.pool import POOLS
from .plan import profile_problems
from .routing import parts  # noqa: F401  (registers every part)
from .routing.branches import KEYS as BRANCH_KEYS
from .routing.branches import check_branches
from .routing.features import features, listed
from .routing.links import links
from .routing.objectives import check_objective, objectives
from .routing.pools import pools
from .routing.price import check_price
from .routing.router import GRANULARITIES, WEIGHTS
from .routing.schedules import build_schedule, is_schedule
from .routing.scorers import scorers
from .routing.selectors import selectors
from .routing.shared import SHARED_GATES
from .routing.weighted import check_loss

SHARES = ("site", "group", "block", "model")

# Forms that arrange LoRAs over several layers: `module` makes each wrapped layer of a transformer block one expert
# (MiLoRA); with `block` an expert is a whole MLP, and other layers have one LoRA each (MixLoRA).
ARRANGED = ("module", "block")

# The keys of `experts` and their defaults.
EXPERTS: dict[str, Any] = {
    "form": "lora",
    "num": 8,
    "rank": 8,
    "alpha": 16,
    "scaling": None,
    "rslora": False,
    "dropout": 0.0,
    "frozen": [],
    "init": "kaiming",
    "names": None,
    "null": 0,
    "shared": 0,
    "shared_gate": "none",
    "shared_weight": 1.0,
    "pool": "none",
}


def problems_of(config: Any) -> list[str]:
    """Return everything that is wrong with a MoloraConfig, without a model."""
    found = _expert_problems(config.experts, "experts", partial=False)
    for kind, registry in (("scorer", scorers), ("link", links), ("selector", selectors), ("pool", pools)):
        found += registry.problems(getattr(config, kind)) + _schedule_problems(getattr(config, kind), kind)
    found += check_branches(config.branches, config.mix, {key: getattr(config, key) for key in BRANCH_KEYS})
    found += check_objective(config.objective) + _schedule_problems(config.objective, "objective")
    found += check_price(config.price)
    for feature in listed(config.feature):
        found += features.problems(feature) + _schedule_problems(feature, "feature")
    if config.weights not in WEIGHTS:
        found.append(f"weights '{config.weights}' is unknown{did_you_mean(str(config.weights), WEIGHTS)}")
    lists = {}
    for key in ("losses", "layers"):
        given = getattr(config, key)
        lists[key] = given if isinstance(given, (list, tuple)) else []
        if not isinstance(given, (list, tuple)):
            found.append(f"{key} must be a list, got {given!r}")
    for loss in lists["losses"]:
        found += check_loss(loss)
    if config.granularity not in GRANULARITIES:
        found.append(f"granularity '{config.granularity}' is unknown{did_you_mean(config.granularity, GRANULARITIES)}")
    if config.share not in SHARES:
        found.append(f"share '{config.share}' is unknown{did_you_mean(config.share, SHARES)}")
    if not isinstance(config.native_experts, bool):
        found.append(f"native_experts must be true or false, got {config.native_experts!r}")
    if config.upcast_base is not None and not isinstance(config.upcast_base, bool):
        found.append(f"upcast_base must be true, false or null, got {config.upcast_base!r}")
    found += _combination_problems(config)
    for entry in lists["layers"]:
        if not isinstance(entry, Mapping) or not {"match"} < set(entry) <= {"match", "experts", "selector"}:
            found.append(
                f"layers entry {entry!r} must be {{match: <regex of module paths>, experts: {{...}}}}, or have "
                "selector: {...} with options that differ there"
            )
            continue
        found += _expert_problems(entry.get("experts", {}), "layers.experts", partial=True)
        if "selector" in entry:
            selector = config.selector_at(entry["selector"])
            found += selectors.problems(selector) + _schedule_problems(selector, "layers.selector")
        try:
            re.compile(entry["match"])
        except (re.error, TypeError) as error:
            found.append(f"layers.match {entry['match']!r} is not a regular expression: {error}")
    return found


def _combination_problems(config: Any) -> list[str]:
    found = []
    scorer = config.scorer.get("name") if isinstance(config.scorer, Mapping) else config.scorer
    by_task = isinstance(scorer, str) and scorer in scorers and scorers.fact(scorer, "reads") == "task"
    if (config.granularity == "task") != by_task and not config.branches:
        found.append(
            f"granularity '{config.granularity}' does not go with scorer '{scorer}': "
            "task decisions need scorer: {name: table, num_tasks: ...}, and only they can use it"
        )
    objective = config.objective.get("name") if isinstance(config.objective, Mapping) else config.objective
    trains = objectives.fact(objective, "selector") if objective in objectives else None
    selected = [config.selector, *(one.get("selector", config.selector) for one in config.branches or ())]
    used = [one.get("name") if isinstance(one, Mapping) else one for one in selected]
    if trains and trains not in used:
        found.append(f"objective '{objective}' trains what is drawn: set selector: {{name: {trains}, k: ...}}")
    form = config.experts.get("form") if isinstance(config.experts, Mapping) else None
    form = form.get("name") if isinstance(form, Mapping) else form
    if not isinstance(config.per_site, bool):
        found.append(f"per_site must be true or false, got {config.per_site!r}")
    elif config.per_site and form == "block":
        found.append("per_site does not go with experts.form: block: the layers of an MLP are one expert together")
    elif config.per_site and (config.share == "site" or form == "module"):
        found.append("per_site gives the layers of a shared decision their own gates: set share: block or model")
    elif config.per_site and (config.experts.get("null") or config.experts.get("shared")):
        found.append("per_site does not go with null or shared experts: set experts.null and experts.shared to 0")
    if form == "module" and config.share != "block":
        found.append(f"experts.form 'module' chooses among the layers of a block: set share: block, not {config.share}")
    return found


def _expert_problems(experts: Any, where: str, partial: bool) -> list[str]:
    if not isinstance(experts, Mapping):
        return [f"{where} must be a mapping, got {experts!r}"]
    found = [f"{where} has no key '{key}'{did_you_mean(key, EXPERTS)}" for key in experts if key not in EXPERTS]
    full = experts if partial else {**EXPERTS, **experts}
    if full.get("form", "module") not in ARRANGED:
        form = full["form"]
        name = form.get("name") if isinstance(form, Mapping) else form
        if isinstance(name, str) and name not in (*forms, *ARRANGED):
            found.append(f"{where}.form '{name}' is unknown{did_you_mean(name, (*forms, *ARRANGED))}")
        else:
            found += [f"{where}: {problem}" for problem in form_problems(form)]
    for key in ("num", "rank"):
        values = full.get(key, 1)
        if key == "num" and isinstance(values, Mapping):
            found += profile_problems(values, f"{where}.num")
            continue
        values = values if isinstance(values, (list, tuple)) else [values]
        if not values or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in values):
            found.append(f"{where}.{key} must be a whole number >= 1, or a list of them, got {full[key]!r}")
    for key in ("null", "shared"):
        value = full.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            found.append(f"{where}.{key} must be a whole number >= 0, got {value!r}")
    if full.get("pool", "none") not in POOLS:
        found.append(f"{where}.pool {full['pool']!r} is unknown; known: {', '.join(POOLS)}")
    elif full.get("pool", "none") != "none" and full.get("form", "lora") not in (*FORMS, "block"):
        found.append(f"{where}.pool needs a form of stacked low-rank experts: {', '.join(FORMS)}, block")
    if full.get("shared_gate", "none") not in SHARED_GATES:
        found.append(f"{where}.shared_gate {full['shared_gate']!r} is unknown; known: {', '.join(SHARED_GATES)}")
    for key, may_be_negative in (("shared_weight", True), ("alpha", False), ("scaling", True)):
        value = full.get(key)
        if key not in full or (key == "scaling" and value is None):
            continue
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or value == 0 or (value < 0 and not may_be_negative):
            wanted = "a number other than 0, or null" if may_be_negative else "a positive number"
            found.append(f"{where}.{key} must be {wanted}, got {value!r}")
    if not isinstance(full.get("rslora", False), bool):
        found.append(f"{where}.rslora must be true or false, got {full['rslora']!r}")
    dropout = full.get("dropout", 0.0)
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        found.append(f"{where}.dropout must be in [0, 1), got {dropout!r}")
    frozen = full.get("frozen", [])
    if frozen != "all" and not (isinstance(frozen, (list, tuple)) and all(isinstance(e, int) for e in frozen)):
        found.append(f"{where}.frozen must be a list of expert numbers or 'all', got {frozen!r}")
    names = full.get("names")
    if names is not None and not (
        isinstance(names, (list, tuple)) and all(isinstance(n, str) for n in names) and len(set(names)) == len(names)
    ):
        found.append(f"{where}.names must be a list of different names, one per expert, got {names!r}")
    elif names is not None and isinstance(full.get("num"), int) and len(names) != full["num"] + full.get("shared", 0):
        found.append(f"{where}.names holds {len(names)} names for {full['num']} experts")
    return found


def _schedule_problems(spec: Any, kind: str) -> list[str]:
    if not isinstance(spec, Mapping):
        return []
    found = []
    for key, value in spec.items():
        if is_schedule(value):
            try:
                build_schedule(value)
            except ConfigError as error:
                found.append(f"{kind}.{key}: {error}")
            if kind in ("scorer", "pool", "feature", "objective"):
                found.append(f"{kind}.{key} cannot follow a schedule; link and selector options and loss weights can")
    return found
