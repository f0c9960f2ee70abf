"""Write docs/systems.md: one row per recipe, from the recipes themselves and from the tests that prove them.

    python docs/make_systems.py          # or: make docs

A row takes its words from the header of the YAML (what it is, the paper, what differs from the authors' code), its
parts from the configuration, and its proof from the tests marked `@pytest.mark.proves("<recipe>")`, which are found by
reading the test files, not by running them. tests/test_docs.py holds the page to what this would write.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from molora.config import MoloraConfig, recipe_names
from molora.paths import recipes_dir

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "systems.md"
FIELD = re.compile(r"^(Paper|Command|Expected|Equation|Code|Differs|Decoding)\s+(.*)$")
# what a row does not repeat, because nearly every recipe has it
USUAL: dict[str, Any] = {
    "scorer": "linear",
    "link": "softmax",
    "granularity": "token",
    "share": "site",
    "per_site": False,
    "weights": "own",
}
PARTS = (
    "feature",
    "scorer",
    "weights",
    "link",
    "price",
    "selector",
    "granularity",
    "pool",
    "share",
    "per_site",
    "branches",
    "losses",
    "objective",
)

HEAD = """# Systems

Every published system here is a row of parts: a configuration, not a class. This page is written by `make docs` from
the recipes in `recipes/` and from the tests that prove them; a test holds it up to date. Parts that nearly all systems
share are left out of a row (linear scores, softmax, a decision per token and layer). "Differs" says where a recipe
departs from the authors' code or paper, and why; formulas that had to be inferred are named there. "Proof" lists the
tests that check the system against a closed form, an identity, or an independent reference.

| system | parts | differs, and why | proof |
|---|---|---|---|
"""


def header(name: str) -> dict[str, str]:
    """Return the fields of a recipe's header: `what`, and those of FIELD, each as one line of text."""
    fields: dict[str, list[str]] = {"what": []}
    current = "what"
    for line in (recipes_dir() / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line[1:].strip()
        found = FIELD.match(text)
        if found:
            current, text = found[1], found[2]
        if text:
            fields.setdefault(current, []).append(text)
    return {key: " ".join(lines) for key, lines in fields.items()}


def proofs() -> dict[str, list[tuple[str, str]]]:
    """Return, per recipe, the tests that prove it: path and name."""
    found: dict[str, list[tuple[str, str]]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        tables = _tables(tree)
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                for system in _proved(node.decorator_list, tables):
                    found.setdefault(system, []).append((str(path.relative_to(ROOT)), node.name))
    return found


def _tables(tree: ast.Module) -> dict[str, list[str]]:
    """Return the keys of the dicts, or the entries of the lists, that a test file names at its top level."""
    tables = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            entries = getattr(node.value, "keys", None) or getattr(node.value, "elts", None) or []
            tables[node.targets[0].id] = [e.value for e in entries if isinstance(e, ast.Constant)]
    return tables


def _proved(decorators: list[ast.expr], tables: Mapping[str, list[str]]) -> Iterator[str]:
    for one in decorators:
        if isinstance(one, ast.Call) and isinstance(one.func, ast.Attribute) and one.func.attr == "proves":
            for argument in one.args:
                if isinstance(argument, ast.Starred) and isinstance(argument.value, ast.Name):
                    yield from tables[argument.value.id]  # proves(*EQUATIONS)
                elif isinstance(argument, ast.Starred):
                    yield from ast.literal_eval(argument.value)
                else:
                    yield ast.literal_eval(argument)


def parts(name: str) -> str:
    """Return what a recipe is made of, without what nearly every recipe has."""
    config = MoloraConfig.from_recipe(name)
    words = [f"experts {_experts(config.experts)}"]
    for key in PARTS:
        value = getattr(config, key, None)
        if value in (None, [], {}) or value == USUAL.get(key) or (key == "pool" and config.granularity != "prompt"):
            continue
        if key == "losses":
            words.append("loss " + ", ".join(f"{_spec(loss)}" for loss in value))
        else:
            words.append(f"{key} {_spec(value)}")
    return "; ".join(words)


def _experts(experts: Mapping[str, Any]) -> str:
    shown = {"form": experts["form"], "num": experts["num"], "rank": experts["rank"]}
    defaults = MoloraConfig().experts
    shown |= {k: v for k, v in experts.items() if k not in (*shown, "alpha", "scaling", "dropout") and v != defaults[k]}
    return f"`{_plain(shown)}`"


def _spec(value: Any) -> str:
    if isinstance(value, Mapping) and "name" in value:
        rest = {k: v for k, v in value.items() if k != "name"}
        return f"`{value['name']}`" + (f" `{_plain(rest)}`" if rest else "")
    if isinstance(value, (list, tuple)):
        return ", ".join(_spec(one) for one in value)
    return f"`{_plain(value)}`"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {_plain(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_plain(v) for v in value) + "]"
    return str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").strip()


def page() -> str:
    """Return the whole page."""
    proved = proofs()
    unknown = sorted(set(proved) - set(recipe_names()))
    if unknown:
        raise SystemExit(f"tests are marked as proofs of unknown recipes: {', '.join(unknown)}")
    rows = []
    for name in recipe_names():
        fields = header(name)
        what = fields["what"].partition(": ")[2] or fields["what"]
        tests = ", ".join(f"[{test}](../{path})" for path, test in proved.get(name, []))
        paper = fields.get("Paper", "")
        system = f"[{name}](../recipes/{name}.yaml): {what} {paper}"
        differs = re.sub(r"^- ", "", fields.get("Differs", "")).replace(" - ", "<br>")
        rows.append("| " + " | ".join(_cell(c) for c in (system, parts(name), differs, tests)) + " |")
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    new = PAGE.with_suffix(".tmp")
    new.write_text(page(), encoding="utf-8")
    os.replace(new, PAGE)
    print(f"wrote {PAGE.relative_to(ROOT)}: {len(recipe_names())} systems")
