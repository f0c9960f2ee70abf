"""A fitted selector as one folder: selector.yaml says what it is, selector.safetensors holds its vectors.

Texts are not kept, vectors of examples are. A kill at any moment leaves the old folder or the new one, and a folder
whose two files do not belong together is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import ConfigError, LoadError, raise_all
from ..files import finish, read_header, replacing
from ..hub.plain_yaml import read_yaml, write_yaml
from .embed import build_embedder
from .embedder import Embedder, Given, as_embedder
from .registry import embedders
from .selector import PromptSelector

SELECTOR, VECTORS = "selector.yaml", "selector.safetensors"
FORMAT = 1
MAX_YAML = 16_000_000
_KEYS = {"format", "version", "embedder", "settings", "adapters", "weights"}


def save_selector(selector: PromptSelector, folder: str | Path) -> Path:
    """Write a fitted selector into a folder, which is replaced as a whole; returns the folder."""
    folder, whole = Path(folder).expanduser(), selector.whole
    tensors = {f"method.{name}": tensor for name, tensor in whole.method.state().items()}
    tensors["examples"] = torch.cat(selector.groups)
    embedder = selector.embedder
    told: dict[str, Any] = {
        "format": FORMAT,
        "version": selector.digest,
        "embedder": {
            "name": None if isinstance(embedder, Given) else embedder.name,
            "called": embedder.name,
            "options": {key: value for key, value in embedder.options.items() if value is not None},
            "digest": embedder.digest,
        },
        "settings": selector.settings,
        "adapters": [
            {"name": name, "examples": len(group), "digest": selector.sources.get(name, "")}
            for name, group in zip(selector.names, selector.groups, strict=True)
        ],
    }
    with replacing(folder) as draft:
        save_file({k: v.contiguous().clone() for k, v in tensors.items()}, draft / VECTORS, {"format": "pt"})
        told["weights"] = hashlib.sha256((draft / VECTORS).read_bytes()).hexdigest()
        (draft / SELECTOR).write_text(write_yaml(told), encoding="utf-8")
    return folder


def load_selector(
    folder: str | Path,
    embed: Embedder | Callable[[list[str]], Any] | None = None,
    *,
    model: nn.Module | None = None,
    tokenizer: Any = None,
) -> PromptSelector:
    """Read a selector that `save_selector` has written; it chooses exactly as it did.

    Args:
        folder: where it is.
        embed: the embedder that it was fitted with; None: one is built as the folder says.
        model, tokenizer: for an embedder that reads a model.

    Raises:
        LoadError: the folder is damaged, or the embedder gives other vectors than the one it was fitted with.
        ConfigError: the embedder cannot be built.
    """
    folder = Path(folder).expanduser()
    told = _read(folder)
    try:
        return _load(folder, told, embed, model, tokenizer)
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
        RuntimeError,
        SafetensorError,
        OSError,
    ) as error:
        if isinstance(error, (LoadError, ConfigError)):
            raise
        raise LoadError(f"'{folder}' holds no prompt selector that can be read: {error!r:.200}") from None


def saved_embedder(folder: str | Path) -> dict[str, Any] | None:
    """Return the spec of the embedder that a saved selector was fitted with; None for a function of its user.

    Raises:
        LoadError: there is no selector, or it is damaged.
    """
    told = _read(Path(folder).expanduser())["embedder"]
    if not isinstance(told, dict) or not isinstance(told.get("options"), dict):
        raise LoadError(f"'{folder}' does not say which embedder it was fitted with; fit the selector again")
    return None if told.get("name") is None else {"name": told["name"], **told["options"]}


def wants_model(folder: str | Path) -> bool:
    """Tell whether the embedder of a saved selector reads the hidden states of a model; raise LoadError as above."""
    spec = saved_embedder(folder)
    return spec is not None and spec["name"] in embedders and bool(embedders.fact(spec["name"], "reads_model", False))


def _read(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise LoadError(f"there is no folder '{folder}'; make one with: molora prompts fit --out {folder}")
    finish(folder)
    path = folder / SELECTOR
    if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_YAML:
        raise LoadError(f"'{folder}' holds no usable {SELECTOR}; make one with: molora prompts fit --out {folder}")
    try:
        told = read_yaml(path.read_text(encoding="utf-8"), SELECTOR)
    except (ConfigError, UnicodeDecodeError) as error:
        raise LoadError(f"'{folder}': {error}") from None
    if not isinstance(told, dict) or set(told) != _KEYS:
        raise LoadError(f"'{path}' must have the keys {', '.join(sorted(_KEYS))}")
    if told["format"] != FORMAT:
        raise LoadError(f"'{path}' has format {told['format']!r}, this molora reads {FORMAT}; update molora")
    return told


def _load(folder: Path, told: Mapping[str, Any], embed: Any, model: nn.Module | None, tokenizer: Any) -> PromptSelector:
    file = folder / VECTORS
    header = read_header(file)
    if hashlib.sha256(file.read_bytes()).hexdigest() != told["weights"]:
        raise LoadError(f"'{file}' is not the file that {SELECTOR} describes; fit the selector again")
    wrong = [f"tensor '{name}' has type {info.dtype}" for name, info in header.items() if not _is_fine(info.dtype)]
    raise_all(wrong, LoadError, f"'{file}' cannot be used")
    tensors: dict[str, Tensor] = load_file(file)
    wrong = [f"tensor '{name}' holds NaN or Inf" for name, tensor in tensors.items() if not tensor.isfinite().all()]
    raise_all(wrong, LoadError, f"'{file}' cannot be used")
    settings = dict(told["settings"])
    method = settings.pop("method")
    embedder = _embedder(folder, told["embedder"], embed, model, tokenizer)
    selector = PromptSelector(embedder, method, **settings)
    names = tuple(str(one["name"]) for one in told["adapters"])
    counts = [int(one["examples"]) for one in told["adapters"]]
    groups = tuple(group.contiguous() for group in tensors.pop("examples").split(counts))
    state = {name.removeprefix("method."): tensor for name, tensor in tensors.items()}
    sources = {str(one["name"]): one["digest"] for one in told["adapters"] if one["digest"]}
    selector.take(names, groups, sources, selector.restored(names, groups, state))
    if selector.digest != told["version"]:
        raise LoadError(
            f"'{folder}' was changed by hand: it is no longer version {told['version']!r:.20}; fit it again"
        )
    return selector


def _is_fine(dtype: str) -> bool:
    return dtype in ("F32", "F64", "I64")


def _embedder(folder: Path, told: Mapping[str, Any], embed: Any, model: nn.Module | None, tokenizer: Any) -> Embedder:
    if embed is not None:
        found = as_embedder(embed)
    elif told["name"] is None:
        raise LoadError(f"'{folder}' was fitted with an embedder of your own, '{told['called']}'; give it as embed=")
    else:
        found = build_embedder({"name": told["name"], **told["options"]}, model, tokenizer)
    if (found.name, found.digest) != (told["called"], told["digest"]):
        raise LoadError(
            f"'{folder}' was fitted with embedder '{told['called']}' ({told['digest']!r:.14}), but this one is "
            f"'{found.name}' ({found.digest!r:.14}): their vectors do not compare; fit the selector again"
        )
    return found
