"""From a tree to checked objects, collecting every problem with its place."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from vitdense.config import types
from vitdense.config.errors import Mark, Problem
from vitdense.config.layers import DEFAULT_NAMES
from vitdense.config.nodes import Node, dump
from vitdense.config.part import Part
from vitdense.declarations import Declaration, Option
from vitdense.registry import REGISTRIES, nearest, suggest

FACTS = {
    "num_classes": "the data set supplies num_classes; remove it",
    "classes": "the data set supplies classes; remove it",
    "levels": "the backbone and the neck supply levels; remove it",
    "root": "vitdense supplies root; set data.root instead",
    "split": "vitdense supplies split; set data.train and data.val instead",
}
"""What to answer where a config gives what vitdense knows."""

BAD: Any = object()
"""Stands for a value that has been reported."""


@dataclass(frozen=True, slots=True)
class Key:
    """One key that a mapping may have."""

    name: str
    type: Any
    required: bool
    meaning: str


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose keys they are: `title` is what messages call it, `word` what they call a key."""

    title: str
    word: str
    keys: dict[str, Key]
    part: Declaration | None = None


def section_keys(section: type[BaseModel]) -> dict[str, Key]:
    """The keys of a section, from its pydantic fields."""
    hints = typing.get_type_hints(section, include_extras=True)
    return {
        name: Key(name, hints[name], field.is_required(), field.description or "")
        for name, field in section.model_fields.items()
    }


def part_keys(declaration: Declaration) -> dict[str, Key]:
    """The keys of a part, from its options; raises ValueError for a type that is not plain."""
    return {
        name: Key(name, _type_of(option, declaration), option.required, option.meaning)
        for name, option in declaration.options.items()
    }


def _type_of(option: Option, declaration: Declaration) -> Any:
    """The type of an option; raises ValueError if it is not plain, or if its default is none."""
    place = f"{declaration.place}: {declaration.qualname}: option {option.name!r}"
    try:
        kind = types.evaluate(option.annotation)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    if option.required or _is_value(option.default, kind):
        return kind
    rest = f"; write {option.annotation} | None" if option.default is None else ""
    raise ValueError(f"{place}: its default {option.default!r} is not {types.describe(kind)}{rest}")


def _is_value(value: Any, kind: Any) -> bool:
    if types.part_kind(kind):
        return value is None and types.allows_none(kind)
    try:
        types.validator(kind)(value)
    except ValidationError:
        return False
    return True


class Reader:
    """Checks trees; what is wrong gathers in `problems`.

    Attributes:
        unread: whether a module under imports could not be read, so that its parts are not known.
    """

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.unread = False

    def section(self, schema: type[BaseModel], node: Node, path: str = "") -> Any:
        """An object of `schema`, or BAD."""
        owner = Owner(path or "the config", "key", section_keys(schema))
        if isinstance(node.value, str) and "name" in owner.keys:  # as for parts: a bare name
            node = Node({"name": node}, node.mark)
        values = self.mapping(owner, Node({}, node.mark) if node.value is None else node, path)
        if values is BAD or BAD in values.values():
            return BAD
        try:
            return schema.model_validate(values)
        except ValidationError as error:
            for detail in error.errors():
                message = detail["msg"].removeprefix("Value error, ")
                name, _, rest = message.partition(": ")
                inner = node.value.get(name) if isinstance(node.value, dict) else None
                if inner is not None:
                    self.report(inner.mark, join(path, name), rest)
                else:
                    self.report(node.mark, path, message)
            return BAD

    def mapping(self, owner: Owner, node: Node, path: str) -> Any:
        """The checked values that a mapping gives; BAD, as whole or value, for what is wrong."""
        if not isinstance(node.value, dict):
            self.report(
                node.mark, path, f"expected a mapping of its {owner.word}s, got {show(node)}"
            )
            return BAD
        values = {}
        for name, child in node.value.items():
            if name in owner.keys:
                values[name] = self.value(owner.keys[name], child, join(path, name))
            else:
                self.report(child.mark, join(path, name), unknown(owner, name, child))
                # The key that was meant is not reported as missing as well.
                values[nearest(str(name), owner.keys) or str(name)] = BAD
        for key in owner.keys.values():
            if (
                key.name not in values
                and isinstance(key.type, type)
                and issubclass(key.type, BaseModel)
            ):
                values[key.name] = self.section(key.type, Node({}, node.mark), join(path, key.name))
            elif key.name not in values and key.required:
                meaning = f": {key.meaning}" if key.meaning else ""
                message = f"{owner.title} needs the {owner.word} {key.name!r}{meaning}"
                self.report(node.mark, join(path, key.name), message)
                values[key.name] = BAD
        return values

    def value(self, key: Key, node: Node, path: str) -> Any:
        """A checked value, or BAD."""
        if isinstance(key.type, type) and issubclass(key.type, BaseModel):
            return self.section(key.type, node, path)
        kind = types.part_kind(key.type)
        if kind and not (node.value is None and types.allows_none(key.type)):
            return self.part(kind, node, path)
        value = node.plain()
        try:
            return types.validator(key.type)(value)
        except ValidationError:
            near = suggest(value, types.literals(key.type)) if isinstance(value, str) else ""
            if isinstance(value, int | float) and _is_value(str(value), key.type):
                quoted = f'"{show(node)}"'
                near = " Put it in quotes: " + (quoted if node.mark.line else f"{path}='{quoted}'")
            expected = types.describe(key.type)
            self.report(
                node.mark, path, f"expected {expected}, got {show(node)}.{near}".rstrip(".")
            )
            return BAD

    def part(self, kind: str, node: Node, path: str) -> Any:
        """A part with all its options, or BAD."""
        children = node.value if isinstance(node.value, dict) else {"name": node}
        default = DEFAULT_NAMES.get(path) if kind == "model" else None
        name_node = children.get("name", Node(default, node.mark))
        name = name_node.value
        if not isinstance(name, str):
            known = ", ".join(REGISTRIES[kind].names())
            self.report(name_node.mark, path, f"which {kind}? Give the name of one: {known}")
            return BAD
        try:
            declaration, implied = REGISTRIES[kind].resolve(name)
            owner = Owner(f"{kind} {name!r}", "option", part_keys(declaration), declaration)
        except (LookupError, ValueError) as error:
            if not (self.unread and isinstance(error, LookupError)):
                self.report(name_node.mark, path, str(error.args[0]))
            return BAD
        given = {key: child for key, child in children.items() if key != "name"}
        for key in implied.keys() & given.keys():
            message = (
                f"the name {name!r} says it already; write name: {declaration.name}, or remove it"
            )
            self.report(given[key].mark, join(path, key), message)
        given = {key: Node(value, name_node.mark) for key, value in implied.items()} | given
        values = self.mapping(owner, Node(given, node.mark), path)
        if BAD in values.values():
            return BAD
        options = {
            key: values.get(key, option.default) for key, option in declaration.options.items()
        }
        marks = {"": node.mark} | {str(key): child.mark for key, child in given.items()}
        return Part(kind, declaration.name, options, path, marks)

    def report(self, mark: Mark, path: str, message: str) -> None:
        """Note a problem, once: a folder that is not found may hold several modules."""
        if not any((it.path, it.message) == (path, message) for it in self.problems):
            self.problems.append(Problem(mark, path, message))


def unknown(owner: Owner, name: Any, node: Node) -> str:
    """The message for a key that its owner does not have."""
    facts = owner.part.facts if owner.part else ()
    if name in facts or name in ("num_classes", "classes"):
        return FACTS.get(name, f"vitdense supplies {name}; remove it")
    message = f"{owner.title} has no {owner.word} {name!r} (got {show(node)})."
    near = suggest(str(name), owner.keys)
    if near:
        return message + near
    known = f" Known: {', '.join(owner.keys)}" if owner.keys else f" It has no {owner.word}s"
    return message + (_others(owner.part, name) if owner.part else "") + known


def _others(part: Declaration, name: Any) -> str:
    """Which parts of the same kind do have the option."""
    registry = REGISTRIES[part.kind]
    have = [other for other in registry.names() if name in _options(part.kind, other)]
    return f" It belongs to {part.kind} {', '.join(map(repr, have[:3]))}." if have else ""


def _options(kind: str, name: str) -> Iterable[str]:
    try:
        return REGISTRIES[kind].resolve(name)[0].options
    except ValueError:
        return ()


def join(path: str, name: Any) -> str:
    """A dotted path."""
    return f"{path}.{name}" if path else str(name)


def show(node: Node) -> str:
    """A value as one writes it in YAML, on one line, cut if long."""
    value = node.plain()
    text = repr(value) if isinstance(value, str) else dump(value).removesuffix("...\n")
    if isinstance(value, dict | list):
        text = repr(value)
    text = inspect.cleandoc(text).strip()
    return text if len(text) <= 60 else text[:57] + "..."
