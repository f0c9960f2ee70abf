"""What comes into a library: an adapter is copied into a draft, given a card with hashes, and checked."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import save_file
from torch import nn

from .. import fingerprint
from ..base_weights import copy_problems, path_of_weight
from ..checkpoint import peft_model_of, save
from ..compat.layers import linear_sizes
from ..compat.registration import MOLORA
from ..errors import ConfigError, LoadError, raise_all
from ..files import CARD as README
from ..files import CONFIG, GATES, WEIGHTS, look
from .card import CARD, AdapterCard, hash_files, read_card
from .plain_yaml import read_yaml
from .verify import Limits, check_folder

HEADED = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # task types of which PEFT always saves the head, and wants it
KEPT = (CONFIG, WEIGHTS, README, GATES, "LICENSE", "NOTICE")  # of a folder that is added; the card is written anew


def fill(draft: Path, source: str | Path | nn.Module, adapter: str) -> nn.Module | None:
    """Copy an adapter folder into the draft, or save a model's adapter there; returns the base model of the latter."""
    if not isinstance(source, nn.Module):
        folder = Path(source).expanduser()
        if not folder.is_dir():
            raise LoadError(f"there is no folder '{source}'; give the folder that holds {CONFIG} and {WEIGHTS}")
        look(folder)  # completes a save that was interrupted
        _check_own(folder)
        for name in KEPT:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, draft / name)
        left = sorted(p.name for p in folder.iterdir() if p.name not in (*KEPT, CARD) and not p.name.startswith("."))
        if left and (folder / CONFIG).is_file():
            warnings.warn(f"not a part of the adapter, so not added: {', '.join(left)}", stacklevel=3)
        return None
    model = next((m for m in source.modules() if isinstance(m, PeftModel)), None)
    if model is not None and adapter in model.peft_config and model.peft_config[adapter].peft_type != MOLORA:
        model.save_pretrained(str(draft), selected_adapters=[adapter])
        if adapter != "default":
            for path in (draft / adapter).iterdir():
                path.rename(draft / path.name)
            (draft / adapter).rmdir()
    else:
        model = peft_model_of(source, adapter)
        save(model, draft, adapter)
    return model.get_base_model()


def _check_own(folder: Path) -> None:
    """Refuse links out of a folder, which would bring any file of this machine into the library and from there on.

    Those in the cache of Hugging Face are good: from <cache>/<repo>/snapshots/<commit> they lead to the blobs of the
    repository, or to those that repositories share.
    """
    home = folder.resolve()
    good = [home, home.parents[1] / "blobs", home.parents[2] / "blobs"] if home.parent.name == "snapshots" else [home]
    wrong = []
    for name in (*KEPT, CARD):
        target = (folder / name).resolve()
        if (folder / name).is_symlink() and not any(target.is_relative_to(place) for place in good):
            wrong.append(f"{name} is a link to '{target}'")
    raise_all(wrong, LoadError, f"adapter '{folder}' was not added; copy what it links to into it if you trust it")


def make_card(draft: Path, source: Any, card: Any, fields: Mapping[str, Any]) -> AdapterCard:
    """Return the card of a filled draft: as given or found, with `fields` in place; base and hashes are filled in.

    Args:
        draft: the adapter's files.
        source: where they came from; a folder may hold a card, whose hashes must be right.
        card: an AdapterCard, its content, a card.yaml, or None.
        fields: of the card, in place of those in `card`.

    Raises:
        ConfigError: the card cannot be used.
        LoadError: files have other content than the card beside them says.
    """
    files = hash_files(draft)
    if card is None and not isinstance(source, nn.Module) and (Path(source).expanduser() / CARD).is_file():
        card = read_card(Path(source).expanduser())
        changed = [f"{name} has other content than its card says" for name, sha in files.items()
                   if card.files.get(name, sha) != sha]  # fmt: skip
        raise_all(changed, LoadError, f"adapter '{source}' was not added")
    elif isinstance(card, (str, Path)):
        try:
            card = AdapterCard.from_dict(read_yaml(Path(card).expanduser().read_text(encoding="utf-8"), str(card)))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the card '{card}' cannot be read: {error}") from None
    elif isinstance(card, Mapping):
        card = AdapterCard.from_dict(card)
    card = (card or AdapterCard()).replace(**{**fields, "files": files})
    config = look(draft).config or {}
    if not card.base and isinstance(config.get("base_model_name_or_path"), str):
        card = card.replace(base=config["base_model_name_or_path"])
    if card.fingerprint is None and fingerprint.is_well_formed(config.get("fingerprint")):
        card = card.replace(fingerprint=config["fingerprint"])
    return card


def with_fingerprint(card: AdapterCard, draft: Path, base: nn.Module | None) -> AdapterCard:
    """Return the card of a filled draft with the fingerprint of its base, if that is here and it has none."""
    if card.fingerprint is not None or base is None:
        return card
    whole = (look(draft).config or {}).get("modules_to_save")
    return card.replace(fingerprint=fingerprint.of_model(base, linear_sizes, whole)[0])


def leave_out_copies(draft: Path, base: nn.Module) -> list[str]:
    """Take weights that are the base's own out of a LoRA in a draft; returns their names.

    PEFT saves the head or the embedding beside a LoRA on it. A library has no base to compare them with later, so they
    are left out while it is here. Where one of them differs, all stay, and `check` tells it.

    Raises:
        LoadError: it is a classifier, which PEFT does not load without its head.
    """
    contents = look(draft)
    if contents.problems or (contents.config or {}).get("peft_type") != "LORA":
        return []
    copies = {path: name for name in contents.tensors if (path := path_of_weight(name, base)) is not None}
    if not copies or copy_problems(copies, contents.read(), base):
        return []
    config, gone = dict(contents.config or {}), set(copies.values())
    if config.get("modules_to_save") and config.get("task_type") in HEADED:
        raise LoadError(
            f"PEFT loads no {config['task_type']} adapter without its head ({', '.join(sorted(copies))}), and a "
            "library keeps no weights of a base; mix it from its own folder: molora.compose(base, [folder])"
        )
    save_file({n: t for n, t in contents.read() if n not in gone}, draft / WEIGHTS, {"format": "pt"})
    if config.get("modules_to_save"):
        config["modules_to_save"] = None  # what it names is gone
        (draft / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    return sorted(gone)


def check(folder: Path, base: nn.Module | None = None, limits: Limits | None = None) -> list[str]:
    """Return everything that is wrong with an adapter folder of a library, which has a card with all hashes."""
    problems = check_folder(folder, base=base, limits=limits).problems
    if not (folder / CARD).exists():
        problems.append(f"{CARD} is missing; write one, or add the adapter again with: molora hub add")
    return problems
