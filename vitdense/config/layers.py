"""Layers of a config: a file over its base, the command line over the file."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vitdense.config.errors import ConfigError, Mark, Problem
from vitdense.config.nodes import Node, parse

DEFAULT_NAMES = {"model": "pyramid", "schedule": "cosine"}
"""Names that these mappings have if they give none."""

LENGTHS = ("steps", "epochs", "minutes")
"""Alternatives in `train`: one that a layer gives replaces what is below."""

COMMAND_LINE = "command line"


def read(path: Path, above: Sequence[Path] = ()) -> Node:
    """The tree of a config file merged over its bases; raises ConfigError."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise _no_file(path) from None
    except (OSError, UnicodeDecodeError) as error:
        raise _fault(Mark(str(path)), f"cannot be read: {error}") from None
    return resolve(parse(text, str(path)), path, above)


def resolve(tree: Node, path: Path, above: Sequence[Path] = ()) -> Node:
    """Replace `base: file` in a tree by what the file holds; raises ConfigError."""
    if tree.value is None:
        tree = Node({}, tree.mark)
    if not isinstance(tree.value, dict):
        raise _fault(tree.mark, "a config is a mapping of sections")
    base = tree.value.get("base")
    if base is None:
        return tree
    own = Node({key: node for key, node in tree.value.items() if key != "base"}, tree.mark)
    if not isinstance(base.value, str):
        raise _fault(base.mark, f"expected the name of one file, got {base.plain()!r}", "base")
    file = Path(os.path.normpath(path.parent / base.value))
    chain = [*above, path]
    if any(file.resolve() == earlier.resolve() for earlier in chain):
        names = " -> ".join(str(earlier) for earlier in [*chain, file])
        raise _fault(base.mark, f"the bases form a circle: {names}", "base")
    if not file.is_file():
        raise _fault(base.mark, f"there is no file {file}.{_near_file(file)}", "base")
    return merge(read(file, chain), own)


def override(tree: Node, overrides: Iterable[str]) -> Node:
    """Merge `key.key=value` strings, values in YAML, over a tree; raises ConfigError."""
    overrides = [overrides] if isinstance(overrides, str) else overrides
    layer = Node({}, Mark(COMMAND_LINE))
    for text in overrides:
        key, equals, value = text.partition("=")
        mark = Mark(COMMAND_LINE, 0, text)
        if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
            raise _fault(mark, f"expected key=value, as train.steps=2000, got {text!r}")
        node = _place(parse(value, COMMAND_LINE, first_line=0), mark)
        for name in reversed(key.split(".")):
            node = Node({name: node}, mark)
        layer = merge(layer, node, joining=True)
    return Node(merge(tree, layer).value, Mark(tree.mark.file))


def merge(base: Node, over: Node, path: str = "", joining: bool = False) -> Node:
    """Mappings merge, all else replaces, and another `name` discards the base's options.

    Where a mapping meets a string, the string is the name of a part with its defaults.

    Args:
        joining: the two are pieces of one layer, so that neither replaces the other's choices.
    """
    default = None if joining else DEFAULT_NAMES.get(path)
    lower, upper = _as_mapping(base, over), _as_mapping(over, base)
    if lower is None or upper is None:
        return over
    if "name" in upper:
        old = lower["name"].value if "name" in lower else default
        if old not in (None, upper["name"].value):
            return Node(upper, over.mark)
    if path == "train" and not joining and any(key in upper for key in LENGTHS):
        lower = {key: node for key, node in lower.items() if key not in LENGTHS}
    merged = dict(lower)
    for key, node in upper.items():
        inner = f"{path}.{key}" if path else str(key)
        merged[key] = merge(lower[key], node, inner, joining) if key in lower else node
    return Node(merged, over.mark)


def _as_mapping(node: Node, other: Node) -> dict[Any, Node] | None:
    """The options of a node, if it and the other are a mapping, or one is and one a bare name."""
    if isinstance(node.value, dict):
        return node.value
    if isinstance(node.value, str) and isinstance(other.value, dict):
        return {"name": Node(node.value, node.mark)}
    return None


def _place(node: Node, mark: Mark) -> Node:
    """The same values, all at one place."""
    value = node.value
    if isinstance(value, dict):
        value = {key: _place(child, mark) for key, child in value.items()}
    if isinstance(value, list):
        value = [_place(child, mark) for child in value]
    return Node(value, mark)


def _fault(mark: Mark, message: str, path: str = "") -> ConfigError:
    return ConfigError([Problem(mark, path, message)])


def _no_file(path: Path) -> ConfigError:
    what = "is a folder" if path.is_dir() else "there is no such file"
    return _fault(Mark(str(path)), f"{what}.{_near_file(path)}")


def _near_file(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path("configs")
    files = {str(file) for file in [*folder.glob("*.y*ml"), *Path("configs").rglob("*.yaml")]}
    near = difflib.get_close_matches(str(path), sorted(files), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(near)}?" if near else ""
