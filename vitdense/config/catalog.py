"""Texts of `vitdense list` and `vitdense show`."""

from __future__ import annotations

import inspect
from typing import Any

from vitdense.config.errors import ConfigError, Mark, Problem
from vitdense.config.nodes import dump
from vitdense.config.reader import Key, part_keys, section_keys
from vitdense.config.schema import SECTIONS, Config, Section
from vitdense.config.types import describe
from vitdense.declarations import REQUIRED, short_path
from vitdense.registry import REGISTRIES, Registry, suggest, timm_names


def list_parts(kind: str | None = None) -> str:
    """Names of all parts, or of those of one kind, each with the first line of its docstring."""
    kinds = list(REGISTRIES) if kind is None else [_kind(kind)]
    return "\n\n".join(_list_kind(REGISTRIES[kind]) for kind in kinds)


def show(what: str) -> str:
    """Options of a part (`head.upernet`) or keys of a section (`train`), with their meanings."""
    kind, _, name = what.partition(".")
    if name and kind in SECTIONS:
        return _show_one(kind, name)
    if name:
        return _show_part(REGISTRIES[_kind(kind)], name)
    if what == "config":
        return _show_section("config", Config)
    if what in SECTIONS:
        return _show_section(what, SECTIONS[what])
    key = section_keys(Config).get(what)
    if key is not None and what not in REGISTRIES:
        return "\n".join(_show_key(key, _section_default(Config, what)))
    return list_parts(what)


def _list_kind(registry: Registry[Any]) -> str:
    names = registry.names()
    width = max(map(len, names), default=0)
    rows = [f"  {name:<{width}}  {_summary(registry, name)}".rstrip() for name in names]
    if registry.kind == "backbone":
        rows.append(f"  and every timm model by its own name ({len(timm_names())} are known)")
    return "\n".join([registry.kind, *rows])


def _summary(registry: Registry[Any], name: str) -> str:
    try:
        return registry.resolve(name)[0].doc
    except ValueError as error:
        return f"(cannot be used: {error})"


def _show_part(registry: Registry[Any], name: str) -> str:
    try:
        declaration, implied = registry.resolve(name)
        keys = part_keys(declaration)
    except (LookupError, ValueError) as error:
        raise _error(str(error.args[0])) from None
    lines = [f"{registry.kind}.{name}: {declaration.doc}", f"  {declaration.place}"]
    if implied:
        setting = ", ".join(f"{key}: {value}" for key, value in implied.items())
        lines[0] = f"{registry.kind}.{name} is {registry.kind}.{declaration.name} with {setting}"
    if declaration.facts:
        lines.append(f"  vitdense supplies: {', '.join(declaration.facts)}")
    for key in keys.values():
        lines += ["", *_show_key(key, declaration.options[key.name].default)]
    return "\n".join(lines)


def _show_section(name: str, section: type[Section]) -> str:
    lines = [f"{name}: {section.__doc__}", f"  {_place(section)}"]
    for key in section_keys(section).values():
        lines += ["", *_show_key(key, _section_default(section, key.name))]
    return "\n".join(lines)


def _show_one(section: str, name: str) -> str:
    keys = section_keys(SECTIONS[section])
    if name not in keys:
        hint = suggest(name, keys)
        raise _error(f"{section} has no key {name!r}.{hint} Known: {', '.join(keys)}")
    return "\n".join(_show_key(keys[name], _section_default(SECTIONS[section], name)))


def _section_default(section: type[Section], name: str) -> Any:
    if name == "output":
        return "runs/<config name>"
    field = section.model_fields[name]
    return REQUIRED if field.is_required() else field.get_default(call_default_factory=True)


def _show_key(key: Key, default: Any) -> list[str]:
    if isinstance(key.type, type) and issubclass(key.type, Section):
        return [f"  {key.name}: a section", f"      {key.meaning}"]
    value = "(required)" if default is REQUIRED else f"= {_yaml(default)}"
    lines = [f"  {key.name} {value}", f"      {describe(key.type)}"]
    return [*lines, f"      {key.meaning}"] if key.meaning else lines


def _yaml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    return dump(value).removesuffix("...\n").strip()


def _place(section: type[Section]) -> str:
    return f"{short_path(inspect.getfile(section))}:{inspect.getsourcelines(section)[1]}"


def _kind(word: str) -> str:
    kind = word.removesuffix("s")
    if kind in REGISTRIES:
        return kind
    known = [*REGISTRIES, *section_keys(Config)]
    parts = [f"{kind}.{word}" for kind in REGISTRIES if word in REGISTRIES[kind].names()]
    hint = f" Did you mean {parts[0]!r}?" if parts else suggest(word, known)
    raise _error(
        f"there is no {word!r}.{hint} Kinds of parts: {', '.join(REGISTRIES)}; "
        f"sections: {', '.join(SECTIONS)}"
    )


def _error(message: str) -> ConfigError:
    return ConfigError([Problem(Mark(""), "", message)])
