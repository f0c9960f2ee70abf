"""Addresses: how people write where an adapter is.

owner/name, owner/name@revision, hf://owner/name@revision/folder      repositories of a Hugging Face Hub
https://huggingface.co/owner/name/tree/revision/folder                the same, as in a browser
s3://bucket/folder, gs://..., az://..., file:///..., memory://...     storage, through fsspec
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..errors import ConfigError
from .names import is_version

STORAGE = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "file", "memory")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")


@dataclass(frozen=True)
class Address:
    """A parsed address: a repository with revision and folder, or the URL of a folder in storage."""

    text: str
    repo: str | None = None
    revision: str | None = None
    folder: str = ""

    @property
    def name(self) -> str:
        """Its last part that is no version number, which is what the adapter is called by default."""
        parts = [part for part in (self.folder or self.repo or self.text).split("/") if part and not is_version(part)]
        return parts[-1] if parts else ""


def is_address(root: object) -> bool:
    """Whether a library's root is an address with a scheme, and not a folder."""
    return isinstance(root, str) and "://" in root


def parse_address(text: str, endpoint: str) -> Address:
    """Read the address of an adapter.

    Args:
        text: as in the head of this module.
        endpoint: of the Hub, whose pages are addresses, too.

    Raises:
        ConfigError: it is no such address.
    """
    scheme, colon, rest = text.partition("://")
    if not colon:
        return _repository(text, text)
    if scheme == "hf":
        return _repository(text, rest)
    if scheme in ("http", "https"):
        for site in (endpoint, "https://huggingface.co", "https://hf.co"):
            if text.startswith(f"{site}/"):
                repo, _, tail = unquote(urlsplit(text).path[len(urlsplit(site).path) + 1 :]).partition("/tree/")
                revision, _, folder = tail.partition("/")
                return _repository(text, repo.strip("/") + (f"@{revision}" if revision else "") + f"/{folder}")
        raise ConfigError(f"'{text}' is no page of the Hub at {endpoint}; give its endpoint, or storage such as s3://")
    if scheme not in STORAGE or "::" in text:
        raise ConfigError(f"addresses of type '{scheme}' are not read; known: hf, https, {', '.join(STORAGE)}")
    if ".." in rest.split("/"):
        raise ConfigError(f"'{text}' holds '..'; write the folder itself")
    return Address(text.rstrip("/"))


def _repository(text: str, rest: str) -> Address:
    found = re.fullmatch(r"([^/@]+(?:/[^/@]+)?)(?:@([^/]+))?(?:/(.*))?", rest.strip("/"))
    repo, revision, folder = found.groups() if found else (rest, None, "")
    folder = (folder or "").strip("/")
    try:
        validate_repo_id(repo)
    except HFValidationError:
        here = "; for folders of this machine there are molora hub add and molora hub get --to"
        raise ConfigError(
            f"'{text}' is no address of an adapter: write owner/name, or s3://bucket/folder"
            + (here if text.startswith((".", "/", "~")) else "")
        ) from None
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise ConfigError(f"revision {revision!r} is no branch, tag or commit")
    if any(part in ("", ".", "..") for part in folder.split("/")) and folder:
        raise ConfigError(f"'{text}' names the folder '{folder}', which is none")
    return Address(text, repo, revision, folder)
