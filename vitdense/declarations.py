"""What registered classes declare, read from their source: names, facts, options, meanings.

Importing the parts would import torch, which takes longer than checking a whole config. So a
constructor's signature is read with `ast`, and each option's meaning from the comment behind it.
"""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.util
import inspect
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

REQUIRED: Any = type("Required", (), {"__repr__": lambda self: "required"})()
"""Stands for the default of an option that has none."""


KINDS = {
    "BACKBONES": "backbone",
    "NECKS": "neck",
    "HEADS": "head",
    "MODELS": "model",
    "DATASETS": "dataset",
    "TRANSFORMS": "transform",
    "METRICS": "metric",
}
"""Kind of part by the name that its registry has in source."""

FACTS: dict[str, tuple[str, ...]] = {
    "backbone": (),
    "neck": ("levels",),
    "head": ("levels", "num_classes"),
    "model": ("num_classes", "image_classes"),
    "dataset": ("root", "split"),
    "transform": (),
    "metric": ("classes",),
}
"""What vitdense supplies to a constructor of each kind, left of `*`; a model may do without its
second."""


@dataclass(frozen=True, slots=True)
class Option:
    """What a config may set on a part; `annotation` is source text, `default` may be REQUIRED."""

    name: str
    annotation: str
    default: Any = REQUIRED
    meaning: str = ""
    line: int = 0

    @property
    def required(self) -> bool:
        return self.default is REQUIRED


@dataclass(frozen=True, slots=True)
class Declaration:
    """One registered class as its source says it.

    Attributes:
        facts: constructor parameters that vitdense supplies.
        options: constructor parameters that a config may set.
        inherits: whether it has no constructor of its own, so only the live class knows.
        fault: what the source does wrong; such a part can be listed, but not configured.
    """

    name: str
    kind: str
    module: str
    qualname: str
    file: Path
    line: int
    doc: str = ""
    facts: tuple[str, ...] = ()
    options: dict[str, Option] = field(default_factory=dict)
    inherits: bool = False
    fault: str = ""

    @property
    def place(self) -> str:
        """`file:line`, relative to the working folder if the file lies in it."""
        return f"{short_path(self.file)}:{self.line}"

    def same_class(self, other: Declaration) -> bool:
        """Whether both stand for one class, perhaps imported under two module names."""
        return (self.file, self.qualname) == (other.file, other.qualname)


@dataclass(frozen=True, slots=True)
class Source:
    """What one file declares; `dynamic` if it also registers in ways that only running it shows."""

    declarations: list[Declaration]
    dynamic: bool


def short_path(path: Path | str) -> str:
    """The path relative to the working folder if it lies in it, else as it is."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def read_file(file: Path, module: str) -> Source:
    """Read what `file` registers; raises SyntaxError."""
    data = file.read_bytes()
    if b".register" not in data:
        return Source([], False)
    try:
        lines = importlib.util.decode_source(data).splitlines()
    except (SyntaxError, UnicodeDecodeError) as error:
        raise SyntaxError(str(error), (str(file), None, None, None)) from None
    tree = ast.parse(data, filename=str(file))
    found = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            for kind, name in filter(None, map(_registration, node.decorator_list)):
                found.append(_declare(node, node.name, kind, name, module, file, lines))
    uses = sum(
        isinstance(node, ast.Attribute) and node.attr == "register" for node in ast.walk(tree)
    )
    return Source(found, uses > len(found))


def read_module(name: str) -> Source:
    """Read what a module, or all files of a package, register, without importing anything.

    Raises ModuleNotFoundError and SyntaxError.
    """
    sources = [read_file(file, module) for file, module in module_files(name)]
    declarations = [declaration for source in sources for declaration in source.declarations]
    return Source(declarations, any(source.dynamic for source in sources))


def module_files(name: str) -> Iterator[tuple[Path, str]]:
    """The Python files of a module or package, with their module names, without importing."""
    path: list[str] | None = None
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        parent = ".".join(parts[:end])
        # Finding a top-level name imports nothing, and knows editable installs.
        if end == 1:
            spec = importlib.util.find_spec(parent)
        else:
            spec = importlib.machinery.PathFinder.find_spec(parent, path)
        if spec is None:
            raise ModuleNotFoundError(f"no module named {parent!r}", name=parent)
        path = list(spec.submodule_search_locations or [])
    assert spec is not None
    if not path and spec.origin and spec.origin.endswith(".py"):
        yield Path(spec.origin), name
    for folder in path or []:
        for file in sorted(Path(folder).rglob("*.py")):
            inner = file.relative_to(folder).with_suffix("").parts
            yield file, ".".join([name, *(part for part in inner if part != "__init__")])


def of_class(cls: type, kind: str, name: str) -> Declaration:
    """The declaration of a live class, from the source of the class that has its constructor.

    Raises ValueError if there is no source to read.
    """
    owner = next((c for c in cls.__mro__ if "__init__" in vars(c)), cls)
    own = replace(_of_class(cls, kind, name), inherits=False)
    if owner is cls or owner is object:
        return own
    parent = _of_class(owner, kind, name)
    return replace(own, facts=parent.facts, options=parent.options, fault=parent.fault)


def _of_class(cls: type, kind: str, name: str) -> Declaration:
    try:
        file = Path(inspect.getsourcefile(cls) or "")
        lines, start = inspect.getsourcelines(cls)
    except (OSError, TypeError):
        raise ValueError(
            f"{kind} {name!r}: {cls.__qualname__} has no source to read; put it into a file"
        ) from None
    # Blank lines keep the line numbers; `if 1:` takes the indent of a class in a function.
    indent = lines[0][: len(lines[0]) - len(lines[0].lstrip())]
    head = ["\n"] * max(start - 2, 0) + ["if 1:\n"] if indent else ["\n"] * (start - 1)
    tree = ast.parse("".join(head + lines))
    node = next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    text = "".join(head + lines).splitlines()
    return _declare(node, cls.__qualname__, kind, name, cls.__module__, file, text)


def sketch(cls: type, kind: str, name: str) -> Declaration:
    """Where a live class stands, without its options."""
    try:
        file, line = inspect.getsourcefile(cls), inspect.getsourcelines(cls)[1]
    except (OSError, TypeError):
        file, line = None, 0
    where = Path(file or f"<{cls.__module__}>")
    return Declaration(name, kind, cls.__module__, cls.__qualname__, where, line)


def _registration(decorator: ast.expr) -> tuple[str, str] | None:
    """(kind, name) of `@HEADS.register("name")` or `@vitdense.HEADS.register("name")`."""
    match decorator:
        case ast.Call(
            func=ast.Attribute(
                value=ast.Name(id=owner) | ast.Attribute(attr=owner), attr="register"
            ),
            args=[ast.Constant(value=str(name))],
        ) if owner in KINDS and name:
            return KINDS[owner], name
    return None


def _declare(
    node: ast.ClassDef,
    qualname: str,
    kind: str,
    name: str,
    module: str,
    file: Path,
    lines: list[str],
) -> Declaration:
    doc = (ast.get_docstring(node) or "").partition("\n")[0]
    bare = Declaration(name, kind, module, qualname, file, node.lineno, doc)
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            facts = tuple(a.arg for a in [*item.args.posonlyargs, *item.args.args][1:])
            bare = replace(bare, facts=facts)
            try:
                bare = replace(bare, options=_options(item, lines))
                _check_facts(kind, facts, item.args.vararg is not None)
            except ValueError as error:
                fault = f"{short_path(file)}:{item.lineno}: {qualname}: {error}"
                return replace(bare, fault=fault)
            return bare
    return replace(bare, inherits=True)


def _check_facts(kind: str, facts: tuple[str, ...], any_number: bool) -> None:
    """Raise ValueError if the constructor takes others than vitdense supplies, or too few."""
    supplied = FACTS[kind]
    words = ", ".join(supplied) or "nothing"
    if more := facts[len(supplied) :]:
        raise ValueError(
            f"{', '.join(more)} stands left of `*`, the place of what vitdense supplies ({words}); "
            "an option belongs to the right of it"
        )
    needed = supplied[:1] if kind == "model" else supplied
    if len(facts) < len(needed) and not any_number:
        raise ValueError(f"a {kind} is built with {words}: take them first, left of `*`")


def _options(init: ast.FunctionDef, lines: list[str]) -> dict[str, Option]:
    if init.args.kwarg is not None:
        raise ValueError(f"**{init.args.kwarg.arg} hides its options: name each one")
    if any(arg.arg == "name" for arg in init.args.kwonlyargs):
        raise ValueError("option 'name': `name` says in a config which part it is; rename it")
    pairs = zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True)
    return {arg.arg: _option(arg, default, lines) for arg, default in pairs}


def _option(arg: ast.arg, default: ast.expr | None, lines: list[str]) -> Option:
    if arg.annotation is None:
        raise ValueError(f"option {arg.arg!r} has no type annotation; write it as {arg.arg}: int")
    try:
        value = REQUIRED if default is None else ast.literal_eval(default)
    except ValueError:
        raise ValueError(
            f"the default of option {arg.arg!r} is not a literal; write the value itself, or None"
        ) from None
    annotation = arg.annotation
    text = annotation.value if isinstance(annotation, ast.Constant) else ast.unparse(annotation)
    last = default or annotation
    # Offsets count UTF-8 bytes.
    rest = lines[(last.end_lineno or 1) - 1].encode()[last.end_col_offset or 0 :].decode()
    return Option(arg.arg, str(text), value, rest.partition("#")[2].strip(), arg.lineno)
