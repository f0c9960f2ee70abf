"""API keys: how they are made, recognised and stored.

A key is 256 random bits. What is stored is a salted SHA-256 of it, which tells nothing about so long a key, and an id
to find the row by. Keys are compared in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, field

from ...errors import ConfigError

KINDS = {"tenant": "mlr", "admin": "mlradmin"}  # kind -> how its keys begin
SHORTEST = 32  # characters of a key that was made elsewhere
_OURS = re.compile(r"(?:mlr|mlradmin)_([0-9a-f]{16})_[A-Za-z0-9_-]{43}")


@dataclass(frozen=True)
class NewKey:
    """A key that was just made: the one moment at which it can be read.

    Attributes:
        id: names the key in lists and commands; it is not secret.
        secret: the key itself.
        tenant: whose it is; None for an admin key.
    """

    id: str
    tenant: str | None
    secret: str = field(repr=False)


@dataclass(frozen=True)
class KeyInfo:
    """What is known of a stored key; times are seconds since 1970."""

    id: str
    tenant: str | None
    label: str
    created: float
    expires: float | None
    revoked: float | None

    def is_good(self, now: float) -> bool:
        """Whether the key opens anything at this time."""
        return self.revoked is None and (self.expires is None or now < self.expires)


def new_key(kind: str) -> tuple[str, str]:
    """Return the id and the text of a new random key of a kind, `tenant` or `admin`."""
    name = secrets.token_hex(8)
    return name, f"{KINDS[kind]}_{name}_{secrets.token_urlsafe(32)}"


def id_of(key: str) -> str:
    """Return the id under which a key is stored: the one that it shows, or a digest if it was made elsewhere."""
    ours = _OURS.fullmatch(key)
    return ours[1] if ours else hashlib.sha256(b"molora key id\0" + key.encode(errors="replace")).hexdigest()[:16]


def check_given(key: str, where: str) -> None:
    """Raise ConfigError when a key that was made elsewhere could be guessed or cannot be sent in a header.

    Args:
        key: the key; it is not quoted in the error.
        where: it comes from.
    """
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError(f"{where} holds no key: write visible ASCII characters without spaces")
    if len(key) < SHORTEST or len(set(key)) < 8:
        raise ConfigError(
            f"{where} holds a key of {len(key)} characters, which could be guessed; use at least {SHORTEST} random "
            "ones, as from: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )


def sealed(key: str) -> tuple[bytes, bytes]:
    """Return a new salt and the hash of a key with it: what is stored."""
    salt = secrets.token_bytes(16)
    return salt, _hash(salt, key)


def opens(key: str, salt: bytes, stored: bytes) -> bool:
    """Whether this is the key whose salt and hash were stored; takes the same time whatever the answer."""
    return hmac.compare_digest(_hash(salt, key), stored)


def _hash(salt: bytes, key: str) -> bytes:
    return hashlib.sha256(salt + key.encode(errors="replace")).digest()
