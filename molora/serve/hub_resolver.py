"""HubResolver: LoRAs of a library for a server that loads adapters by path: found by name, checked, and copied.

The copy's folder is called by the digest of its content. A server whose caches go by path, as vLLM's cache of keys and
values does, so never serves what belongs to other weights; and what was checked is what is loaded, since nobody but
this user can change a copy.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, LoadError, MoloraError
from ..files import CONFIG, WEIGHTS
from ..fingerprint import differences
from ..hub.address import is_address
from ..hub.card import hash_file
from ..hub.entry import Entry
from ..hub.limits import Limits
from ..hub.names import parse
from ..hub.store import Hub
from ..hub.verify import check_folder
from .tenants.tenant import Tenant

HUB, ALLOW, BASE = "MOLORA_HUB", "MOLORA_ALLOW", "MOLORA_BASE"  # variables of the environment
REMEMBERED, MOST = 30.0, 1_000  # seconds for which a refusal holds, and how many are remembered
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


@dataclass(frozen=True)
class Found:
    """An adapter that vLLM may load.

    Attributes:
        name: as it was asked for.
        id: a number from 1 to 2**60, which depends on the content alone.
        path: a folder that holds config and weights, and whose name is the digest of the adapter.
        digest: of the adapter.
    """

    name: str
    id: int
    path: Path
    digest: str


class HubResolver:
    """Finds adapters of a library for a server that loads plain LoRAs; any thread may ask.

    Args:
        hub: folder of the library.
        cache: folder of checked copies, this user's alone.
        allow: which names are served, as in the rights of a tenant: `news`, `news@2`, `acme/news`, `acme/*`; None: all
            adapters by their plain names, and none by a tenant's.
        bases: further names of the base model, beside what adapters say themselves.
        limits: of an adapter.
        log: where reasons are told.

    Raises:
        ConfigError: the library is none in a folder, or a pattern is none.
    """

    def __init__(
        self,
        hub: str | Path,
        cache: str | Path,
        allow: tuple[str, ...] | None = None,
        bases: tuple[str, ...] = (),
        limits: Limits | None = None,
        log: logging.Logger | None = None,
    ) -> None:
        if is_address(hub):
            raise ConfigError(f"{HUB} must be a folder here, got '{hub}'; fetch it with: molora hub pull")
        self.hub = Hub(hub)
        self.root = self.hub.root.resolve()
        if not self.root.is_dir():
            raise ConfigError(f"there is no library at '{hub}', which {HUB} names")
        self.log = log or logging.getLogger("molora.serve.resolver")
        self.cache, self.bases, self.limits = Path(cache).expanduser(), bases, limits or Limits()
        # the rights of a server are those of a tenant: one way to write patterns, one way to read them
        self.rights = None if allow is None else Tenant("vllm", models=frozenset(allow)).check()
        self._refused: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, base: str, name: str) -> Found | None:
        """Return an adapter by name; None when there is none that may be served, and then the log says why.

        Args:
            base: name or folder of the model that the server runs.
            name: as a client wrote it.
        """
        with self._lock:
            if self._refused.get((base, name), 0.0) > time.monotonic():
                return None  # or a client could make the server read a damaged file again and again
        try:
            return self._find(base, name)
        except ConfigError as error:  # no such adapter, or no name at all
            self.log.info("%.120r is not served: %s", name, error)
        except (MoloraError, OSError) as error:
            self.log.warning("%.120r is refused: %s", name, error)
        with self._lock:
            self._refused[base, name] = time.monotonic() + REMEMBERED
            while len(self._refused) > MOST:
                self._refused.popitem(last=False)
        return None

    def _find(self, base: str, name: str) -> Found:
        tenant, slash, plain = name.rpartition("/")
        ref = parse(plain)  # a plain name, so it cannot lead out of the library
        if slash and not _TENANT.fullmatch(tenant):
            raise ConfigError("it is neither NAME nor TENANT/NAME")
        if self.rights is None and slash:
            raise ConfigError(f"names of tenants are served when {ALLOW} lists them")
        entry = self.hub.get(ref)
        # what counts is the right to the adapter itself, whatever alias it was asked for by
        if self.rights is not None and not self.rights.may(f"{tenant}{slash}{entry.ref}"):
            raise ConfigError(f"{ALLOW} does not list {tenant}{slash}{entry.ref}")
        self._check_place(entry.folder)
        _check_kind(entry)
        check_folder(entry.folder, limits=self.limits).require(f"{entry.ref} cannot be trusted")
        self._check_base(entry, base)
        return Found(name, int(entry.digest[:15], 16) + 1, self._copy(entry), entry.digest)

    def _check_place(self, folder: Path) -> None:
        """Refuse a folder that links lead to: the library holds its adapters itself."""
        found = folder.resolve()
        wanted = self.root / folder.parent.name / folder.name
        if found != wanted or not found.is_relative_to(self.root):
            raise LoadError(f"'{folder}' leads out of the library, to '{found}'")

    # --- the base -----------------------------------------------------------------------------------------------------

    def _check_base(self, entry: Entry, base: str) -> None:
        """Refuse an adapter for another model: by sampled weights where they can be read, else by name."""
        compared = self._compare_weights(entry, Path(base))
        if compared:
            return
        config = json.loads((entry.folder / CONFIG).read_bytes())
        known = {str(name) for name in (entry.card.base, config.get("base_model_name_or_path")) if name}
        if base in known or known & set(self.bases) or _same_folder(base, known):
            return
        raise LoadError(
            f"{entry.ref} is for {' or '.join(sorted(known)) or 'a model it does not name'}, the server runs '{base}'; "
            f"where these are the same, set {BASE} to the former"
        )

    def _compare_weights(self, entry: Entry, folder: Path) -> bool:
        """Return whether sampled weights of the model could be compared; raise LoadError when they differ."""
        saved = entry.card.fingerprint
        if saved is None or not folder.is_dir():
            return False
        weights = _weights(folder, set(saved["samples"]))
        # of the files of a model only weights are known, not its layers, so that part is compared with itself
        problems = differences(saved, saved, weights)
        if problems:
            raise LoadError(f"{entry.ref} is for another model than '{folder}': {'; '.join(problems[:3])}")
        return bool(weights)

    # --- copies -------------------------------------------------------------------------------------------------------

    def _copy(self, entry: Entry) -> Path:
        """Return the folder of a copy that is what the card says, byte for byte; made where there is none."""
        self.cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = self.cache.stat()
        if hasattr(os, "geteuid") and (status.st_uid != os.geteuid() or status.st_mode & 0o022):
            raise LoadError(f"others may write to '{self.cache}', so copies there are not safe; give another folder")
        folder = self.cache / entry.digest
        if self._is_whole(folder, entry):
            return folder
        draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=self.cache))
        try:
            for name in (CONFIG, WEIGHTS):
                shutil.copyfile(entry.folder / name, draft / name, follow_symlinks=False)
                (draft / name).chmod(0o444)
            if not self._is_whole(draft, entry):  # it was changed since it was checked
                raise LoadError(f"{entry.ref} is not what its card says")
            draft.chmod(0o755)
            with suppress(OSError):  # a damaged copy makes room; a good one of another process stays
                if not self._is_whole(folder, entry):
                    shutil.rmtree(folder, ignore_errors=True)
                os.rename(draft, folder)
            if not self._is_whole(folder, entry):
                raise LoadError(f"no copy of {entry.ref} could be kept in '{self.cache}'")
            return folder
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _is_whole(self, folder: Path, entry: Entry) -> bool:
        if folder.is_symlink() or not folder.is_dir():
            return False
        paths = {path.name: path for path in folder.iterdir()}
        return set(paths) == {CONFIG, WEIGHTS} and all(
            path.is_file() and not path.is_symlink() and hash_file(path) == entry.card.files.get(name)
            for name, path in paths.items()
        )


def _check_kind(entry: Entry) -> None:
    """Refuse what is no plain LoRA."""
    if entry.kind == "mixture":
        raise LoadError(
            f"{entry.ref} is a mixture whose router decides for every token, which vLLM cannot; serve it with molora "
            "serve, or write one expert or fixed weights of it with molora export"
        )
    if entry.kind != "lora":
        raise LoadError(f"{entry.ref} is of type '{entry.kind}', and vLLM loads LoRAs")


def _weights(folder: Path, wanted: set[str]) -> dict[str, Any]:
    """Return some weights of a model by name, from its safetensors files; those that are not there are left out."""
    from safetensors import SafetensorError, safe_open

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in wanted & set(file.keys()):
                    found[name] = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise LoadError(f"'{path}' of the base model cannot be read: {error}") from None
    return found


def _same_folder(base: str, known: set[str]) -> bool:
    with suppress(OSError):
        return any(Path(name).is_dir() and os.path.samefile(name, base) for name in known)
    return False
