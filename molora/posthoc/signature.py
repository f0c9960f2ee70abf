"""config_hash: one short key for all adapters whose configs mean the same, as in AdapterHub's registry."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def config_hash(config: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> str:
    """Return 16 hex digits: sha1 over the keys that differ from their defaults, whatever their order.

    Args:
        config: plain data, such as a LoRA's adapter_config.json; sets count as sorted lists.
        defaults: what a missing key means; keys that hold just that are left out.
    """
    usual = defaults or {}
    kept = {key: value for key, value in config.items() if key not in usual or usual[key] != value}
    text = json.dumps(kept, sort_keys=True, default=sorted)
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()[:16]
