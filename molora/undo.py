"""Snapshot: the structure of a model before something is put into it, to be restored when that fails.

PEFT changes a model in many places before it can know whether an adapter fits: layers are replaced, heads are wrapped,
hooks are registered, attributes added, parameters frozen. A snapshot puts all of it back, whatever was changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_CONTAINERS = (dict, list, set)  # and their subclasses, such as OrderedDict


class Snapshot:
    """What a model's modules hold: children, parameters, hooks, modes and plain attributes, but no weight values.

    Args:
        model: the model; only modules that it has now are restored.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [
            (module, {key: (value, _content(value)) for key, value in module.__dict__.items()})
            for module in model.modules()
        ]
        self._trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore(self) -> None:
        """Put everything back; containers keep their identity, since modules share them."""
        for module, attributes in self._modules:
            for key in module.__dict__.keys() - attributes.keys():
                del module.__dict__[key]
            for key, (value, content) in attributes.items():
                module.__dict__[key] = value
                if content is None:
                    continue
                value.clear()
                value.extend(content) if isinstance(value, list) else value.update(content)
        for parameter, requires_grad in self._trainable:
            parameter.requires_grad_(requires_grad)


def _content(value: Any) -> Any:
    return value.copy() if isinstance(value, _CONTAINERS) else None


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """Restore the model's structure when the block raises."""
    snapshot = Snapshot(model)
    try:
        yield
    except BaseException:
        snapshot.restore()
        raise
