"""The house: who may import whom, and that everything public is described.

Read from the source with ast, without importing anything. The rule behind the table: what computes (routing, experts,
kernels) knows torch and nothing of Hugging Face; what touches PEFT's and transformers' internals stays in few places;
nothing imports backwards.
"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "molora"

# unit -> (units of molora it may import, packages of others it may import, why). A unit is a module or a folder of
# molora; a folder's modules may import each other. The order is that of the floors: each unit stands on those above.
UNITS: dict[str, tuple[set[str], set[str], str]] = {
    "errors": (set(), set(), "messages only"),
    "registry": ({"errors"}, set(), "names to functions; standard library only"),
    "paths": ({"errors"}, set(), "where the shipped files are"),
    "plan": ({"errors"}, set(), "works on module paths alone"),
    "subcommands": (set(), set(), "commands below a command; standard library only"),
    "fingerprint": (set(), {"torch"}, "hashes shapes and samples values"),
    "undo": (set(), {"torch"}, "puts modules back as they were"),
    "kernels": ({"errors"}, {"torch", "triton"}, "the routed product and its faster twins; triton only where a GPU is"),
    "routing": ({"errors", "registry"}, {"torch"}, "how gates are made"),
    "experts": ({"errors", "registry", "kernels"}, {"torch"}, "what gates multiply, each form by its name"),
    "headers": ({"errors"}, set(), "reads safetensors headers by hand"),
    "files": (
        {"errors", "headers"},
        {"torch", "safetensors", "huggingface_hub"},
        "reads adapters from disk or from the Hub",
    ),
    "compat": (set(), {"torch", "peft", "transformers", "bitsandbytes"}, "the one place that knows others' internals"),
    "config_checks": (
        {"errors", "plan", "routing", "experts"},
        set(),
        "what is wrong with a configuration; checks every component by its registry",
    ),
    "config": (
        {"errors", "registry", "paths", "files", "compat", "config_checks", "routing"},
        {"peft", "yaml"},
        "MoloraConfig is a PeftConfig, and a recipe is YAML",
    ),
    "_quiet": (set(), set(), "imported first, so that bitsandbytes does not tell which kernels are missing"),
    "blocks": ({"errors", "kernels"}, {"torch"}, "rows of (token, expert) pairs through an MLP"),
    "layers": (
        {"errors", "blocks", "compat", "routing", "experts", "kernels"},
        {"torch", "peft"},
        "RoutedLinear is a BaseTunerLayer; kernels, to run base and experts in one call",
    ),
    "embeddings": ({"errors", "experts", "kernels", "layers"}, {"torch"}, "a routed lookup"),
    "native_experts": (
        {"errors", "compat", "experts", "kernels", "layers", "routing"},
        {"torch"},
        "LoRAs on stacked native experts",
    ),
    "sites": (
        {
            "errors",
            "plan",
            "compat",
            "config_checks",
            "blocks",
            "experts",
            "layers",
            "embeddings",
            "native_experts",
            "routing",
        },
        {"torch"},
        "which routed layer a module becomes",
    ),
    "calls": (set(), {"torch"}, "what belongs to one call while it runs; torch, to know compiled code"),
    "first_pass": ({"errors", "compat", "routing"}, {"torch"}, "runs the model without adapters, for X-LoRA"),
    "hooks": (
        {"errors", "calls", "compat", "first_pass", "routing"},
        {"torch"},
        "surrounds the forward of a base model",
    ),
    "adapter_names": ({"errors", "compat", "layers"}, {"torch"}, "which names PEFT can tell apart"),
    "decisions": (
        {"errors", "plan", "compat", "config", "layers", "hooks", "routing", "sites"},
        {"torch"},
        "which layers share a decision, and the routers that take them",
    ),
    "tuner": (
        {"adapter_names", "decisions", "errors", "plan", "fingerprint", "undo", "compat", "config", "layers", "hooks"}
        | {"routing", "experts", "sites"},
        {"torch", "peft", "accelerate"},
        "MoloraModel is a BaseTuner; accelerate, to build on the meta device as PEFT does",
    ),
    "wrapping": ({"errors", "compat", "config", "hooks"}, {"torch", "peft"}, "wrap() ends in get_peft_model"),
    "control": ({"errors", "plan", "hooks", "layers", "tuner", "routing"}, {"torch"}, "what users say to a model"),
    "slimming": (
        {"errors", "plan", "control", "routing"},
        {"torch"},
        "profiles a model's decisions and writes how many experts each layer keeps",
    ),
    "checkpoint": (
        {"adapter_names", "errors", "compat", "config", "files", "fingerprint", "layers", "tuner", "undo", "wrapping"},
        {"torch", "peft"},
        "loads through PEFT's own layout",
    ),
    "growth": (
        {"errors", "plan", "undo", "config", "control", "experts", "layers", "routing", "sites"},
        {"torch"},
        "changes a mixture that is there: more experts, new tasks",
    ),
    "base_weights": (set(), {"torch"}, "compares saved weights with those of a base"),
    "lora_files": ({"base_weights", "files", "plan"}, {"torch", "peft"}, "reads LoraConfig and LoRA tensors"),
    "from_peft": (
        {"errors", "plan", "compat", "config", "control", "files", "lora_files", "undo", "wrapping"},
        {"torch", "peft"},
        "LoRAs become the experts of a mixture",
    ),
    "to_peft": (
        {"errors", "plan", "compat", "config", "control", "checkpoint", "files", "layers", "embeddings"},
        {"torch", "peft", "safetensors"},
        "writes LoraConfig and LoRA tensors",
    ),
    "posthoc": (
        {
            "errors",
            "registry",
            "plan",
            "undo",
            "compat",
            "config",
            "control",
            "growth",
            "from_peft",
            "to_peft",
            "routing",
        }
        | {"experts", "files", "layers"},
        {"torch", "numpy", "peft", "safetensors", "cmaes"},
        "routers made after training; numpy and cmaes for the searches that have no gradient",
    ),
    "train": (
        {"molora", "errors", "registry", "compat", "config", "control", "checkpoint", "files", "hooks", "wrapping"}
        | {"routing"},
        {"torch", "peft", "transformers", "datasets", "huggingface_hub", "yaml"},
        "drives transformers' Trainer over datasets; the version of molora goes into the record of a run",
    ),
    "reports": (
        {"errors", "plan", "routing", "train"},
        {"matplotlib", "numpy"},
        "tables and pictures of what routing and doctor measured",
    ),
    "hub": (
        {
            "base_weights",
            "lora_files",
            "errors",
            "registry",
            "paths",
            "plan",
            "undo",
            "headers",
            "files",
            "fingerprint",
            "compat",
            "config",
            "control",
        }
        | {"checkpoint", "from_peft", "to_peft", "wrapping", "routing", "experts", "posthoc", "train", "reports"}
        | {"subcommands"},
        {"torch", "peft", "transformers", "safetensors", "huggingface_hub", "fsspec", "filelock", "yaml"},
        "a library on disk and its commands; filelock, so that one process at a time changes it",
    ),
    "prompts": (
        {"errors", "registry", "files", "fingerprint", "compat", "train", "hub", "subcommands"},
        {"torch", "safetensors", "transformers"},
        "chooses adapters by the prompt; transformers in its embedders, train to load a model for the command",
    ),
    "serve": (
        {"errors", "registry", "plan", "files", "fingerprint", "compat", "config", "control", "checkpoint"}
        | {"lora_files"}
        | {"layers", "tuner", "wrapping", "routing", "experts", "train", "reports", "hub", "prompts", "subcommands"},
        {"torch", "peft", "transformers", "accelerate", "yaml", "sqlalchemy", "fastapi", "starlette", "pydantic"}
        | {"prometheus_client", "uvicorn", "httpx", "safetensors", "vllm", "ray", "filelock", "anyio"},
        "one model, many tenants: FastAPI for HTTP, SQLAlchemy for who may use what; only the command line imports it",
    ),
    "listing": (
        {"registry", "paths", "config", "experts", "routing"},
        set(),
        "the recipes and the components that there are",
    ),
    "commands": (
        {"errors", "config", "files", "listing", "routing", "train", "reports", "hub", "prompts", "serve"},
        {"transformers"},
        "one function per command; transformers, to set how much it prints",
    ),
    "cli": (
        {"errors", "commands", "hub", "prompts", "serve"},
        set(),
        "parse, call, print; quick, so it imports the rest only when needed",
    ),
    "__init__": (
        {"errors", "kernels", "config", "control", "checkpoint", "wrapping", "growth", "from_peft", "to_peft", "train"}
        | {"hub", "_quiet"},
        set(),
        "the public names, nothing else",
    ),
}

FILES = sorted(ROOT.rglob("*.py"))
MODULES = {".".join(("molora", *path.relative_to(ROOT).with_suffix("").parts)): path for path in FILES}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def resolve(name: str) -> str:
    """The module of this package that a dotted name means: itself, its package, or the module that holds the name."""
    while name not in MODULES:
        if f"{name}.__init__" in MODULES:
            return f"{name}.__init__"
        name = name.rpartition(".")[0]
    return name


def imports_of(module: str) -> tuple[set[str], set[str]]:
    """Modules of molora and top-level packages of others that a module imports, anywhere in it."""
    ours, others = set(), set()
    package = module.split(".")[:-1]
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{stem}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "molora":
                ours.add(resolve(name))
            else:
                others.add(name.split(".")[0])
    return ours - {module}, others - set(sys.stdlib_module_names)


def unit_of(module: str) -> str:
    return module.split(".")[1]


def shown_unit(module: str) -> str:
    return "molora" if module == "molora.__init__" else unit_of(module)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_follow_the_table(module):
    unit = unit_of(module)
    assert unit in UNITS, (
        f"molora/{unit} is new: add it to UNITS in tests/test_architecture.py with what it may import and why"
    )
    allowed, packages, _ = UNITS[unit]
    ours, others = imports_of(module)
    wrong = sorted({shown_unit(name) for name in ours} - allowed - {unit})
    assert not wrong, (
        f"{module} imports {wrong}, which the table does not allow to '{unit}' (it allows {sorted(allowed)})"
    )
    strange = sorted(others - packages)
    assert not strange, f"{module} imports {strange}, which the table does not allow to '{unit}'"


def test_the_table_is_as_small_as_it_can_be():
    """Nothing is allowed that nothing uses, or the table would promise less than the code keeps."""
    for unit, (allowed, packages, why) in UNITS.items():
        modules = [name for name in MODULES if unit_of(name) == unit]
        assert modules, f"UNITS names '{unit}', which does not exist"
        assert why
        used, used_packages = set(), set()
        for module in modules:
            ours, others = imports_of(module)
            used |= {shown_unit(name) for name in ours} - {unit}
            used_packages |= others
        assert not allowed - used, f"'{unit}' may import {sorted(allowed - used)}, but does not"
        assert not packages - used_packages, f"'{unit}' may import {sorted(packages - used_packages)}, but does not"


def test_the_core_knows_torch_and_nothing_of_hugging_face():
    for unit in ("routing", "experts", "kernels"):
        allowed, packages, _ = UNITS[unit]
        assert packages == ({"torch", "triton"} if unit == "kernels" else {"torch"})
        assert allowed <= {"errors", "registry", "kernels"}
    assert "kernels" not in UNITS["routing"][0] and "experts" not in UNITS["routing"][0]


def test_no_unit_stands_on_a_later_one():
    order = list(UNITS)
    for unit, (allowed, _, _) in UNITS.items():
        later = [name for name in allowed - {"molora"} if order.index(name) > order.index(unit)]
        assert not later, f"'{unit}' may import {later}, which comes later in the table"


def test_no_cycles_between_modules():
    edges = {module: imports_of(module)[0] for module in MODULES}
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        assert module not in path, f"import cycle: {' -> '.join([*path[path.index(module) :], module])}"
        if module in done:
            return
        for target in sorted(edges[module] - {"molora.__init__"}):  # the package itself is imported before any module
            visit(target, [*path, module])
        done.add(module)

    for module in sorted(MODULES):
        visit(module, [])


def test_nothing_is_unpickled_and_no_text_is_run():
    forbidden = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve"}
    for module, tree in TREES.items():
        assert not imports_of_standard(tree) & forbidden, f"{module} imports a module that unpickles"
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = node.func.value
                is_torch = isinstance(owner, ast.Name) and owner.id == "torch"
                loads = is_torch and node.func.attr == "load"
                # the one reader of others' checkpoints, which takes tensors and plain values alone
                plain = module == "molora.hub.migrate.pickles" and "weights_only=True" in map(
                    ast.unparse, node.keywords
                )
                assert not loads or plain, f"{module}:{node.lineno} calls torch.load"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec"), f"{module}:{node.lineno} calls {node.func.id}"


def imports_of_standard(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.add(node.module.split(".")[0])
    return names


# --- descriptions -----------------------------------------------------------------------------------------------------


def public_parts(tree: ast.Module):
    """(qualified name, node) of every public class, function and method; private classes hide what is in them."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_"):
            yield node.name, node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node
            for part in node.body:
                if isinstance(part, ast.FunctionDef) and (not part.name.startswith("_") or part.name == "__init__"):
                    yield f"{node.name}.{part.name}", part


@pytest.mark.parametrize("module", sorted(MODULES))
def test_everything_public_has_a_docstring(module):
    tree = TREES[module]
    assert ast.get_docstring(tree), f"{module} needs a docstring that says what it is"
    bare = [
        f"{name} (line {node.lineno})"
        for name, node in public_parts(tree)
        if not ast.get_docstring(node) and not name.endswith(".__init__") and not is_setter(node)
    ]
    assert not bare, f"{module}: no docstring on {', '.join(bare)}"


def is_setter(node: ast.AST) -> bool:
    return any(isinstance(d, ast.Attribute) and d.attr == "setter" for d in getattr(node, "decorator_list", []))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_everything_public_has_type_hints(module):
    missing = []
    for name, node in public_parts(TREES[module]):
        if isinstance(node, ast.ClassDef):
            continue
        spec = node.args
        every = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *filter(None, (spec.vararg, spec.kwarg))]
        is_method = "." in name and not any(
            isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list
        )
        for argument in every[1:] if is_method else every:
            if argument.annotation is None:
                missing.append(f"{name}({argument.arg}) (line {node.lineno})")
        if node.returns is None:
            missing.append(f"{name} -> ? (line {node.lineno})")
    assert not missing, f"{module}: no type hint on {', '.join(missing)}"
