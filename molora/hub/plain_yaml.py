"""YAML for cards and manifests: plain data only, read with suspicion and written the same way every time."""

from __future__ import annotations

from typing import Any

import yaml

from ..errors import ConfigError


class _Loader(yaml.SafeLoader):
    """Plain YAML: no anchors, with which a small file can stand for a huge one, and no key twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if getattr(event, "anchor", None) is not None:
            raise yaml.MarkedYAMLError(problem="anchors and aliases are not allowed", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {repr(key) for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.MarkedYAMLError(problem=f"key {', '.join(sorted(twice))} is there twice",
                                       problem_mark=node.start_mark)  # fmt: skip
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Mappings in lines; lists of numbers, and no others, in brackets."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> Any:
        numbers = bool(sequence) and all(isinstance(value, (int, float)) for value in sequence)
        return super().represent_sequence(tag, sequence, flow_style=numbers or not sequence)

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> Any:
        return super().represent_mapping(tag, mapping, flow_style=not mapping)


def read_yaml(text: str, name: str) -> Any:
    """Return the data of a YAML text; raise ConfigError when it is not plain YAML."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:  # also impossible dates and numbers
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{name} is not readable YAML: {reason}") from None


def write_yaml(content: Any) -> str:
    """Return plain data as YAML text, in the order it has."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=118)
