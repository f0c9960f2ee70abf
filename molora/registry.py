"""Named components: a registry maps a name to a function or a class, and builds it from `{name, **options}`.

The keyword-only arguments of a component are its options, so its signature is its schema: a new selector is one
decorated function, and nothing else has to be edited. Other packages add components through entry points in the group
`molora.<kind>` (for example `molora.selector`), which are read the first time an unknown name is asked for.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any

from .errors import ConfigError, did_you_mean

Spec = str | Mapping[str, Any]  # "top_k" or {"name": "top_k", "k": 2}


def split_spec(spec: Spec, kind: str = "component") -> tuple[str, dict[str, Any]]:
    """Split `"top_k"` or `{"name": "top_k", "k": 2}` into its name and its options."""
    if isinstance(spec, str):
        return spec, {}
    if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
        raise ConfigError(f"{kind} {spec!r} is neither a name nor a mapping with a 'name'; write {{name: ..., ...}}")
    return spec["name"], {key: value for key, value in spec.items() if key != "name"}


class Registry:
    """Components of one kind, by name.

    Args:
        kind: what the components are called in messages and in entry points, for example `selector`.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._components: dict[str, Any] = {}
        self._facts: dict[str, dict[str, Any]] = {}
        self._read_entry_points = False

    def register(self, name: str, **facts: Any) -> Callable[[Any], Any]:
        """Decorate a function or class to register it; `facts` are read back with `fact()`."""

        def add(component: Any) -> Any:
            if name in self._components and self._components[name] is not component:
                raise ConfigError(f"{self.kind} '{name}' is registered twice; choose another name")
            self._components[name] = component
            self._facts[name] = facts
            return component

        return add

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._components))

    def __contains__(self, name: object) -> bool:
        return name in self._components

    def get(self, name: str) -> Any:
        """Return the component called `name`; raise ConfigError with the nearest known name."""
        if name not in self._components and not self._read_entry_points:
            self._read_entry_points = True
            for entry in entry_points(group=f"molora.{self.kind}"):
                if entry.name not in self._components:
                    self.register(entry.name)(entry.load())
        if name not in self._components:
            raise ConfigError(f"{self.kind} '{name}' is unknown{did_you_mean(name, self._components)}")
        return self._components[name]

    def fact(self, name: str, key: str, default: Any = None) -> Any:
        """Return one fact that was given at registration."""
        self.get(name)
        return self._facts[name].get(key, default)

    def options(self, name: str) -> dict[str, inspect.Parameter]:
        """Return the options of a component: its keyword-only parameters, without those molora passes itself."""
        component = self.get(name)
        target = component.__init__ if inspect.isclass(component) else component
        given = set(self._facts[name].get("given", ()))
        return {
            key: parameter
            for key, parameter in inspect.signature(target).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY and key not in given
        }

    def problems(self, spec: Spec) -> list[str]:
        """Return what is wrong with a spec (unknown name, unknown or missing options), without building it."""
        try:
            name, options = split_spec(spec, self.kind)
            known = self.options(name)
        except ConfigError as error:
            return [str(error)]
        wrong = [
            f"{self.kind} '{name}' has no option '{key}'{did_you_mean(key, known)}"
            for key in options
            if key not in known
        ]
        missing = [k for k, p in known.items() if p.default is inspect.Parameter.empty and k not in options]
        return wrong + [f"{self.kind} '{name}' needs the option '{key}'" for key in missing]

    def build(self, spec: Spec, *args: Any, **given: Any) -> Any:
        """Build a component: an instance `cls(*args, **options)` of a class, or a function with its options bound.

        `given` are keyword arguments that molora passes itself (see the fact `given`).
        """
        problems = self.problems(spec)
        if problems:
            raise ConfigError("\n".join(problems))
        name, options = split_spec(spec, self.kind)
        component = self.get(name)
        if inspect.isclass(component):
            return component(*args, **options, **given)
        return functools.partial(component, **options, **given)

    def summary(self, name: str) -> str:
        """Return the first line of a component's docstring."""
        return (inspect.getdoc(self.get(name)) or "").partition("\n")[0]
