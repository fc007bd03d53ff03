"""YAML as a tree whose every value knows its file and line.

PyYAML reads YAML 1.1, where `no` is false, `1:30` is 90 and `1e-4` is a string. The resolvers here
are those of YAML 1.2's core schema, for reading and for writing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from vitdense.config.errors import ConfigError, Mark, Problem

_TAG = "tag:yaml.org,2002:"
_SCALARS = [
    ("null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), list("-+0123456789")),
    (
        "float",
        re.compile(
            r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+.0123456789"),
    ),
]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[Any]] = {}


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, list[Any]] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, _pattern, _first)


@dataclass(slots=True)
class Node:
    """A value and its place; values of mappings stand at the place of their key."""

    value: Any
    mark: Mark

    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value


def parse(text: str, file: str, first_line: int = 1) -> Node:
    """Read one YAML document; raises ConfigError. `first_line` 0: it is from the command line."""
    return _Parser(text, file, first_line).parse()


def dump(value: Any) -> str:
    """YAML 1.2 text of plain values, keys in their order, short lists on one line."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=100)


class _Parser:
    def __init__(self, text: str, file: str, first_line: int) -> None:
        self.text = text
        self.lines = text.splitlines()
        self.file = file
        self.first_line = first_line
        self.open: list[yaml.Node] = []

    def parse(self) -> Node:
        try:
            node = _Loader(self.text).get_single_node()
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            what = ", ".join(filter(None, [error.context, error.problem]))
            raise self.error(mark, f"is no YAML: {what}") from None
        except yaml.YAMLError as error:
            what = " ".join(str(error).split())
            raise ConfigError([Problem(Mark(self.file), "", f"is no YAML: {what}")]) from None
        if node is None:
            return Node(None, self.mark(None))
        return self.convert(node, self.mark(node.start_mark))

    def mark(self, mark: Any) -> Mark:
        line = mark.line if mark else 0
        if not self.first_line:
            return Mark(self.file, 0, self.text)
        text = self.lines[line] if line < len(self.lines) else ""
        return Mark(self.file, line + self.first_line, text)

    def error(self, mark: Any, message: str) -> ConfigError:
        return ConfigError([Problem(self.mark(mark), "", message)])

    def convert(self, node: yaml.Node, mark: Mark) -> Node:
        if node in self.open:
            raise self.error(node.start_mark, "an alias that contains itself")
        self.open.append(node)
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            value: Any = self.mapping(node)
        elif isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            value = [self.convert(item, self.mark(item.start_mark)) for item in node.value]
        else:
            value = self.scalar(node)
        self.open.pop()
        return Node(value, mark)

    def mapping(self, node: yaml.MappingNode) -> dict[Any, Node]:
        children: dict[Any, Node] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise self.error(key_node.start_mark, "a key must be a name, not a list or mapping")
            key, mark = self.scalar(key_node), self.mark(key_node.start_mark)
            if key in children:
                first = children[key].mark.line
                raise self.error(
                    key_node.start_mark, f"key {key!r} is given twice, first in line {first}"
                )
            children[key] = self.convert(value_node, mark)
        return children

    def scalar(self, node: yaml.Node) -> Any:
        kind, text = node.tag.removeprefix(_TAG), node.value
        try:
            if isinstance(text, str):
                return _scalar(kind, text)
        except ValueError:
            pass
        raise self.error(node.start_mark, f"{node.tag} is not allowed here: write plain YAML")


def _scalar(kind: str, text: str) -> Any:
    match kind:
        case "str":
            return text
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int":
            return int(text, {"0x": 16, "0o": 8}.get(text[:2], 10))
        case "float":
            return float(re.sub(r"\.(?=[inIN])", "", text))
    raise ValueError(kind)
